"""The compute side of a restoration inside vLLM: recomputes cells with the worker's own model.

Provides ``restore.ports.ComputePort`` by structure, for one restoration. Shapes: ``n`` tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cacheflow.plan.grid import Tile, block_layers
from cacheflow.restore.work import RestoreTarget
from cacheflow.tensors.streams import StreamEvent
from cacheflow.vllm.adapters import Adapter
from cacheflow.vllm.models.boundary_states import States
from cacheflow.vllm.models.layers import Carry
from cacheflow.vllm.models.partial_forward import PartialForward, Segment
from cacheflow.vllm.worker.checkpoint import Checkpoint
from cacheflow.vllm.worker.stage_link import StageLink


@dataclass(slots=True)
class _ClimbingChunk:
    """A chunk on its way up.

    Attributes:
        segment: Its tokens.
        next_block: The block that it is at.
        carry: What the block below ``next_block`` returned; None at the bottom, and where it is gone.
        handed_over: What a whole pass of a compiled stage returned for the next stage.
    """

    segment: Segment
    next_block: int = 0
    carry: Carry | None = None
    handed_over: States | None = None

    @property
    def spent(self) -> bool:
        """Whether nothing can run above, and nothing be handed over."""
        return self.next_block > 0 and self.carry is None and self.handed_over is None


class VllmComputePort:
    """Recomputes cells of one restoration; on the worker's main thread only.

    A compiled engine is bit-exact only in whole passes: there the grid has one block, all layers of the stage.
    """

    def __init__(
        self,
        forward: PartialForward,
        target: RestoreTarget,
        *,
        link: StageLink | None = None,
        adapter: Adapter | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Serve ``target``; nothing runs yet.

        Args:
            forward: The worker's model.
            target: What is restored.
            link: To the neighbouring stages, where activations are handed over.
            adapter: The request's LoRA adapter.
            checkpoint: Takes the running states that are read; None of a model without recurrent layers.

        Raises:
            ValueError: This model cannot be recomputed with, the engine is compiled and the target's blocks are not
                the whole stage, or chunks do not end on block boundaries (a caller's bug).
        """
        handle = forward.handle
        if not handle.can_recompute:
            raise ValueError(f"this model cannot be recomputed with: {handle.refusal}")
        if handle.compiled and target.layers_per_block < handle.num_layers:
            raise ValueError(
                f"a compiled engine recomputes whole passes: blocks of {target.layers_per_block} layers do not hold "
                f"this stage's {handle.num_layers}"
            )
        if any(position % handle.block_size for position in (target.start, *target.chunk_ends)):
            raise ValueError(f"chunks {target.start}, {target.chunk_ends} do not end on blocks of {handle.block_size}")
        self._forward, self._link, self._adapter, self._checkpoint = forward, link, adapter, checkpoint
        self._target = target
        self._num_layers = handle.num_layers
        self._num_blocks = -(-handle.num_layers // target.layers_per_block)
        self._chunks: dict[int, _ClimbingChunk] = {}
        self._boundary: dict[int, States] = {}

    def recompute(self, tile: Tile, *, kv_only_top: bool) -> None:
        """See ``ComputePort.recompute``.

        Raises:
            ValueError: The tile is wider than a chunk or does not continue the chunk's activations, or a later
                pipeline stage has no boundary states for it (a caller's bug).
        """
        state = self._chunks.get(tile.chunk_lo)
        expected = state.next_block if state else 0
        if tile.chunk_hi - tile.chunk_lo != 1 or tile.block_lo != expected or tile.block_hi > self._num_blocks:
            raise ValueError(f"{tile} does not continue chunk {tile.chunk_lo} at block {expected}")
        if self._forward.handle.compiled:
            self._run_whole(tile.chunk_lo)
            return
        if state is None:
            state = self._chunks[tile.chunk_lo] = _ClimbingChunk(self._segment(tile.chunk_lo))
        if state.spent:
            raise ValueError(f"activations of chunk {tile.chunk_lo} below block {tile.block_lo} are spent; restart it")
        # At the top of the last stage, and where nothing is handed over, nobody needs what comes out above.
        at_top = tile.block_hi == self._num_blocks and not (self._link and self._link.has_stage_above)
        self._climb(state, tile, kv_only_top=kv_only_top or at_top)

    def restart(self, chunk: int) -> None:
        """Forget the activations of a chunk, so that it can be recomputed from block 0."""
        self._chunks.pop(chunk, None)

    def give(self, chunk: int, packed: torch.Tensor, skip_tokens: int) -> StreamEvent | None:
        """Copy a chunk's boundary states in, as they are stored; the first ``skip_tokens`` are not the target's.

        On the I/O thread, before the chunk is recomputed; see ``BoundaryReads.give``.
        """
        start, end = self._target.chunk_range(chunk)
        handle, lane, copied = self._forward.handle, self._forward.lane, None
        num_tokens = end - start + skip_tokens
        if lane is None:
            states = handle.boundary.unpack(packed, num_tokens=num_tokens, device=handle.device)
        else:
            brought, copied = lane.upload_new(packed)
            states = handle.boundary.views(brought, num_tokens=num_tokens)
        self.seed(chunk, {name: each[skip_tokens:] for name, each in states.items()})
        return copied

    def seed(self, chunk: int, states: States) -> None:
        """Give a chunk's boundary states, the input of a later pipeline stage's first layer.

        Raises:
            ValueError: They have another shape or dtype than the model says.
        """
        start, end = self._target.chunk_range(chunk)
        self._forward.handle.boundary.require(states, num_tokens=end - start)
        self._boundary[chunk] = states

    def receive(self, chunk: int) -> None:
        """See ``HandOverPort.receive``.

        Raises:
            RuntimeError: The stage below could not recompute the chunk, or did not answer in time.
        """
        assert self._link is not None, "hand-overs are asked for only where stages are linked"
        start, end = self._target.chunk_range(chunk)
        received = self._link.receive(restore_id=self._target.restore_id, chunk=chunk, num_tokens=end - start)
        if received is None:
            raise RuntimeError(f"the pipeline stage below could not recompute chunk {chunk}")
        self._boundary[chunk] = received

    def send(self, chunk: int, *, failed: bool) -> None:
        """See ``HandOverPort.send``."""
        assert self._link is not None, "hand-overs are asked for only where stages are linked"
        start, end = self._target.chunk_range(chunk)
        state = self._chunks.get(chunk)
        out = None if failed or state is None or state.spent else self._handed_over(state)
        self._link.send(out, restore_id=self._target.restore_id, chunk=chunk, num_tokens=end - start)
        if state is not None:
            state.carry = state.handed_over = None

    def _handed_over(self, state: _ClimbingChunk) -> States:
        """What the stage above is handed: a compiled stage has returned it, an eager one is asked for it."""
        if state.handed_over is not None:
            return state.handed_over
        assert state.carry is not None, "of a chunk that is not spent"
        return self._forward.hand_over(state.segment, state.carry)

    def record(self) -> StreamEvent | None:
        """See ``QueueingPort.record``; None on the CPU."""
        return self._forward.record()

    def run_suffix(self, block_lo: int, block_hi: int) -> None:
        """Never called: vLLM computes the new tokens itself.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"vLLM runs the suffix itself, asked for blocks [{block_lo}, {block_hi})")

    def finish(self) -> None:
        """Free what this restoration holds; running states that were read are written, on CUDA after its last tile."""
        self._chunks.clear()
        self._boundary.clear()
        if self._checkpoint is not None:
            self._checkpoint.write()

    def _run_whole(self, chunk: int) -> None:
        segment = self._segment(chunk)
        out = self._forward.run_whole(segment)
        self._chunks[chunk] = _ClimbingChunk(segment, self._num_blocks, handed_over=None if self._link is None else out)

    def _climb(self, state: _ClimbingChunk, tile: Tile, *, kv_only_top: bool) -> None:
        layers = (
            block_layers(tile.block_lo, self._target.layers_per_block, self._num_layers)[0],
            block_layers(tile.block_hi - 1, self._target.layers_per_block, self._num_layers)[1],
        )
        state.carry = self._forward.run(state.segment, state.carry, layers=layers, kv_only_top=kv_only_top)
        state.next_block = tile.block_hi

    def _fresh(self, given: States) -> States:
        """A copy, on CUDA once what was uploaded has arrived there."""
        lane = self._forward.lane
        if lane is not None:
            lane.before_compute()
            for states in given.values():
                lane.streams.share(states, lane.streams.current())
        return {name: states.clone() for name, states in given.items()}

    def _segment(self, chunk: int) -> Segment:
        """A chunk, with a fresh copy of its boundary states on a later stage: layers overwrite them."""
        start, end = self._target.chunk_range(chunk)
        tokens = self._target.tokens[start - self._target.start : end - self._target.start]
        boundary = None
        if not self._forward.handle.is_first_stage:
            if chunk not in self._boundary:
                raise ValueError(f"chunk {chunk} has no boundary states; a later pipeline stage starts from them")
            boundary = self._fresh(self._boundary[chunk])
        return self._forward.segment(
            start,
            tokens,
            self._target.block_ids,
            boundary,
            state_blocks=self._target.state_blocks,
            next_token=self._target.token_after(chunk),
            adapter=self._adapter,
        )


class NoComputePort:
    """The compute side of an engine that only loads: nobody asks it to compute."""

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        """``checkpoint`` takes the running states that are read; None of a model without recurrent layers."""
        self._checkpoint = checkpoint

    def recompute(self, tile: Tile, *, kv_only_top: bool) -> None:
        """Never called.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"an engine that only loads was asked to recompute {tile}, keys only: {kv_only_top}")

    def restart(self, chunk: int) -> None:
        """Nothing to forget."""

    def run_suffix(self, block_lo: int, block_hi: int) -> None:
        """Never called: vLLM runs the new tokens."""
        raise ValueError(f"an engine that only loads was asked to run blocks [{block_lo}, {block_hi})")

    def finish(self) -> None:
        """Write the running states that were read."""
        if self._checkpoint is not None:
            self._checkpoint.write()
