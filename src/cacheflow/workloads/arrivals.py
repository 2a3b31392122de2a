"""When requests arrive: processes, and traces laid onto them. One seed gives one sequence."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cacheflow.errors import ConfigError, TraceError
from cacheflow.workloads.request import TraceRequest


class ArrivalProcess(Protocol):
    """Arrival times without a trace."""

    def times_s(self, count: int | None, rng: np.random.Generator) -> Iterator[float]:
        """``count`` arrival times (None: without end) in order; the first is 0."""
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Arrivals that know nothing of each other: gaps are exponential with mean ``1 / rate_per_s``."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _positive("Poisson.rate_per_s", self.rate_per_s)

    def times_s(self, count: int | None, rng: np.random.Generator) -> Iterator[float]:
        """See ``ArrivalProcess``."""
        now_s = 0.0
        for _ in _positions(count):
            yield now_s
            now_s += float(rng.exponential(1 / self.rate_per_s))


@dataclass(frozen=True, slots=True)
class Uniform:
    """Arrivals at equal distances of ``1 / rate_per_s``."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _positive("Uniform.rate_per_s", self.rate_per_s)

    def times_s(self, count: int | None, rng: np.random.Generator) -> Iterator[float]:
        """See ``ArrivalProcess``; ``rng`` is not used."""
        del rng
        for position in _positions(count):
            # Not a running sum: its rounding error would grow with the trace.
            yield position / self.rate_per_s


@dataclass(frozen=True, slots=True)
class Bursts:
    """``burst_size`` arrivals at once; bursts are Poisson, at a rate that makes ``rate_per_s`` arrivals on average."""

    rate_per_s: float
    burst_size: int

    def __post_init__(self) -> None:
        _positive("Bursts.rate_per_s", self.rate_per_s)
        if self.burst_size < 1:
            raise ConfigError(f"Bursts.burst_size {self.burst_size} must be 1 or more")

    def times_s(self, count: int | None, rng: np.random.Generator) -> Iterator[float]:
        """See ``ArrivalProcess``."""
        bursts = Poisson(self.rate_per_s / self.burst_size).times_s(None, rng)
        arrivals = (now_s for now_s in bursts for _ in range(self.burst_size))
        return itertools.islice(arrivals, count)


@dataclass(frozen=True, slots=True)
class TraceTiming:
    """The trace's own times, stretched: 0.5 is twice the load, 2 is half of it. Pauses inside sessions stretch too."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive("TraceTiming.scale", self.scale)


def retime(
    requests: Iterable[TraceRequest], arrivals: ArrivalProcess | TraceTiming, seed: int
) -> Iterator[TraceRequest]:
    """The same requests at other times, in order of arrival.

    With a process, sessions start when it says (a request without a session is one of its own) and later turns keep
    their distance from the session's first. Sessions interleave anew, so the whole trace is read before the first
    request comes, and ``request_id`` and ``after`` are renumbered. With ``TraceTiming`` requests stream through.

    Args:
        requests: In trace order; of a session's turns the first has ``after`` None.
        arrivals: The process, or ``TraceTiming``.
        seed: Of the process.

    Raises:
        TraceError: A turn comes before the one it follows.
    """
    if isinstance(arrivals, TraceTiming):
        return (_stretched(request, arrivals.scale) for request in requests)
    return _started_anew(requests, arrivals, np.random.Generator(np.random.PCG64(seed)))


def _stretched(request: TraceRequest, scale: float) -> TraceRequest:
    return dataclasses.replace(request, arrival_s=request.arrival_s * scale, delay_s=request.delay_s * scale)


def _started_anew(
    requests: Iterable[TraceRequest], arrivals: ArrivalProcess, rng: np.random.Generator
) -> Iterator[TraceRequest]:
    starts_s = arrivals.times_s(None, rng)
    shifts_s: dict[int, float] = {}
    moved: list[tuple[float, TraceRequest]] = []
    for request in requests:
        if request.after is not None and request.after not in shifts_s:
            raise TraceError(f"request {request.request_id}: after is {request.after}, which did not come before it")
        shift_s = next(starts_s) - request.arrival_s if request.after is None else shifts_s[request.after]
        shifts_s[request.request_id] = shift_s
        moved.append((request.arrival_s + shift_s, request))
    # Stable, so that turns of one session at one time keep their order.
    moved.sort(key=lambda pair: pair[0])
    new_ids: dict[int, int] = {}
    for new_id, (arrival_s, request) in enumerate(moved):
        new_ids[request.request_id] = new_id
        after = None if request.after is None else new_ids[request.after]
        yield dataclasses.replace(request, request_id=new_id, arrival_s=max(0.0, arrival_s), after=after)


def _positions(count: int | None) -> Iterable[int]:
    return itertools.count() if count is None else range(count)


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} {value} must be a finite number above 0")
