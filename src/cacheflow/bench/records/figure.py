"""Records of the redrawn figures, in virtual time."""

from __future__ import annotations

from typing import Any

import msgspec

from cacheflow.bench.records.base import BenchRecord, Seconds, Share
from cacheflow.errors import ConfigError

PROBABILITIES = (0.01, 0.05, *(step / 10 for step in range(1, 10)), 0.95, 0.99)
"""At which a figure's distribution is kept."""
ROUNDING = 1e-6
"""Relative; sums of the same costs in another order may differ by less."""


class FigureRecord(BenchRecord, frozen=True, kw_only=True):
    """One point of a figure: what came of one policy at one setting, in virtual time.

    Attributes:
        series: The line or bar it belongs to.
        num_layers: Layers of the model, each a block of its own: no layers were merged.
        num_tokens: Tokens of the prefix; the mean over requests.
        suffix_tokens: New tokens after it; the mean over requests.
        rate_per_s: Arrivals a second; 0 where all requests come at once.
        ttft_s: Time to first token from arrival; the mean over requests. Of a restoration alone, its time.
        restore_s: Time to the last prefix cell from arrival; the mean over requests.
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
    ttft_s: Seconds
    restore_s: Seconds
    bound_ttft_s: Seconds
    bound_restore_s: Seconds
    p99_ttft_s: Seconds | None = None
    bound_p99_ttft_s: Seconds | None = None
    compute_busy: Share | None = None
    io_busy: Share | None = None
    slo_s: float = 0.0
    in_time: Share | None = None
    goodput_per_s: float | None = None
    bound_goodput_per_s: float | None = None
    ttft_quantiles_s: tuple[float, ...] = ()
    bound_quantiles_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no run can give.

        Raises:
            ConfigError: A time is below its bound by more than rounding, or a distribution has another length than
                ``PROBABILITIES``; or see ``BenchRecord``.
        """
        super().__post_init__()
        for key in ("ttft_s", "restore_s", "p99_ttft_s"):
            time_s, bound_s = getattr(self, key), getattr(self, f"bound_{key}")
            if time_s is not None and bound_s is not None and time_s < bound_s * (1 - ROUNDING):
                raise ConfigError(f"{self.suite} {self.series}: {key} {time_s} is below its bound {bound_s}")
        for key in ("ttft_quantiles_s", "bound_quantiles_s"):
            values = getattr(self, key)
            if values and len(values) != len(PROBABILITIES):
                raise ConfigError(f"{self.suite} {self.series}: {key} has {len(values)} values")

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
        defaults = {field.name: field.default for field in msgspec.structs.fields(self)}
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value != defaults[name]}
        values = {name: _short(value) for name, value in given.items()}
        return msgspec.json.format(msgspec.json.encode(values), indent=0).decode()


def _short(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_short(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
