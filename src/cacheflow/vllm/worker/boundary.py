"""Boundary states: what a later pipeline stage receives, kept per token until a chunk is complete and saved.

vLLM hands a stage the states of the whole batch, and the stage's layers overwrite them. So they are copied out right
before the forward, the rows of each request from where the runner's batch has them. On a device those copies are
looked at when they have arrived; what a chunk that is saved still lacks is waited for by the thread that writes it.

Shapes: ``n`` rows of a batch. An object's payload is one part of the states (``models/boundary_states.py``) after the
other, each of all the chunk's tokens.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from cacheflow.stores.base import PutRequest
from cacheflow.stores.keys import RankKeys
from cacheflow.tensors.row_copy import RowsUnderWay, row_copies
from cacheflow.types import Bytes
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.models.model_access import ModelHandle
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.step import CaptureWork, SaveWork
from cacheflow.vllm.worker.batch_rows import BatchRows

logger = logging.getLogger(__name__)

MAX_CAPTURED_BYTES = 256 << 20
"""Of chunks that are not saved yet, or two whole batches where those are more; beyond it chunks are forgotten, and
their stages will load them."""
MAX_STEPS_UNDER_WAY = 4
"""Copies of so many forwards may be under way before one is waited for."""


def stores_boundaries(options: ConnectorOptions, handle: ModelHandle) -> bool:
    """Whether this rank's stage restores from boundary states: only where it recomputes."""
    return options.boundary_states and not handle.is_first_stage and handle.can_recompute


def make_receive_buffer(handle: ModelHandle) -> None:
    """Make the buffer in which a later stage receives its input, where vLLM has not.

    vLLM makes it in its profile run, which it leaves out for an eager model on the CPU; its first forward then fails.
    """
    runner = handle.runner
    if handle.is_first_stage or getattr(runner, "intermediate_tensors", True) is not None:
        return
    runner.intermediate_tensors = handle.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=handle.dtype, device=handle.device
    )


_Wanted = tuple[CaptureWork, int, int]
"""What is wanted of a request, and its rows ``[first, last)`` of those that a step copied."""


@dataclass(slots=True, eq=False)
class _Chunk:
    """States of one chunk's leading tokens, up to ``filled``, by part."""

    parts: list[Bytes]
    filled: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """Rows of one forward on their way to the host."""

    wanted: tuple[_Wanted, ...]
    rows: RowsUnderWay


