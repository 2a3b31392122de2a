"""Copies whole blocks between layers' tensors and flat bytes on the host, on the CPU and on CUDA.

Shapes: a view is ``[N, ...]``, blocks first; a payload holds ``[blocks, ...]`` of one layer after the other, as bytes.
Layers may differ in what follows ``N``, not in dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.tensors.streams import DeviceStream, StreamEvent

Payload = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

_AS_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class EqualLayers(NamedTuple):
    """Neighbouring layers of one shape: in a payload they are one ``[layers, blocks, ...]``.

    Attributes:
        layer_lo: The first.
        layer_hi: One past the last.
        part: Where their bytes stand in the payload.
        shape: Of the payload's part, in elements.
    """

    layer_lo: int
    layer_hi: int
    part: slice
    shape: tuple[int, ...]


class ShapeRuns:
    """Where neighbouring layers have one shape, so that they are copied as one: all of them, where all layers do."""

    def __init__(self, views: Sequence[torch.Tensor]) -> None:
        """Look at the shapes of all layers' views."""
        self._inner_L = [tuple(view.shape[1:]) for view in views]
        self._block_bytes_L = [math.prod(inner) * views[0].element_size() for inner in self._inner_L]
        self._end_L = [len(views)] * len(views)
        for layer in range(len(views) - 2, -1, -1):
            same = self._inner_L[layer] == self._inner_L[layer + 1]
            self._end_L[layer] = self._end_L[layer + 1] if same else layer + 1

    def of(self, layer_lo: int, layer_hi: int, num_blocks: int) -> Iterator[EqualLayers]:
        """The runs of a payload of so many blocks in layers ``[layer_lo, layer_hi)``, in order."""
        start, at = layer_lo, 0
        while start < layer_hi:
            end = min(self._end_L[start], layer_hi)
            stop = at + (end - start) * num_blocks * self._block_bytes_L[start]
            yield EqualLayers(start, end, slice(at, stop), (end - start, num_blocks, *self._inner_L[start]))
            start, at = end, stop


class HostCopies:
    """numpy's copies: single-threaded (a torch copy would take the threads that compute) and without the GIL."""

    def __init__(self, views: Sequence[torch.Tensor]) -> None:
        """Keep numpy views of the tensors; bfloat16 has no numpy dtype, so elements become integers of their size."""
        self._layers = [view.view(_AS_BYTES[view.element_size()]).numpy() for view in views]
        self._runs = ShapeRuns(views)

    def gather(self, layer_lo: int, layer_hi: int, ids: Ids, out: Payload) -> None:
        """Copy blocks ``ids`` of each layer into ``out``."""
        for run in self._runs.of(layer_lo, layer_hi, len(ids)):
            target = self._shaped(out, run)
            for index, layer in enumerate(self._layers[run.layer_lo : run.layer_hi]):
                for position, block in enumerate(ids):
                    np.copyto(target[index, position], layer[block])

    def scatter(self, layer_lo: int, layer_hi: int, ids: Ids, payload: Payload, skip: int) -> None:
        """Copy the payload into blocks ``ids`` of each layer, without its first ``skip`` blocks."""
        for run in self._runs.of(layer_lo, layer_hi, len(ids)):
            source = self._shaped(payload, run)
            for index, layer in enumerate(self._layers[run.layer_lo : run.layer_hi]):
                for position in range(skip, len(ids)):
                    np.copyto(layer[ids[position]], source[index, position])

    def place(
        self, layer_lo: int, layer_hi: int, ids: Ids, payload: Payload, skip: int, *, after: StreamEvent | None
    ) -> None:
        """The same: on the CPU nothing is to be waited for."""
        del after
        self.scatter(layer_lo, layer_hi, ids, payload, skip)

    def copy(self, source: Ids, target: Ids) -> None:
        """Copy blocks ``source`` of every layer over blocks ``target``."""
        for layer in self._layers:
            for source_block, target_block in zip(source, target, strict=True):
                np.copyto(layer[target_block], layer[source_block])

    def _shaped(self, payload: Payload, run: EqualLayers) -> npt.NDArray[np.generic]:
        shaped: npt.NDArray[np.generic] = payload[run.part].view(self._layers[0].dtype).reshape(run.shape)
        return shaped


