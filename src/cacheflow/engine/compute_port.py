"""The compute side of a restoration on one device: recomputes cells, runs the new tokens, yields the last logits.

Provides ``restore.ports.ComputePort`` by structure. One port serves one restoration. Shapes: ``n`` tokens of a chunk,
``C`` hidden_size, ``V`` vocabulary.

Recurrent layers: prefix chunks move states of the port's own along; what they are after the last chunk goes into the
buffer's checkpoint, where a load puts the same. The new tokens start from the checkpoint and move other states along.

On CUDA every call returns once its kernels are queued, and the device waits for the cells that were placed before it;
``record`` tells the caller how far the device has come. Nothing synchronises the whole device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.kv_buffer import ChunkCache, KVBuffer
from cacheflow.engine.runner import LayerRunner, Rope
from cacheflow.engine.running_states import RunningStates
from cacheflow.errors import ConfigError
from cacheflow.plan.grid import Grid, Tile
from cacheflow.tensors.streams import StreamEvent


class _ChunkState:
    """Activations of a chunk: ``hidden [1, n, C]`` below block ``next_block``; None once they are spent."""

    __slots__ = ("cache", "hidden", "next_block", "rope")

    def __init__(self, hidden: torch.Tensor, cache: ChunkCache, rope: Rope) -> None:
        self.hidden: torch.Tensor | None = hidden
        self.cache = cache
        self.rope = rope
        self.next_block = 0


class EngineComputePort:
    """Recomputes prefix cells and runs the suffix, on the thread (and CUDA stream) that calls.

    Attributes:
        logits: ``[V]`` float32 on the CPU, of the last token; None before ``finish`` or without a suffix.
        end_states: States of recurrent layers after the new tokens, once those have run; None without such layers.
    """

    def __init__(
        self,
        runner: LayerRunner,
        *,
        grid: Grid,
        tokens: Sequence[int],
        kv: KVBuffer,
        layers_per_block: int = 1,
    ) -> None:
        """Prepare to restore ``grid`` over ``tokens`` (prefix, then suffix) into ``kv``.

        Raises:
            ConfigError: The grid does not fit the model, the tokens or the buffer; or it restores recurrent layers from
                a token other than the first.
            PromptError: A token id is outside the vocabulary, or there are too many tokens.
        """
        num_tokens = grid.num_tokens + grid.suffix_tokens
        if num_tokens != len(tokens) or num_tokens > kv.capacity:
            raise ConfigError(
                f"grid spans {grid.num_tokens} + {grid.suffix_tokens} tokens; the prompt has {len(tokens)}, "
                f"the KV buffer holds {kv.capacity}"
            )
        self.logits: torch.Tensor | None = None
        self._runner = runner
        self._grid = grid
        self._geometry = CellGeometry(grid=grid, shape=runner.model.shape, layers_per_block=layers_per_block)
        self._kv = kv
        self._running_states = runner.new_states() if grid.num_chunks else None
        self._passed_B = [0] * grid.num_blocks
        self.end_states = runner.new_states() if grid.suffix_ends else None
        if self._running_states is not None and grid.start:
            raise ConfigError(
                f"a prefix of {runner.model.name} is restored from token {grid.start}; recurrent layers are restored "
                "from their first token only"
            )
        self._ids = runner.token_tensor(tokens)
        self._chunks: dict[int, _ChunkState] = {}
        self._suffix: list[_ChunkState] = []
        self._suffix_block = 0

    def recompute(self, tile: Tile, *, kv_only_top: bool) -> None:
        """See ``ComputePort.recompute``.

        Raises:
            ValueError: The tile is wider than a chunk or does not continue the chunk's activations, or a running state
                is not that of the chunks before (a caller's bug).
        """
        state = self._chunks.get(tile.chunk_lo)
        expected = state.next_block if state else 0
        if tile.chunk_hi - tile.chunk_lo != 1 or tile.block_lo != expected:
            raise ValueError(f"{tile} does not continue chunk {tile.chunk_lo} at block {expected}")
        if state is None:
            token_range = self._grid.chunk_range(tile.chunk_lo)
            state = self._chunks[tile.chunk_lo] = self._begin(*token_range, self._running_states)
        self._pass(tile)
        self._see_placed()
        self._advance(state, tile.block_lo, tile.block_hi, kv_only_top=kv_only_top)
        if tile.block_hi == self._grid.num_blocks:
            state.hidden = None  # nothing runs above the top block of a prefix chunk
        if self._running_states is not None and tile.chunk_hi == self._grid.num_chunks:
            self._checkpoint.copy_from(self._running_states, self._layers(tile.block_lo, tile.block_hi))

    def _pass(self, tile: Tile) -> None:
        """Note that running states move past a chunk; chunk 0 starts them over."""
        if self._running_states is None:
            return
        for block in range(tile.block_lo, tile.block_hi):
            if tile.chunk_lo not in (0, self._passed_B[block]):
                raise ValueError(f"{tile}: the state of block {block} is at chunk {self._passed_B[block]}")
            self._passed_B[block] = tile.chunk_hi

    def restart(self, chunk: int) -> None:
        """Forget the activations of a chunk, so that it can be recomputed from block 0."""
        self._chunks.pop(chunk, None)

    def run_suffix(self, block_lo: int, block_hi: int) -> None:
        """See ``ComputePort.run_suffix``; within a block the chunks run one after another.

        Raises:
            ValueError: ``block_lo`` is not where the last call ended (a caller's bug).
        """
        if block_lo != self._suffix_block:
            raise ValueError(f"suffix stands below block {self._suffix_block}, asked for [{block_lo}, {block_hi})")
        if block_lo == 0:
            ranges = map(self._grid.suffix_range, range(len(self._grid.suffix_ends)))
            self._suffix = [self._begin(*token_range, self.end_states) for token_range in ranges]
        self._see_placed()
        for block in range(block_lo, block_hi):
            if self.end_states is not None:
                self.end_states.copy_from(self._checkpoint, self._geometry.layers(block))
            for state in self._suffix:
                self._advance(state, block, block + 1, kv_only_top=self._is_spent(state, block))
        self._suffix_block = block_hi

    def finish(self) -> None:
        """See ``ComputePort.finish``; sets ``logits``.

        Raises:
            ValueError: The suffix has not run through every block (a caller's bug).
        """
        if self._grid.suffix_ends:
            last = self._suffix[-1].hidden if self._suffix_block == self._grid.num_blocks else None
            if last is None:
                raise ValueError(f"suffix stands below block {self._suffix_block} of {self._grid.num_blocks}")
            self.logits = self._runner.logits(last)
        elif self._kv.lane is not None:
            self._kv.lane.settle()
        self._chunks.clear()
        self._suffix.clear()

    def record(self) -> StreamEvent | None:
        """See ``QueueingPort.record``; None on the CPU."""
        lane = self._kv.lane
        return None if lane is None else lane.streams.current().record(timed=True)

    def keep_states(self) -> None:
        """Make the buffer's checkpoint that at the end of the new tokens, from which later ones go on."""
        if self.end_states is not None:
            self._checkpoint.copy_from(self.end_states)

    @property
    def _checkpoint(self) -> RunningStates:
        assert self._kv.checkpoint is not None, "the buffer of a model with recurrent layers has a checkpoint"
        return self._kv.checkpoint

    def _begin(self, token_lo: int, token_hi: int, states: RunningStates | None) -> _ChunkState:
        hidden = self._runner.embed(self._ids[:, token_lo:token_hi])
        cache = ChunkCache(self._kv, token_lo, token_hi, states)
        return _ChunkState(hidden, cache, self._runner.rope(token_lo, token_hi))

    def _layers(self, block_lo: int, block_hi: int) -> tuple[int, int]:
        return self._geometry.layers(block_lo)[0], self._geometry.layers(block_hi - 1)[1]

    def _advance(self, state: _ChunkState, block_lo: int, block_hi: int, *, kv_only_top: bool) -> None:
        if state.hidden is None:
            raise ValueError(f"activations below block {block_lo} are spent; restart the chunk first")
        layers = self._layers(block_lo, block_hi)
        state.hidden = self._runner.run(state.hidden, state.cache, state.rope, layers=layers, kv_only_top=kv_only_top)
        state.next_block = block_hi

    def _is_spent(self, state: _ChunkState, block: int) -> bool:
        """Above the top layer only the last chunk's last token goes on: the others need keys and values alone."""
        return block == self._grid.num_blocks - 1 and state is not self._suffix[-1]

    def _see_placed(self) -> None:
        """Have the device wait for the cells that were placed so far."""
        if self._kv.lane is not None:
            self._kv.lane.before_compute()
