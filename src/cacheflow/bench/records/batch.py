"""Records of batches of concurrent restorations."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from cacheflow.bench.records.base import Above0, Name, RunRecord, Share
from cacheflow.errors import ConfigError


class BatchRequestRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request of a batch; seconds count from its arrival, and ``arrival_s`` from the batch's first."""

    num_tokens: int
    suffix_tokens: int
    arrival_s: float
    ttft_s: float
    restore_s: float
    deadline_s: float
    recomputed_cells: int
    loaded_cells: int

    @property
    def in_time(self) -> bool:
        """Whether the first token came by its deadline."""
        return self.ttft_s <= self.deadline_s


class BatchTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A batch in numbers.

    Attributes:
        p99_ttft_s: Its 99th percentile, as an observed value; the greatest of fewer than 100 requests.
        makespan_s: From the first arrival to the last first token.
        ttft_s: Of each request, in the order of the record's requests.
    """

    mean_ttft_s: float
    p99_ttft_s: float
    makespan_s: float
    ttft_s: tuple[float, ...]

    @classmethod
    def of(cls, arrivals_s: Sequence[float], ttft_s: Sequence[float]) -> BatchTimes:
        """From each request's arrival and time to first token."""
        ends_s = [arrival + ttft for arrival, ttft in zip(arrivals_s, ttft_s, strict=True)]
        return cls(
            mean_ttft_s=sum(ttft_s) / len(ttft_s),
            p99_ttft_s=float(np.quantile(np.array(ttft_s), 0.99, method="inverted_cdf")),
            makespan_s=max(ends_s) - min(arrivals_s),
            ttft_s=tuple(ttft_s),
        )


class BatchRecord(RunRecord, frozen=True, kw_only=True):
    """One batch of concurrent restorations under one policy.

    Attributes:
        order: Indices into ``lengths`` in the order of arrival.
        starvation_s: Bound on waiting that the scheduler was given; None for none.
        slo_factor: Deadlines, in times of what a request needs alone; None in records that do not know it.
        compute_busy: Share of the time until all prefixes were restored in which compute worked.
        io_busy: Share of it in which the link moved bytes.
        bound_makespan_s: The least possible ``makespan_s`` by the costs of this run; see ``batch_bound``.
        bound_mean_ttft_s: The least possible ``mean_ttft_s``, likewise: a relaxation to one machine that serves the
            shortest remaining request first.
        starvation_kept: Whether nobody waited longer than ``starvation_s`` and then for those that came before it; None
            without a bound.
        compute_drift: Seconds that a calibrated compute second took in this run; simulation and bounds count with it.
    """

    suite: Name = "batch"
    lengths: tuple[int, ...]
    load_compute_ratio: Above0
    link_bytes_per_s: Above0
    order: tuple[int, ...]
    arrival_gap_s: float
    seed: int
    starvation_s: float | None
    mean_ttft_s: Above0
    p99_ttft_s: Above0
    makespan_s: Above0
    compute_busy: Share
    io_busy: Share
    bound_makespan_s: Above0
    bound_mean_ttft_s: Above0
    starvation_kept: bool | None
    compute_drift: Above0
    requests: tuple[BatchRequestRecord, ...]
    simulated: BatchTimes
    slo_factor: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no run can have.

        Raises:
            ConfigError: The run was not checked, the requests do not fit the lengths; or see ``BenchRecord``.
        """
        super().__post_init__()
        if not isinstance(self.correct, bool):
            raise ConfigError(f"a record cannot hold a time without a check: correct is {self.correct!r}")
        if sorted(self.order) != list(range(len(self.lengths))):
            raise ConfigError(
                f"record field order is {self.order}, must name each of {len(self.lengths)} requests once"
            )
        arrived = [self.lengths[index] for index in self.order]
        if [each.num_tokens for each in self.requests] != arrived:
            raise ConfigError(f"record field requests does not hold requests of {arrived} tokens, in this order")
        if len(self.simulated.ttft_s) != len(self.requests):
            raise ConfigError(f"record: {len(self.simulated.ttft_s)} requests were simulated, {len(self.requests)} ran")

    @property
    def num_late(self) -> int:
        """Requests whose first token came after its deadline."""
        return sum(not each.in_time for each in self.requests)
