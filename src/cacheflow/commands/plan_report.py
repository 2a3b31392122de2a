"""What ``cacheflow plan`` shows: every policy against the bound, the guard's choice, and the split as a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.table import Table
from rich.text import Text

from cacheflow.bench.table import Row, over, seconds, size, text_table
from cacheflow.bench.timeline import Timeline
from cacheflow.model_shape import ModelShape
from cacheflow.plan.bound import Bound
from cacheflow.plan.problem import RestoreProblem
from cacheflow.sim.rehearsal import Rehearsal

MAX_GRID_ROWS = 16
MAX_GRID_COLUMNS = 64
RECOMPUTED, LOADED, MIXED = "█", "░", "▒"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """One restoration predicted under several policies.

    Attributes:
        row_lengths: Layers of each row of the grid, bottom first.
    """

    title: str
    problem: RestoreProblem
    bound: Bound
    rehearsals: tuple[Rehearsal, ...]
    chosen: str
    row_lengths: tuple[int, ...]

    @property
    def shown(self) -> Rehearsal:
        """The rehearsal of the chosen policy."""
        return next(r for r in self.rehearsals if r.plan.policy == self.chosen)

    def timelines(self) -> list[Timeline]:
        """What compute and the link do under every policy."""
        grid = self.problem.grid
        return [
            Timeline(
                label=rehearsal.plan.policy,
                spans=rehearsal.spans,
                num_chunks=grid.num_chunks,
                num_blocks=grid.num_blocks,
                restore_s=rehearsal.restore_s,
                ttft_s=rehearsal.ttft_s if grid.suffix_tokens > 0 else None,
                bound_s=self.bound.ttft_s,
            )
            for rehearsal in self.rehearsals
        ]


def prediction_table(report: PlanReport) -> Table:
    """Predicted times of every policy, also over the bound."""
    least = report.bound
    rows: list[Row] = []
    for each in report.rehearsals:
        cells = (
            each.plan.policy,
            seconds(each.restore_s),
            over(each.restore_s, least.restore_s),
            seconds(each.ttft_s),
            over(each.ttft_s, least.ttft_s),
            f"{each.recomputed_share:.0%}",
            size(each.loaded_bytes),
        )
        rows.append((cells, "bold" if each.plan.policy == report.chosen else None))
    heads = ("policy", "restore", "× bound", "TTFT", "× bound", "recomputed", "loaded")
    last = ("lower bound", seconds(least.restore_s), "1.00", seconds(least.ttft_s), "1.00")
    return text_table(report.title, heads, rows, last=last, padding=1)


def guard_line(report: PlanReport) -> str:
    """What the guard of the chosen policy settled on, and why."""
    guard = report.shown.plan.guard
    if guard is None:
        return f"{report.chosen} has no guard."
    return f"Guard: {guard.reason}"


def checkpoint_line(shape: ModelShape) -> str:
    """What a hybrid model restores besides keys and values."""
    as_tokens = shape.checkpoint_bytes / shape.kv_bytes_per_token
    layers = " or ".join(str(each) for each in sorted(set(shape.row_lengths)))
    return (
        f"Rows of {layers} layers, one of them attention. The checkpoint, the states of the others at the "
        f"end of the prefix, takes {size(shape.checkpoint_bytes)}, as much as keys and values of {as_tokens:,.0f} "
        "tokens; a row recomputed to the end needs none."
    )


def split_grid(report: PlanReport) -> Text:
    """How each cell is restored: chunks from left to right, layers from bottom to top; large grids are scaled down."""
    cells_KB = report.shown.cells_KB
    num_chunks, num_blocks = len(cells_KB), len(cells_KB[0])
    columns = _ranges(num_chunks, MAX_GRID_COLUMNS)
    rows = _ranges(num_blocks, MAX_GRID_ROWS)
    text = Text()
    for block_lo, block_hi in reversed(rows):
        text.append(f"layer {sum(report.row_lengths[:block_lo]):>3} ", style="dim")
        for chunk_lo, chunk_hi in columns:
            letters = Counter("".join(cells_KB[chunk][block_lo:block_hi] for chunk in range(chunk_lo, chunk_hi)))
            text.append(*_mark(letters))
        text.append("\n")
    last = f"chunk {num_chunks - 1}"
    text.append("          chunk 0" + last.rjust(len(columns) - len("chunk 0")) + "\n", style="dim")
    text.append(f"          {RECOMPUTED} recomputed   {LOADED} loaded   {MIXED} both", style="dim")
    return text


def _mark(letters: Counter[str]) -> tuple[str, str]:
    if letters["c"] == letters.total():
        return RECOMPUTED, "dark_orange3"
    return (LOADED, "dodger_blue2") if letters["c"] == 0 else (MIXED, "magenta")


def _ranges(count: int, at_most: int) -> Sequence[tuple[int, int]]:
    """Cut ``range(count)`` into at most ``at_most`` runs whose lengths differ by one or less."""
    pieces = min(count, at_most)
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return list(pairwise(edges))
