"""What several ranks were given to do and which of them reported it: a thing is done once every rank has done it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cacheflow.plan.grid import Cell, Piece
from cacheflow.restore.work import ComputeReport, ComputeWork, LoadReport
from cacheflow.types import LoadOutcome


@dataclass(frozen=True, slots=True)
class DoneCompute:
    """Compute work that every rank has carried out; times of the rank that took longest, on its own clock."""

    work: ComputeWork
    predicted_s: float
    actual_s: float
    end_s: float


@dataclass(slots=True)
class _GivenWork:
    work: ComputeWork
    predicted_s: float
    taken_by_rank: dict[int, tuple[float, float]] = field(default_factory=dict)


class ComputeLedger:
    """Compute work in the sequence it was given. Reports may come late, twice, or rank by rank."""

    def __init__(self, num_ranks: int) -> None:
        """Nothing was given yet."""
        self._num_ranks = num_ranks
        self._given: list[_GivenWork] = []
        self._num_done = 0

    def add(self, work: ComputeWork, predicted_s: float) -> None:
        """Note work that goes out to every rank."""
        self._given.append(_GivenWork(work, predicted_s))

    def take(self, rank: int, report: ComputeReport) -> list[DoneCompute]:
        """Note what a rank did; returns the work that is done now on all of them, in its sequence."""
        end_s = report.end_s
        for index in range(len(report.seconds) - 1, -1, -1):
            position = report.first + index
            if position < len(self._given):
                self._given[position].taken_by_rank.setdefault(rank, (report.seconds[index], end_s))
            end_s -= report.seconds[index]
        done = []
        while self._num_done < len(self._given):
            given = self._given[self._num_done]
            if len(given.taken_by_rank) < self._num_ranks:
                break
            actual_s, end_s = max(given.taken_by_rank.values())
            done.append(DoneCompute(given.work, given.predicted_s, actual_s, end_s))
            self._num_done += 1
        return done

    @property
    def under_way(self) -> bool:
        """Whether not every rank has done all work, as far as reports tell."""
        return self._num_done < len(self._given)

    def cells_under_way(self) -> Iterator[Cell]:
        """Cells of work that not every rank has done, as far as reports tell."""
        for given in self._given[self._num_done :]:
            yield from given.work.tile.cells()


class ReadLedger:
    """Reads that were asked for and not settled yet; a read is settled by its first failure or by all ranks."""

    def __init__(self, num_ranks: int) -> None:
        """Nothing was asked for yet."""
        self._num_ranks = num_ranks
        self._by_rank: dict[Piece, dict[int, LoadReport]] = {}
        self._dropped: set[Piece] = set()

    def __len__(self) -> int:
        """Reads under way that were not dropped."""
        return len(self._by_rank) - len(self._dropped)

    @property
    def wanted(self) -> list[Piece]:
        """What is being read and was not dropped, first asked for first."""
        return [piece for piece in self._by_rank if piece not in self._dropped]

    def add(self, piece: Piece) -> None:
        """Note a read that goes out to every rank; a piece is read once."""
        self._by_rank[piece] = {}

    def drop(self, piece: Piece) -> bool:
        """Note that a read is to be dropped; False when there is none, or it was dropped before."""
        if piece not in self._by_rank or piece in self._dropped:
            return False
        self._dropped.add(piece)
        return True

    def take(self, rank: int, report: LoadReport) -> list[LoadReport] | None:
        """Note how a read ended on a rank; the reports so far once that settles it, None otherwise.

        Settled by a failure, the last report is the failure and other ranks may still be reading.
        """
        piece = report.piece
        by_rank = self._by_rank.get(piece)
        if by_rank is None or rank in by_rank:
            return None
        by_rank[rank] = report
        ended = report.outcome is LoadOutcome.OK or (report.outcome is LoadOutcome.CANCELLED and piece in self._dropped)
        if ended and len(by_rank) < self._num_ranks:
            return None
        del self._by_rank[piece]
        self._dropped.discard(piece)
        return list(by_rank.values())