class BoundaryCapture:
    """Copies boundary states out before each forward of a later stage. Worker's main thread only, but for a put's call.

    A forward is looked at once after ``expect``: recomputation goes through the same model. One that does not go
    through the model's Python code (a replayed CUDA graph of a whole batch) is not seen.
    """

    def __init__(self, handle: ModelHandle, *, chunk_tokens: int, batch_tokens: int, counts: Counts) -> None:
        """Look at every forward of a later stage's model from now on, until ``close``.

        Raises:
            ConfigError: vLLM's runner does not tell whose rows are whose.
        """
        self._handle, self._chunk_tokens, self._counts = handle, chunk_tokens, counts
        self._parts = handle.boundary.parts
        self._max_chunks = max(MAX_CAPTURED_BYTES // handle.boundary.token_bytes, 2 * batch_tokens) // chunk_tokens
        self._expected: tuple[CaptureWork, ...] = ()
        self._chunks: OrderedDict[tuple[str, int], _Chunk] = OrderedDict()
        self._copies = row_copies(handle.device)
        self._under_way: deque[_Step] = deque()
        self._outcomes: deque[str] = deque()
        self._batch_rows = BatchRows(handle.runner, handle.runner_kind)
        self._hook = handle.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def expect(self, captures: Sequence[CaptureWork]) -> None:
        """Of the next forward, keep these requests' rows; call before every forward."""
        self.forward_ended()
        self._settle(at_most=MAX_STEPS_UNDER_WAY)
        self._expected = tuple(captures)

    def forward_ended(self) -> None:
        """Look at no forward before the next ``expect``."""
        if self._expected:
            self._counts.boundaries["unseen"] += 1
            self._expected = ()

    def _before_forward(self, _: Any, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        expected, self._expected = self._expected, ()
        received = kwargs.get("intermediate_tensors")
        if not expected or received is None:
            return
        try:
            step = self._begin(expected, received, kwargs["positions"])
        except Exception:  # what is not captured is loaded later; the forward must go on
            logger.exception("boundary states could not be captured")
            self._counts.boundaries["missed"] += len(expected)
            return
        if step is None:
            return
        if self._copies.immediate:
            self._sort(step)
        else:
            self._under_way.append(step)

    def _begin(self, expected: Sequence[CaptureWork], received: Any, positions: torch.Tensor) -> _Step | None:  # noqa: ANN401
        """Begin to copy the rows from the first wanted to the last: one copy a step, however many requests it has."""
        batch = self._batch_rows.of_batch()
        spans = [(capture, *batch.get(capture.request_id, (0, 0))) for capture in expected]
        wanted = [(capture, first, last) for capture, first, last in spans if first < last]
        if len(wanted) < len(spans):
            self._counts.boundaries["missed"] += len(spans) - len(wanted)
        if not wanted:
            return None
        low, high = min(first for _, first, _ in wanted), max(last for _, _, last in wanted)
        states = (received[part.name][low:high] for part in self._parts)
        rows = self._copies.copy_out(*states, positions[low:high].to(torch.int64))
        return _Step(tuple((capture, first - low, last - low) for capture, first, last in wanted), rows)

    def _settle(self, *, at_most: int) -> None:
        """Sort what has arrived on the host into chunks; leave at most so many steps under way."""
        while self._under_way and (len(self._under_way) > at_most or self._under_way[0].rows.arrived()):
            self._sort(self._under_way.popleft())
        while self._outcomes:  # of any thread, counted on this one
            self._counts.boundaries[self._outcomes.popleft()] += 1

    def _sort(self, step: _Step) -> None:
        """Sort a step's rows into chunks; waits for them."""
        try:
            for capture, parts in self._rows_of(step):
                for chunk, at, own in _by_chunk(capture, parts, self._chunk_tokens):
                    self._keep((capture.request_id, chunk), at, own)
        except Exception:  # as in the hook: on a device it is only found out here
            logger.exception("boundary states could not be copied to the host")
            self._outcomes.extend("missed" for _ in step.wanted)

    def _rows_of(self, step: _Step) -> Iterator[tuple[CaptureWork, list[Bytes]]]:
        """The rows that a step copied of each capture, part by part; waits for them. Any thread."""
        *parts, positions = step.rows.take()
        for capture, first, last in step.wanted:
            # The batch says whose rows they are; that they are of the tokens wanted their positions prove.
            at = positions[first:last].view(np.int64)[:, 0]
            low, high = capture.start - int(at[0]), capture.end - int(at[0])
            if low < 0 or high > len(at) or int(at[high - 1]) != capture.end - 1:
                self._outcomes.append("missed")
            else:
                yield capture, [part[first:last][low:high] for part in parts]

    def _keep(self, name: tuple[str, int], at: int, parts: Sequence[Bytes]) -> None:
        kept = self._chunks.pop(name, None)
        if kept is None and at == 0:
            self._make_room()
        kept = self._filled(kept, at, parts)
        if kept is not None:
            self._chunks[name] = kept

    def _filled(self, kept: _Chunk | None, at: int, parts: Sequence[Bytes]) -> _Chunk | None:
        """A chunk with these rows from its token ``at`` on; None when it has a hole before them. Any thread.

        Tokens that were not seen came from the prefix cache, or were computed by a replayed graph.
        """
        if at > (0 if kept is None else kept.filled):
            return None
        if kept is None:
            kept = _Chunk([np.empty((self._chunk_tokens, part.token_bytes), dtype=np.uint8) for part in self._parts])
        end = at + len(parts[0])
        for own, part in zip(kept.parts, parts, strict=True):
            own[at:end] = part
        kept.filled = end
        return kept

    def _make_room(self) -> None:
        """Forget a chunk where there are too many: the longest untouched that is not complete, else the oldest."""
        if len(self._chunks) < max(1, self._max_chunks):
            return
        incomplete = (name for name, each in self._chunks.items() if each.filled < self._chunk_tokens)
        del self._chunks[next(incomplete, next(iter(self._chunks)))]

    def put(self, save: SaveWork) -> Callable[[], list[PutRequest]]:
        """A call, for any thread and once, that makes the object of a chunk, to be saved with its KV.

        It waits for those of the chunk's rows that are not on the host yet, and gives nothing when a token of it was
        not seen.
        """
        self._settle(at_most=len(self._under_way))
        low = save.chunk * self._chunk_tokens
        late = self._take_rows(save.request_id, low, low + self._chunk_tokens)
        return partial(self._object, save, self._chunks.pop((save.request_id, save.chunk), None), late)

    def _take_rows(self, request_id: str, low: int, high: int) -> list[_Step]:
        """What is under way of a request's tokens ``[low, high)``, step by step; it is no longer sorted into chunks."""
        taken: list[_Step] = []
        left: deque[_Step] = deque()
        for step in self._under_way:
            inside: list[_Wanted] = []
            others: list[_Wanted] = []
            for capture, first, last in step.wanted:
                if capture.request_id != request_id:
                    others.append((capture, first, last))
                    continue
                parts = ((inside, low, high), (others, capture.start, low), (others, high, capture.end))
                for into, start, end in parts:
                    cut = replace(capture, start=max(start, capture.start), end=min(end, capture.end))
                    if cut.start < cut.end:
                        into.append((cut, first, last))
            if others:
                left.append(replace(step, wanted=tuple(others)))
            if inside:
                taken.append(replace(step, wanted=tuple(inside)))
        self._under_way = left
        return taken

    def _object(self, save: SaveWork, kept: _Chunk | None, late: Sequence[_Step]) -> list[PutRequest]:
        for step in late:
            try:
                for capture, parts in self._rows_of(step):
                    kept = self._filled(kept, capture.start - save.chunk * self._chunk_tokens, parts)
            except Exception:  # as where it is sorted: the chunk's KV is written all the same
                logger.exception("boundary states could not be copied to the host")
                self._outcomes.extend("missed" for _ in step.wanted)
        if kept is None or kept.filled < self._chunk_tokens:
            self._outcomes.append("incomplete")
            return []
        self._outcomes.append("captured")
        handle = self._handle
        key = RankKeys(handle.shard, handle.start_layer).boundary(save.namespace, save.chain_hash)
        shape = (self._chunk_tokens, handle.boundary.token_bytes)
        return [PutRequest(key, [part.reshape(-1) for part in kept.parts], shape=shape, dtype="uint8")]

    def forget(self, request_ids: set[str]) -> None:
        """Drop what is kept of requests that ended."""
        if not request_ids:
            return
        self._under_way = deque(_without(step, request_ids) for step in self._under_way)
        for name in [name for name in self._chunks if name[0] in request_ids]:
            del self._chunks[name]

    def close(self) -> None:
        """Look at no further forward."""
        self._hook.remove()
        self._batch_rows.close()
        self._under_way.clear()
        self._chunks.clear()


def _without(step: _Step, request_ids: set[str]) -> _Step:
    return replace(step, wanted=tuple(each for each in step.wanted if each[0].request_id not in request_ids))


def _by_chunk(capture: CaptureWork, parts: Sequence[Bytes], size: int) -> Iterator[tuple[int, int, list[Bytes]]]:
    """Rows by the chunk that they belong to: its number, the first row's place in it, each part's rows."""
    for chunk in range(capture.start // size, -(-capture.end // size)):
        low, high = max(capture.start, chunk * size), min(capture.end, (chunk + 1) * size)
        yield chunk, low - chunk * size, [part[low - capture.start : high - capture.start] for part in parts]
