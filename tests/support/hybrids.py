"""Restoration problems of hybrid models, and a witness of what their recurrent layers allow."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.state.board import RESIDENT, CellState
from cacheflow.state.compute_side import ComputeClaim
from cacheflow.state.restoration import RestoreState

ROW_TOKEN_BYTES, ROW_STATE_BYTES = 2048, 6_438_912
"""Of Qwen3.6-35B-A3B: two heads of 256 in one of four layers, and the states of the other three."""


def hybrid_problem(
    *,
    num_tokens: int = 4224,
    suffix_tokens: int = 0,
    chunk_tokens: int = 1056,
    num_rows: int = 10,
    tokens_per_s: float = 20_000.0,
    kv_only_share: float = 0.8,
    growth: float = 0.0,
    bytes_per_s: float = 2e9,
) -> RestoreProblem:
    """Equal rows that recompute so many tokens a second; a row for keys and values only still runs its lower layers.

    Args:
        num_tokens: Of the prefix.
        suffix_tokens: New ones.
        chunk_tokens: Of a chunk.
        num_rows: Blocks, each recurrent.
        tokens_per_s: At the start of the prefix.
        kv_only_share: What keys and values alone cost of a row.
        growth: By how much of the first each further chunk costs more.
        bytes_per_s: Of the link.
    """
    grid = Grid.regular(
        num_tokens=num_tokens, chunk_tokens=chunk_tokens, num_blocks=num_rows, suffix_tokens=suffix_tokens
    )
    tokens_K = np.array([hi - lo for lo, hi in map(grid.chunk_range, range(grid.num_chunks))])
    row_K = tokens_K / tokens_per_s / num_rows * (1.0 + growth * np.arange(grid.num_chunks))
    bytes_KB = np.repeat((tokens_K * ROW_TOKEN_BYTES)[:, None], num_rows, axis=1)
    bytes_KB[-1] += ROW_STATE_BYTES
    return RestoreProblem(
        grid=grid,
        compute_KB=np.repeat(row_K[:, None], num_rows, axis=1),
        kv_only_KB=np.repeat(kv_only_share * row_K[:, None], num_rows, axis=1),
        load_bytes_KB=bytes_KB,
        link=LinkCost(bytes_per_s=bytes_per_s),
        suffix_B=np.full(num_rows, suffix_tokens / tokens_per_s / num_rows),
        head_s=0.002 if suffix_tokens else 0.0,
        recurrent_B=np.ones(num_rows, dtype=bool),
    )


def random_hybrid(rng: np.random.Generator) -> RestoreProblem:
    """Few or many chunks and rows, a checkpoint of few or most of the bytes, any ratio, with a suffix or not."""
    problem = hybrid_problem(
        num_tokens=int(rng.integers(1, 16)) * 1056 + int(rng.choice([0, 0, 528])),
        suffix_tokens=int(rng.choice([0, 0, 64, 1056])),
        num_rows=int(rng.integers(1, 12)),
        tokens_per_s=10.0 ** rng.uniform(3, 5),
        kv_only_share=float(rng.uniform(0.5, 0.95)),
        growth=float(rng.choice([0.0, 0.02, 0.1])),
    )
    bytes_KB = problem.load_bytes_KB.copy()
    bytes_KB[-1] -= int(ROW_STATE_BYTES * rng.choice([0.0, 0.9]))
    ratio = 10.0 ** rng.uniform(-1, 1)
    link = LinkCost(bytes_per_s=float(bytes_KB.sum()) / (ratio * float(problem.compute_KB.sum())))
    return replace(problem, load_bytes_KB=bytes_KB, link=link)


@dataclass
class Witness:
    """Notes every claim a transformer with recurrent rows could not carry out; a check of ``Conditions``.

    Attributes:
        broken: What was wrong, one text a claim.
        num_claims: Claims seen.
    """

    problem: RestoreProblem
    broken: list[str] = field(default_factory=list)
    num_claims: int = 0
    _climbed: dict[int, int | None] = field(default_factory=dict)
    _passed: dict[int, int] = field(default_factory=dict)

    def __call__(self, state: RestoreState, claim: ComputeClaim) -> None:
        """See a claim."""
        self.num_claims += 1
        if claim.tile is None:
            return
        tile = claim.tile
        for chunk in range(tile.chunk_lo, tile.chunk_hi):
            height = 0 if claim.restart else self._climbed.get(chunk, 0)
            if height != tile.block_lo:
                self.broken.append(f"{claim}: activations stand at {height}")
            self._climbed[chunk] = None if claim.kv_only_top else tile.block_hi
            for block in range(tile.block_lo, tile.block_hi):
                if chunk not in (0, self._passed.get(block, 0)):
                    self.broken.append(f"{claim}: the state of row {block} is at {self._passed.get(block, 0)}")
                self._passed[block] = chunk + 1
                before = [state.board.state(head, block) for head in range(tile.chunk_lo)]
                if not all(each in RESIDENT for each in before):
                    self.broken.append(f"{claim}: row {block} lacks keys and values before it")

    def lacks_end_states(self, state: RestoreState) -> list[int]:
        """Rows whose state at the end of the prefix was neither loaded nor recomputed."""
        last = self.problem.grid.num_chunks - 1
        return [
            block
            for block in range(self.problem.grid.num_blocks)
            if state.board.state(last, block) is not CellState.LOADED and self._passed.get(block) != last + 1
        ]
