"""What was ordered of several ranks and which of them reported it: a thing is done once every rank has done it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cacheflow.restore.work import ComputeReport, ComputeWork, LoadReport
from cacheflow.types import LoadOutcome

CellIndex = tuple[int, int]


@dataclass(frozen=True, slots=True)
class DoneCompute:
    """A compute order that every rank has carried out; times of the rank that took longest, on its own clock."""

    order: ComputeWork
    predicted_s: float
    actual_s: float
    end_s: float


@dataclass(slots=True)
class _Ordered:
    order: ComputeWork
    predicted_s: float
    taken_by_rank: dict[int, tuple[float, float]] = field(default_factory=dict)


class ComputeLedger:
    """Compute orders in the order given. Reports may come late, twice, or rank by rank."""

    def __init__(self, num_ranks: int) -> None:
        """Nothing was ordered yet."""
        self._num_ranks = num_ranks
        self._orders: list[_Ordered] = []
        self._num_done = 0

    def add(self, order: ComputeWork, predicted_s: float) -> None:
        """Note an order that goes out to every rank."""
        self._orders.append(_Ordered(order, predicted_s))

    def take(self, rank: int, report: ComputeReport) -> list[DoneCompute]:
        """Note what a rank did; returns the orders that are done now on all of them, in order."""
        end_s = report.end_s
        for index in range(len(report.seconds) - 1, -1, -1):
            position = report.first + index
            if position < len(self._orders):
                self._orders[position].taken_by_rank.setdefault(rank, (report.seconds[index], end_s))
            end_s -= report.seconds[index]
        done = []
        while self._num_done < len(self._orders):
            ordered = self._orders[self._num_done]
            if len(ordered.taken_by_rank) < self._num_ranks:
                break
            actual_s, end_s = max(ordered.taken_by_rank.values())
            done.append(DoneCompute(ordered.order, ordered.predicted_s, actual_s, end_s))
            self._num_done += 1
        return done

    @property
    def under_way(self) -> bool:
        """Whether not every rank has carried out every order, as far as reports tell."""
        return self._num_done < len(self._orders)

    def cells_under_way(self) -> Iterator[CellIndex]:
        """Cells of orders that not every rank has carried out, as far as reports tell."""
        for ordered in self._orders[self._num_done :]:
            yield from ordered.order.tile.cells()


class ReadLedger:
    """Reads that were ordered and not settled yet; a read is settled by its first failure or by all ranks."""

    def __init__(self, num_ranks: int) -> None:
        """Nothing was ordered yet."""
        self._num_ranks = num_ranks
        self._by_rank: dict[CellIndex, dict[int, LoadReport]] = {}
        self._dropped: set[CellIndex] = set()

    def __len__(self) -> int:
        """Reads under way that were not dropped."""
        return len(self._by_rank) - len(self._dropped)

    @property
    def wanted(self) -> list[CellIndex]:
        """Cells whose reads are under way and were not dropped, in the order they were ordered."""
        return [cell for cell in self._by_rank if cell not in self._dropped]

    def add(self, cell: CellIndex) -> None:
        """Note a read that goes out to every rank; a cell is read once."""
        self._by_rank[cell] = {}

    def drop(self, cell: CellIndex) -> bool:
        """Note that a cell's read is to be dropped; False when there is none, or it was dropped before."""
        if cell not in self._by_rank or cell in self._dropped:
            return False
        self._dropped.add(cell)
        return True

    def take(self, rank: int, report: LoadReport) -> list[LoadReport] | None:
        """Note how a read ended on a rank; the reports so far once that settles it, None otherwise.

        Settled by a failure, the last report is the failure and other ranks may still be reading.
        """
        cell = (report.chunk, report.block)
        by_rank = self._by_rank.get(cell)
        if by_rank is None or rank in by_rank:
            return None
        by_rank[rank] = report
        ended = report.outcome is LoadOutcome.OK or (report.outcome is LoadOutcome.CANCELLED and cell in self._dropped)
        if ended and len(by_rank) < self._num_ranks:
            return None
        del self._by_rank[cell]
        self._dropped.discard(cell)
        return list(by_rank.values())
