"""One point of a figure as one line of ``results.jsonl``; pictures and tables read only that file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cacheflow.bench.results_file import read_lines
from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json

PROBABILITIES = (0.01, 0.05, *(step / 10 for step in range(1, 10)), 0.95, 0.99)
"""At which a distribution is kept."""
ROUNDING = 1e-6
"""Relative; sums of the same costs in another order may differ by less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureRecord:
    """What came of one policy at one setting, in virtual time.

    Attributes:
        suite: ``figure-`` and its number.
        series: The line or bar it belongs to.
        policy: Restore policy.
        model: Name of the model.
        gpu: Name of the GPU.
        cost_source: Where costs come from.
        link_bytes_per_s: Bandwidth of the link.
        chunk_tokens: Tokens of a chunk.
        num_layers: Layers of the model, each a block of its own: no layers were merged.
        num_tokens: Tokens of the prefix; the mean over requests.
        suffix_tokens: New tokens behind it; the mean over requests.
        load_compute_ratio: Time to load everything over time to recompute everything.
        workload: What was asked for.
        batch_policy: Order of requests.
        num_requests: Requests that count.
        num_stages: GPUs in a pipeline.
        rate_per_s: Arrivals a second; 0 where all requests come at once.
        ttft_s: Time to first token from arrival; the mean over requests. Of a restoration alone, its time.
        restore_s: Time to the last prefix cell from arrival; the mean over requests.
        p99_ttft_s: 99th percentile; None for one request.
        bound_ttft_s: The least possible ``ttft_s``.
        bound_restore_s: The least possible ``restore_s``.
        bound_p99_ttft_s: That of what each request could have had alone, below any 99th percentile.
        compute_busy: Share of the time with a request in the system in which compute worked.
        io_busy: Share of it in which the link moved bytes.
        slo_s: Limit for the time to first token; 0 where requests have limits of their own, or none.
        in_time: Share of requests with a first token by their deadline; None without deadlines.
        goodput_per_s: Such requests a second; None without deadlines.
        bound_goodput_per_s: The greatest possible; None without deadlines.
        ttft_quantiles_s: At ``PROBABILITIES``; empty for one request.
        bound_quantiles_s: The same of what each request could have had alone.
    """

    suite: str
    series: str
    policy: str
    model: str
    gpu: str
    cost_source: str
    link_bytes_per_s: float
    chunk_tokens: int
    num_layers: int
    num_tokens: float
    suffix_tokens: float
    load_compute_ratio: float
    workload: str
    batch_policy: str = "fcfs"
    num_requests: int = 1
    num_stages: int = 1
    rate_per_s: float = 0.0
    ttft_s: float
    restore_s: float
    bound_ttft_s: float
    bound_restore_s: float
    p99_ttft_s: float | None = None
    bound_p99_ttft_s: float | None = None
    compute_busy: float | None = None
    io_busy: float | None = None
    slo_s: float = 0.0
    in_time: float | None = None
    goodput_per_s: float | None = None
    bound_goodput_per_s: float | None = None
    ttft_quantiles_s: tuple[float, ...] = ()
    bound_quantiles_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no run can give.

        Raises:
            ConfigError: A time is not finite and above 0, or below its bound by more than rounding; a share is outside
                0 to 1; a distribution has another length than ``PROBABILITIES``.
        """
        for key in ("ttft_s", "restore_s", "p99_ttft_s"):
            time_s, bound_s = getattr(self, key), getattr(self, f"bound_{key}")
            if time_s is None and bound_s is None:
                continue
            if not (math.isfinite(time_s) and time_s >= 0 and bound_s >= 0):
                raise ConfigError(f"{self.suite} {self.series}: {key} is {time_s} with bound {bound_s}")
            if time_s < bound_s * (1 - ROUNDING):
                raise ConfigError(f"{self.suite} {self.series}: {key} {time_s} is below its bound {bound_s}")
        for key in ("compute_busy", "io_busy", "in_time"):
            share = getattr(self, key)
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"{self.suite} {self.series}: {key} is {share}, must be between 0 and 1")
        for key in ("ttft_quantiles_s", "bound_quantiles_s"):
            values = tuple(getattr(self, key))
            if values and len(values) != len(PROBABILITIES):
                raise ConfigError(f"{self.suite} {self.series}: {key} has {len(values)} values")
            object.__setattr__(self, key, values)

    @property
    def link_gbps(self) -> float:
        """The link in Gbit/s."""
        return self.link_bytes_per_s * 8 / 1e9

    @property
    def ttft_over_bound(self) -> float:
        """How many times the least possible time to first token it took."""
        return self.ttft_s / self.bound_ttft_s

    @property
    def restore_over_bound(self) -> float:
        """How many times the least possible restoration time it took."""
        return self.restore_s / self.bound_restore_s

    @property
    def case(self) -> tuple[Any, ...]:
        """What must be equal for two policies to be compared; how finely they cut the prefix is their own affair."""
        return (
            self.suite, self.model, self.gpu, round(self.link_bytes_per_s), self.num_tokens, self.suffix_tokens,
            self.workload, self.num_requests, self.num_stages, self.rate_per_s, self.slo_s,
        )  # fmt: skip

    def to_json(self) -> str:
        """One line; what is as by default is left out, numbers are kept to seven digits."""
        values = {key: _short(value) for key, value in asdict(self).items()}
        optional = {each.name: each.default for each in fields(self) if each.default is not MISSING}
        return json.dumps(
            {key: value for key, value in values.items() if key not in optional or value != _short(optional[key])}
        )

    @classmethod
    def from_json(cls, line: str) -> FigureRecord:
        """Read one line back.

        Raises:
            ConfigError: It is no JSON object, lacks a field, has an unknown one, or holds an impossible value.
        """
        values = parse_json(line)
        needed = {each.name: each.default is MISSING for each in fields(cls)}
        if not isinstance(values, dict) or values.keys() - needed.keys():
            strange = sorted(values.keys() - needed.keys()) if isinstance(values, dict) else type(values).__name__
            raise ConfigError(f"no record of a figure, but of something else: {strange}")
        if missing := [name for name, is_needed in needed.items() if is_needed and name not in values]:
            raise ConfigError(f"no record of a figure: {', '.join(missing)} missing")
        try:
            return cls(**values)
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"no record of a figure: {error}") from error


def write_records(path: Path, records: Sequence[FigureRecord]) -> None:
    """Write a results file, replacing what was there.

    Raises:
        OSError: The file cannot be written.
    """
    part = path.with_suffix(".part")
    part.write_text("".join(f"{record.to_json()}\n" for record in records), encoding="utf-8")
    part.replace(path)


def read_records(path: Path) -> list[FigureRecord]:
    """Every record of a results file, in order.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed; the message names the line.
    """
    return read_lines(path, FigureRecord.from_json)


def _short(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_short(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
