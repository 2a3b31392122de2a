"""A prefilled tiny hybrid and ways to restore it, for the engine's tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.random_models import tiny_model
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.running_states import RunningStates
from cacheflow.plan.grid import Cell, Grid, Tile

FAMILY = "qwen3_5_text"
NUM_ROWS = 3
CHUNK_ENDS = (64, 192, 256, 320)
SUFFIX_ENDS = (384, 397)


@dataclass(frozen=True)
class HybridCase:
    """A prefix and new tokens, all prefilled; ``states`` by token at which a chunk ends."""

    runner: LayerRunner
    tokens: list[int]
    geometry: CellGeometry
    saved: KVBuffer
    logits: torch.Tensor
    states: dict[int, RunningStates] = field(repr=False)

    @property
    def grid(self) -> Grid:
        return self.geometry.grid

    @property
    def num_blocks(self) -> int:
        return self.grid.num_blocks

    def new_kv(self) -> KVBuffer:
        return self.runner.new_kv(self.saved.capacity)

    def new_port(self, kv: KVBuffer) -> EngineComputePort:
        return EngineComputePort(
            self.runner, grid=self.grid, tokens=self.tokens, kv=kv, layers_per_block=self.geometry.layers_per_block
        )

    def load(self, kv: KVBuffer, chunk: int, block: int) -> None:
        """As a read does: keys and values, and in the last chunk the checkpoint."""
        cell = Cell(chunk, block)
        extent = self.geometry.extent(cell)
        kv.cell(*extent).copy_(self.saved.cell(*extent))
        if self.geometry.state_bytes(cell):
            payload = self.states[self.grid.num_tokens].payload(extent[:2])
            assert kv.checkpoint is not None
            kv.checkpoint.write_payload(payload, extent[:2])

    def finish(self, kv: KVBuffer, port: EngineComputePort) -> None:
        port.run_suffix(0, self.num_blocks)
        port.finish()
        port.keep_states()

    def is_exact(self, kv: KVBuffer, port: EngineComputePort) -> bool:
        """Keys, values, states and logits, bit for bit."""
        n = len(self.tokens)
        same_kv = torch.equal(kv.kv_L2THD[:, :, :n], self.saved.kv_L2THD[:, :, :n])
        assert kv.checkpoint is not None
        assert port.logits is not None
        return same_kv and kv.checkpoint.equals(self.states[n]) and torch.equal(port.logits, self.logits)

    def decoded(self, kv: KVBuffer, num_tokens: int = 12) -> list[int]:
        """Greedy tokens after the prompt, from the buffer and its checkpoint."""
        assert kv.checkpoint is not None
        tokens, states, position = [int(self.logits.argmax())], kv.checkpoint.clone(), len(self.tokens)
        for index in range(num_tokens - 1):
            logits = self.runner.decode_step(tokens[-1], position + index, kv, states)
            tokens.append(int(logits.argmax()))
        return tokens


@lru_cache(maxsize=16)
def hybrid_case(
    dtype: str = "bfloat16",
    *,
    chunk_ends: tuple[int, ...] = CHUNK_ENDS,
    suffix_ends: tuple[int, ...] = SUFFIX_ENDS,
    rows_per_block: int = 1,
    num_rows: int = NUM_ROWS,
) -> HybridCase:
    model = tiny_model(FAMILY, dtype=dtype, num_hidden_layers=4 * num_rows)
    runner = LayerRunner(model)
    ends = (*chunk_ends, *suffix_ends)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.shape.vocab_size, (ends[-1],), generator=generator).tolist()
    saved, states = runner.new_kv(ends[-1] + 32), {}

    def keep(end: int) -> None:
        assert saved.checkpoint is not None
        states[end] = saved.checkpoint.clone()

    logits = runner.prefill(tokens, ends, saved, on_chunk=keep)
    grid = Grid(chunk_ends=chunk_ends, suffix_ends=suffix_ends, num_blocks=-(-num_rows // rows_per_block))
    geometry = CellGeometry(grid=grid, shape=model.shape, layers_per_block=4 * rows_per_block)
    return HybridCase(runner, tokens, geometry, saved, logits, states)


def restore_hybrid(
    case: HybridCase, levels: list[int], *, kv_only_top: bool = True
) -> tuple[KVBuffer, EngineComputePort]:
    """Recompute ``levels[k]`` blocks of chunk ``k`` one by one, load the rest, run the new tokens."""
    kv = case.new_kv()
    port = case.new_port(kv)
    for chunk, level in enumerate(levels):
        for block in range(level):
            port.recompute(Tile(chunk, chunk + 1, block, block + 1), kv_only_top=kv_only_top and block == level - 1)
        for block in range(level, case.num_blocks):
            case.load(kv, chunk, block)
    case.finish(kv, port)
    return kv, port
