"""Copies whole blocks between layers' tensors and flat bytes on the host, on the CPU and on CUDA.

Shapes: a view is ``[N, ...]``, blocks first; a payload holds ``[blocks, ...]`` of one layer after the other, as bytes.
Layers may differ in what follows ``N``, not in dtype.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

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

    def fence(self) -> None:
        """Nothing to wait for: computation on the CPU is over when its call returns."""

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

    def copy(self, source: Ids, target: Ids) -> None:
        """Copy blocks ``source`` of every layer over blocks ``target``."""
        for layer in self._layers:
            for source_block, target_block in zip(source, target, strict=True):
                np.copyto(layer[target_block], layer[source_block])

    def _shaped(self, payload: Payload, run: EqualLayers) -> npt.NDArray[np.generic]:
        shaped: npt.NDArray[np.generic] = payload[run.part].view(self._layers[0].dtype).reshape(run.shape)
        return shaped


class DeviceCopies:
    """Copies on a CUDA stream of their own, through pinned host memory; never synchronises the device.

    One call at a time: the stream, the device buffer and the pinned buffer are shared under a lock.
    """

    def __init__(self, views: Sequence[torch.Tensor]) -> None:
        """Create the stream; buffers grow to the largest payload seen."""
        self._layers = [view.view(_AS_BYTES[view.element_size()]) for view in views]
        self._runs = ShapeRuns(views)
        self._device = views[0].device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._fence: torch.cuda.Event | None = None

    def fence(self) -> None:
        """Make later copies wait for what the calling thread's current stream has queued so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._fence = event

    def gather(self, layer_lo: int, layer_hi: int, ids: Ids, out: Payload) -> None:
        """Select blocks on the device, copy each run once to pinned memory, then all into ``out``."""
        with self._lock, torch.cuda.stream(self._stream):
            self._wait_fence()
            index = torch.from_numpy(ids).to(self._device, non_blocking=True)
            pinned = self._pinned_bytes(out.nbytes)
            for run in self._runs.of(layer_lo, layer_hi, len(ids)):
                layers = self._layers[run.layer_lo : run.layer_hi]
                picked = torch.stack([layer.index_select(0, index) for layer in layers])
                pinned[run.part].copy_(picked.view(-1).view(torch.uint8), non_blocking=True)
            self._finish()
            np.copyto(out, pinned.numpy())

    def scatter(self, layer_lo: int, layer_hi: int, ids: Ids, payload: Payload, skip: int) -> None:
        """Copy the payload to the device once, then into blocks ``ids``; a pinned payload is not copied again."""
        with self._lock, torch.cuda.stream(self._stream):
            source = torch.from_numpy(payload)
            if not source.is_pinned():
                pinned = self._pinned_bytes(payload.nbytes)
                np.copyto(pinned.numpy(), payload)
                source = pinned
            self._wait_fence()
            moved = source.to(self._device, non_blocking=True)
            index = torch.from_numpy(ids[skip:].copy()).to(self._device, non_blocking=True)
            for run in self._runs.of(layer_lo, layer_hi, len(ids)):
                of_run = moved[run.part].view(self._layers[0].dtype).view(run.shape)
                for layer, blocks in zip(self._layers[run.layer_lo : run.layer_hi], of_run, strict=True):
                    layer.index_copy_(0, index, blocks[skip:])
            self._finish()

    def copy(self, source: Ids, target: Ids) -> None:
        """Copy blocks ``source`` of every layer over blocks ``target``, on the caller's stream."""
        source_index = torch.from_numpy(source).to(self._device, non_blocking=True)
        target_index = torch.from_numpy(target).to(self._device, non_blocking=True)
        for layer in self._layers:
            layer.index_copy_(0, target_index, layer.index_select(0, source_index))

    def _wait_fence(self) -> None:
        if self._fence is not None:
            self._stream.wait_event(self._fence)

    def _pinned_bytes(self, num_bytes: int) -> torch.Tensor:
        if self._pinned.numel() < num_bytes:
            self._pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[:num_bytes]

    def _finish(self) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        event.synchronize()
