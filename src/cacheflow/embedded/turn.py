"""One prompt of a conversation, as far as it is known before a token of it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.plan.grid import Grid
from cacheflow.plan.report import RestoreReport
from cacheflow.stores.prefix_index import PrefixMatch
from cacheflow.types import LoadOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A checked prompt and where its keys and values can come from.

    Attributes:
        started_s: When it was asked for, on ``time.perf_counter``.
        prompt: The conversation and the new tokens.
        max_new_tokens: Longest answer.
        resident_ends: Boundaries of what is in memory.
        match: What the store has; empty when something is in memory.
        grid: Every chunk of the prompt: those known as the prefix, the others as the suffix.
    """

    started_s: float
    prompt: list[int]
    max_new_tokens: int
    resident_ends: tuple[int, ...]
    match: PrefixMatch
    grid: Grid

    @property
    def num_tokens(self) -> int:
        """Tokens of keys and values that the turn needs room for."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def resident_tokens(self) -> int:
        """Tokens whose keys and values are in memory."""
        return self.resident_ends[-1] if self.resident_ends else 0

    @property
    def known_ends(self) -> tuple[int, ...]:
        """Boundaries of the prefix that need not be computed from nothing."""
        return self.grid.chunk_ends

    @property
    def restore_grid(self) -> Grid:
        """What is to be done: the match and the new chunks, behind what is resident."""
        if self.match.chunk_ends:
            return self.grid
        return Grid(
            chunk_ends=(),
            num_blocks=self.grid.num_blocks,
            suffix_ends=self.grid.suffix_ends,
            start=self.resident_tokens,
        )


def first_unsaved(turn: Turn, report: RestoreReport | None) -> int:
    """First chunk to write after a turn: the first new one, or all when the store lost or damaged a cell."""
    damaged = report is not None and {LoadOutcome.MISS.value, LoadOutcome.CORRUPT.value} & report.failed_loads.keys()
    return 0 if damaged else len(turn.known_ends)
