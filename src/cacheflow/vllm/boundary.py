"""Boundary hidden states: what a later pipeline stage was handed, kept per token until a chunk is complete and saved.

vLLM hands a stage ``hidden_states`` and ``residual`` of the whole batch, and the stage's layers overwrite both. So they
are copied out right before the forward, the rows of each request from where the runner's batch has them. On a device
those copies are looked at later, when a chunk is saved or the next step begins: nobody waits for them.

Shapes: ``n`` rows of a batch, ``C`` hidden_size. An object's payload is ``[2, tokens of the chunk, C]``: hidden states,
then residual.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cacheflow.stores.base import PutRequest
from cacheflow.tensors.row_copy import Bytes, TakeRows, row_copies
from cacheflow.vllm.batch_rows import batch_rows
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.model_access import ModelHandle
from cacheflow.vllm.object_keys import boundary_key
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.step import CaptureOrder, SaveOrder

logger = logging.getLogger(__name__)

MAX_CAPTURED_BYTES = 256 << 20
"""Of chunks that are not complete; the longest untouched are forgotten beyond it: their stages will load them."""


def boundary_token_bytes(handle: ModelHandle) -> int:
    """Bytes of one token's boundary states at this stage's entry; 0 on the first stage."""
    return 0 if handle.is_first_stage else 2 * handle.hidden_size * handle.dtype.itemsize


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


@dataclass(slots=True, eq=False)
class _Chunk:
    """States of one chunk's leading tokens, up to ``filled``."""

    payload: Bytes
    filled: int = 0


class BoundaryCapture:
    """Copies boundary states out before each forward of a later stage. Worker's main thread only.

    A forward is looked at once after ``expect``: recomputation goes through the same model. One that does not go
    through the model's Python code (a replayed CUDA graph of a whole decode batch) is not seen, and counted as missed.
    """

    def __init__(self, handle: ModelHandle, *, chunk_tokens: int, counts: Counts) -> None:
        """Look at every forward of the runner's model from now on, until ``close``.

        Raises:
            ConfigError: vLLM's runner does not tell whose rows are whose.
        """
        self._handle, self._chunk_tokens, self._counts = handle, chunk_tokens, counts
        self._row_bytes = handle.hidden_size * handle.dtype.itemsize
        self._expected: tuple[CaptureOrder, ...] = ()
        self._chunks: OrderedDict[tuple[str, int], _Chunk] = OrderedDict()
        self._copies = row_copies(handle.device)
        self._under_way: list[tuple[CaptureOrder, TakeRows]] = []
        self._batch_rows = batch_rows(handle.runner, handle.runner_kind)
        self._hook = handle.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def expect(self, orders: Sequence[CaptureOrder]) -> None:
        """Of the next forward, keep these requests' rows; call before every forward."""
        self._settle()
        self.forward_ended()
        self._expected = tuple(orders)

    def forward_ended(self) -> None:
        """Look at no forward before the next ``expect``."""
        if self._expected:
            self._counts.boundaries["missed"] += len(self._expected)
            self._expected = ()

    def _before_forward(self, _: Any, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        expected, self._expected = self._expected, ()
        received = kwargs.get("intermediate_tensors")
        if not expected or received is None:
            return
        try:
            self._capture(expected, received, kwargs["positions"])
        except Exception:  # what is not captured is loaded later; the forward must go on
            logger.exception("boundary states could not be captured")

    def _capture(self, expected: Sequence[CaptureOrder], received: Any, positions: torch.Tensor) -> None:  # noqa: ANN401
        rows = self._batch_rows.of_batch()
        for order in expected:
            first, last = rows.get(order.request_id, (0, 0))
            if first == last:
                self._counts.boundaries["missed"] += 1
                continue
            states = (received["hidden_states"][first:last], received["residual"][first:last])
            position = positions[first : first + 1].to(torch.int64)
            self._under_way.append((order, self._copies.copy_out(*states, position)))
        if self._copies.immediate:
            self._settle()

    def _settle(self) -> None:
        """Sort what was copied out into chunks."""
        under_way, self._under_way = self._under_way, []
        for order, take in under_way:
            try:
                hidden, residual, position = take()
            except RuntimeError:  # the device failed: the engine will say so
                logger.exception("boundary states could not be copied to the host")
                self._counts.boundaries["missed"] += 1
                continue
            # The batch says where a request's rows are, positions prove it: a mistake costs a boundary, never truth.
            start = int(position.view(np.int64)[0, 0])
            low, high = order.start - start, order.end - start
            if low < 0 or high > min(len(hidden), len(residual)):
                self._counts.boundaries["missed"] += 1
                continue
            self._keep(order, hidden[low:high], residual[low:high])

    def _keep(self, order: CaptureOrder, hidden: Bytes, residual: Bytes) -> None:
        size = self._chunk_tokens
        for chunk in range(order.start // size, -(-order.end // size)):
            low, high = max(order.start, chunk * size), min(order.end, (chunk + 1) * size)
            kept = self._chunk(order.request_id, chunk)
            at, end = low - chunk * size, high - chunk * size
            if at > kept.filled:
                continue  # tokens before these were not seen: they came from the prefix cache
            rows = slice(low - order.start, high - order.start)
            kept.payload[0, at:end] = hidden[rows]
            kept.payload[1, at:end] = residual[rows]
            kept.filled = end

    def _chunk(self, request_id: str, chunk: int) -> _Chunk:
        name = (request_id, chunk)
        kept = self._chunks.get(name)
        if kept is None:
            shape = (2, self._chunk_tokens, self._row_bytes)
            kept = self._chunks[name] = _Chunk(np.empty(shape, dtype=np.uint8))
            while len(self._chunks) > 1 and len(self._chunks) * kept.payload.nbytes > MAX_CAPTURED_BYTES:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(name)
        return kept

    def put(self, order: SaveOrder) -> Iterator[PutRequest]:
        """The object of a chunk that is complete, to be saved with its KV; nothing when a token of it was not seen."""
        self._settle()
        kept = self._chunks.pop((order.request_id, order.chunk), None)
        if kept is None or kept.filled < self._chunk_tokens:
            self._counts.boundaries["incomplete"] += 1
            return
        self._counts.boundaries["captured"] += 1
        handle = self._handle
        key = boundary_key(order.namespace, order.chain_hash, layer=handle.start_layer, tp_size=handle.shard.tp_size)
        shape = (2, self._chunk_tokens, handle.hidden_size)
        dtype = str(handle.dtype).removeprefix("torch.")
        yield PutRequest(key, [kept.payload.reshape(-1)], shape=shape, dtype=dtype)

    def forget(self, request_ids: set[str]) -> None:
        """Drop what is kept of requests that ended."""
        if not request_ids:
            return
        self._settle()
        for name in [name for name in self._chunks if name[0] in request_ids]:
            del self._chunks[name]

    def close(self) -> None:
        """Look at no further forward."""
        self._hook.remove()
        self._batch_rows.close()
        self._under_way.clear()
        self._chunks.clear()
