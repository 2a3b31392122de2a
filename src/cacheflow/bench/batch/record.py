"""One batch of concurrent restorations under one policy: timed, checked, simulated; one line of a results file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from cacheflow.bench.record import Environment
from cacheflow.bench.results_file import append_line, read_lines
from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json

SUITE = "batch"

_TIMES = ("mean_ttft_s", "p99_ttft_s", "makespan_s", "bound_makespan_s", "bound_mean_ttft_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request of a batch; seconds count from its arrival.

    Attributes:
        num_tokens: Tokens of its prefix.
        suffix_tokens: New tokens behind it.
        arrival_s: When it came, from the first arrival of the batch.
        ttft_s: To its first token.
        restore_s: To its last prefix cell.
        deadline_s: Until which its first token should have been there.
        recomputed_cells: Cells restored by compute.
        loaded_cells: Cells restored by the link.
    """

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


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTimes:
    """A batch in numbers.

    Attributes:
        mean_ttft_s: Mean time from arrival to first token.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """One batch under one policy.

    Attributes:
        suite: Name of the study.
        policy: Name of the contender, see ``batch_policies``.
        model: Name of the model or shape.
        fingerprint: Of its weights; two of one name are told apart by it. Empty in records that do not know it.
        device: Kind of device that computed.
        dtype: KV and weight dtype.
        lengths: Prefix tokens of the requests, as asked for.
        suffix_tokens: New tokens behind each.
        chunk_tokens: Tokens of a full chunk.
        num_layers: Decoder layers.
        order: Indices into ``lengths`` in the order of arrival.
        arrival_gap_s: Seconds between arrivals; 0 for all together.
        load_compute_ratio: Time to load all prefixes over the time to recompute them, as the study set it.
        link_bytes_per_s: Bandwidth of the link.
        repeat: Alternation; policies of one repeat ran side by side in the same order of arrival.
        seed: Of the orders of arrival.
        starvation_s: Bound on waiting that the scheduler was given; None for none.
        slo_factor: Deadlines, in times of what a request needs alone; None in records that do not know it.
        mean_ttft_s: Mean time from arrival to first token.
        p99_ttft_s: See ``BatchTimes``.
        makespan_s: From the first arrival to the last first token.
        compute_busy: Share of the time until all prefixes were restored in which compute worked.
        io_busy: Share of it in which the link moved bytes.
        bound_makespan_s: The least possible ``makespan_s`` by the costs of this run; see ``batch_bound``.
        bound_mean_ttft_s: The least possible ``mean_ttft_s``, likewise: a relaxation to one machine that serves the
            shortest remaining request first.
        starvation_kept: Whether nobody waited longer than ``starvation_s`` and then for those that came before it; None
            without a bound.
        compute_drift: Seconds that a calibrated compute second took in this run; simulation and bounds count with it.
        correct: Whether keys, values and first-token logits of every request equalled the reference.
        requests: In the order of arrival.
        simulated: The same batch on the simulated device.
        environment: Where it ran.
    """

    suite: str = SUITE
    policy: str
    model: str
    device: str
    dtype: str
    lengths: tuple[int, ...]
    suffix_tokens: int
    chunk_tokens: int
    num_layers: int
    order: tuple[int, ...]
    arrival_gap_s: float
    load_compute_ratio: float
    link_bytes_per_s: float
    repeat: int
    seed: int
    starvation_s: float | None
    mean_ttft_s: float
    p99_ttft_s: float
    makespan_s: float
    compute_busy: float
    io_busy: float
    bound_makespan_s: float
    bound_mean_ttft_s: float
    starvation_kept: bool | None
    compute_drift: float
    correct: bool
    requests: tuple[RequestRecord, ...]
    simulated: BatchTimes
    environment: Environment
    fingerprint: str = ""
    slo_factor: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no run can have.

        Raises:
            ConfigError: A time is not above 0, a share is outside 0 to 1, or the requests do not fit the lengths.
        """
        for key in (*_TIMES, "link_bytes_per_s", "load_compute_ratio", "compute_drift"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"record field {key} is {value!r}, must be above 0 and finite")
        for key in ("compute_busy", "io_busy"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"record field {key} is {getattr(self, key)!r}, must be between 0 and 1")
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
            raise ConfigError(f"{len(self.simulated.ttft_s)} requests were simulated, {len(self.requests)} ran")

    @property
    def num_late(self) -> int:
        """Requests whose first token came after its deadline."""
        return sum(not each.in_time for each in self.requests)

    def to_json(self) -> str:
        """One line, without the newline."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> BatchRecord:
        """Read one line back.

        Raises:
            ConfigError: The line is no JSON object, lacks a field, has an unknown one, or holds an impossible value.
        """
        values = parse_json(line)
        if not isinstance(values, dict):
            raise ConfigError(f"a record is a JSON object, not {type(values).__name__}")
        if unknown := sorted(values.keys() - {each.name for each in fields(cls)}):
            raise ConfigError(f"unknown fields {unknown}")
        try:
            values["requests"] = tuple(RequestRecord(**each) for each in values["requests"])
            simulated = dict(values["simulated"])
            values["simulated"] = BatchTimes(**{**simulated, "ttft_s": tuple(simulated["ttft_s"])})
            for key in ("lengths", "order"):
                values[key] = tuple(values[key])
            return cls(**values)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"malformed record: {error}") from error


def append_batch_record(path: Path, record: BatchRecord) -> None:
    """Append one record in one write, so that runs may share the file and a crash leaves whole lines.

    Raises:
        ConfigError: The folder does not exist or the file cannot be written.
    """
    append_line(path, record.to_json())


def read_batch_records(path: Path) -> list[BatchRecord]:
    """Every record of a results file, in the order they were written; blank lines are skipped.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed; the message names the line.
    """
    return read_lines(path, BatchRecord.from_json)