class DeviceCopies:
    """Copies by kernels of a CUDA device: in the stream that computes or, of what is placed, in that of uploads.

    The host sends numbers of blocks and queues kernels; it waits in ``gather`` alone.
    """

    def __init__(self, views: Sequence[torch.Tensor], lane: CopyLane) -> None:
        """Copy over the streams of ``lane``."""
        self._layers = [view.view(_AS_BYTES[view.element_size()]) for view in views]
        self._runs = ShapeRuns(views)
        self._device = views[0].device
        self._lane = lane

    def snapshot(self, layer_lo: int, layer_hi: int, ids: Ids, out: torch.Tensor) -> None:
        """Copy blocks ``ids`` of each layer, as compute leaves them, into device memory, uint8."""
        self._lane.before_compute()
        stream = self._lane.streams.current()
        index = stream.send(torch.from_numpy(ids))

        def pick() -> None:
            for run, rows in self._parts(layer_lo, layer_hi, len(ids), out):
                for layer, row in zip(self._layers[run.layer_lo : run.layer_hi], rows, strict=True):
                    torch.index_select(layer, 0, index, out=row)

        stream.launch(pick)

    def gather(self, layer_lo: int, layer_hi: int, ids: Ids, out: Payload) -> None:
        """Copy blocks ``ids`` of each layer into ``out``; waits for the device."""
        taken = torch.empty(out.nbytes, dtype=torch.uint8, device=self._device)
        self.snapshot(layer_lo, layer_hi, ids, taken)
        self._lane.settle()
        np.copyto(out, taken.cpu().numpy())

    def scatter(self, layer_lo: int, layer_hi: int, ids: Ids, payload: Payload, skip: int) -> None:
        """Copy the payload into blocks ``ids`` of each layer, without its first ``skip``, as compute goes on."""
        self._lane.before_compute()
        stream = self._lane.streams.current()
        moved = stream.send(torch.from_numpy(payload))
        index = stream.send(torch.from_numpy(ids[skip:].copy()))
        stream.launch(lambda: self._spread(layer_lo, layer_hi, index, moved, skip))

    def place(
        self, layer_lo: int, layer_hi: int, ids: Ids, payload: Payload, skip: int, *, after: StreamEvent | None
    ) -> StreamEvent:
        """The same of a pinned payload, as an upload; returns the event after which that may be written again."""

        def ask(up: DeviceStream) -> None:
            index = up.send(torch.from_numpy(ids[skip:].copy()))

            def move() -> None:
                moved = torch.from_numpy(payload).to(self._device, non_blocking=True)
                self._spread(layer_lo, layer_hi, index, moved, skip)

            up.launch(move)

        return self._lane.upload_by(ask, after=after)

    def _spread(self, layer_lo: int, layer_hi: int, index: torch.Tensor, moved: torch.Tensor, skip: int) -> None:
        for run, rows in self._parts(layer_lo, layer_hi, skip + len(index), moved):
            for layer, blocks in zip(self._layers[run.layer_lo : run.layer_hi], rows, strict=True):
                layer.index_copy_(0, index, blocks[skip:])

    def copy(self, source: Ids, target: Ids) -> None:
        """Copy blocks ``source`` of every layer over blocks ``target``, as compute leaves them."""
        self._lane.before_compute()
        stream = self._lane.streams.current()
        source_index, target_index = (stream.send(torch.from_numpy(each)) for each in (source, target))

        def move() -> None:
            for layer in self._layers:
                layer.index_copy_(0, target_index, layer.index_select(0, source_index))

        stream.launch(move)

    def _parts(
        self, layer_lo: int, layer_hi: int, num_blocks: int, payload: torch.Tensor
    ) -> Iterator[tuple[EqualLayers, torch.Tensor]]:
        """Runs of layers with their part of a payload, ``[layers, blocks, ...]``."""
        for run in self._runs.of(layer_lo, layer_hi, num_blocks):
            yield run, payload[run.part].view(self._layers[0].dtype).view(run.shape)
