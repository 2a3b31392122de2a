"""A prefilled tiny model and ways to restore it, for the engine's tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.random_models import tiny_model
from cacheflow.engine.runner import LayerRunner
from cacheflow.plan.grid import Cell, Grid, Tile

WINDOWED = {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1}


@dataclass(frozen=True)
class Case:
    runner: LayerRunner
    tokens: list[int]
    geometry: CellGeometry
    saved: KVBuffer
    logits: torch.Tensor

    @property
    def grid(self) -> Grid:
        return self.geometry.grid

    def new_port(self, kv: KVBuffer, *, runner: LayerRunner | None = None, **arguments) -> EngineComputePort:
        return EngineComputePort(
            runner or self.runner, grid=self.grid, tokens=self.tokens, kv=kv,
            layers_per_block=self.geometry.layers_per_block, **arguments,
        )  # fmt: skip

    def copy_cell(self, kv: KVBuffer, chunk: int, block: int) -> None:
        cell = self.geometry.extent(Cell(chunk, block))
        kv.cell(*cell).copy_(self.saved.cell(*cell))


@lru_cache(maxsize=64)
def prefilled(
    family: str,
    dtype: str,
    *,
    windowed: bool = False,
    chunk_ends: tuple[int, ...] = (40, 57, 90, 96),
    suffix_ends: tuple[int, ...] = (120, 131),
    layers_per_block: int = 1,
    device: str = "cpu",
    num_layers: int = 3,
) -> Case:
    overrides = {**(WINDOWED if windowed else {}), "num_hidden_layers": num_layers}
    model = tiny_model(family, dtype=dtype, device=device, **overrides)
    runner = LayerRunner(model)
    ends = (*chunk_ends, *suffix_ends)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.shape.vocab_size, (ends[-1],), generator=generator).tolist()
    saved = runner.new_kv(ends[-1] + 16)
    logits = runner.prefill(tokens, ends, saved)
    num_blocks = -(-num_layers // layers_per_block)
    grid = Grid(chunk_ends=chunk_ends, suffix_ends=suffix_ends, num_blocks=num_blocks)
    geometry = CellGeometry(grid=grid, shape=model.shape, layers_per_block=layers_per_block)
    return Case(runner, tokens, geometry, saved, logits)


def restore(case: Case, levels: list[int], *, kv_only_top: bool = True) -> tuple[KVBuffer, EngineComputePort]:
    """Recompute ``levels[k]`` blocks of chunk ``k`` one by one, copy the rest, run the suffix."""
    kv = case.runner.new_kv(case.saved.capacity)
    port = case.new_port(kv)
    for chunk, level in enumerate(levels):
        for block in range(level):
            port.recompute(Tile(chunk, chunk + 1, block, block + 1), kv_only_top=kv_only_top and block == level - 1)
        for block in range(level, case.grid.num_blocks):
            case.copy_cell(kv, chunk, block)
    port.run_suffix(0, case.grid.num_blocks)
    port.finish()
    return kv, port


def same_kv(case: Case, kv: KVBuffer) -> bool:
    """Every token of prefix and suffix, bit for bit."""
    n = len(case.tokens)
    return torch.equal(kv.kv_L2THD[:, :, :n], case.saved.kv_L2THD[:, :, :n])
