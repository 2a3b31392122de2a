"""What varies in a figure, as data: each kind of point says how its records are simulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Generic, Protocol, TypeVar

import numpy as np

from cacheflow.bench.contender import Contender
from cacheflow.bench.figures.crowd_bound import FigureRequest
from cacheflow.bench.figures.place import Place, with_ratio
from cacheflow.bench.figures.runs import CROWD, OURS, Crowd, alone, crowded, least_alone
from cacheflow.bench.records.figure import FigureRecord
from cacheflow.plan.bound import Bound, bound
from cacheflow.plan.problem import RestoreProblem
from cacheflow.workloads.arrivals import Poisson
from cacheflow.workloads.sessions import PROFILES, generate_sessions

SEED = 20260428
MAX_PROMPT_TOKENS = 32_768
"""Longest prompt of a session."""
LEAST_CHUNKS, MOST_CHUNKS = 4, 64
"""Prefixes of mixed batches: log-uniform, in whole chunks."""
SUFFIXES = (64, 256, 1024)
DEADLINE_FACTOR = 4.0
"""A request's deadline, in times of what it could have alone."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Varied(Generic[T]):
    """Values of one thing, and those of the reduced set."""

    values: tuple[T, ...]
    fast: tuple[T, ...]

    def of(self, fast: bool) -> tuple[T, ...]:
        """The values, all or reduced."""
        return self.fast if fast else self.values


HERE: Varied[Place] = Varied((Place(),), (Place(),))
"""Qwen3-8B on an H100 at 10 Gbit/s."""
NO_RATIO: Varied[float | None] = Varied((None,), (None,))
NO_CHUNKS: Varied[int | None] = Varied((None,), (None,))


class Points(Protocol):
    """Some points of a figure."""

    def records(self, suite: str, fast: bool) -> Iterator[FigureRecord]:
        """Simulate them, all or the reduced set, under the name of the figure's records."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """One restoration with nothing beside it, under every policy.

    Attributes:
        sizes: Tokens of the prefix, and new ones.
        chunks: Tokens of a chunk; None: the place's.
        ratios: Load time over recompute time; None: the place's link.
    """

    places: Varied[Place] = HERE
    sizes: Varied[tuple[int, int]]
    chunks: Varied[int | None] = NO_CHUNKS
    ratios: Varied[float | None] = NO_RATIO

    def records(self, suite: str, fast: bool) -> Iterator[FigureRecord]:
        """See ``Points``."""
        for place in self.places.of(fast):
            for num_tokens, suffix_tokens in self.sizes.of(fast):
                for chunk_tokens in self.chunks.of(fast):
                    cut = place if chunk_tokens is None else replace(place, chunk_tokens=chunk_tokens)
                    problem = cut.problem(num_tokens=num_tokens, suffix_tokens=suffix_tokens)
                    for ratio in self.ratios.of(fast):
                        yield from alone(suite, cut, problem if ratio is None else with_ratio(problem, ratio))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Turns of sessions, arriving at a load.

    Attributes:
        workloads: Names of session profiles, and how many sessions.
        load: Seconds of prefill of whole prompts that arrive each second.
    """

    places: Varied[Place] = HERE
    workloads: Varied[tuple[str, int]]
    load: float = 0.6
    contenders: tuple[Contender, ...] = CROWD

    def records(self, suite: str, fast: bool) -> Iterator[FigureRecord]:
        """See ``Points``."""
        for place in self.places.of(fast):
            for workload, num_sessions in self.workloads.of(fast):
                crowd = session_crowd(place, workload, num_sessions=num_sessions, load=self.load)
                yield from crowded(suite, place, crowd, contenders=self.contenders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Batches of requests that come at once.

    Attributes:
        size: Tokens of the prefix, and new ones, of each of equal requests.
        workloads: ``"equal"``, ``"mixed"`` (requests of many lengths), or a name for equal ones with their number.
    """

    places: Varied[Place] = HERE
    batches: Varied[int]
    size: tuple[int, int] = (16_384, 256)
    workloads: tuple[str, ...]
    contenders: tuple[Contender, ...] = CROWD

    def records(self, suite: str, fast: bool) -> Iterator[FigureRecord]:
        """See ``Points``."""
        for place in self.places.of(fast):
            for num_requests in self.batches.of(fast):
                for workload in self.workloads:
                    mixed = workload == "mixed"
                    lengths = mixed_lengths(place, num_requests) if mixed else [self.size] * num_requests
                    requests = tuple(request_of(place, each) for each in lengths)
                    crowd = Crowd(requests=requests, workload=workload.format(num_requests))
                    yield from crowded(suite, place, crowd, contenders=self.contenders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arriving:
    """Mixed requests that arrive one after the other, the same at every rate, each with a deadline.

    Attributes:
        num_requests: How many; an eighth in the reduced set.
        loads: Least seconds of work, alone, that arrive each second; deadlines are ``DEADLINE_FACTOR`` times what a
            request could have alone. Empty: by ``rates_per_s``.
        rates_per_s: Arrivals a second, all due within ``slo_s``.
    """

    num_requests: int = 80
    loads: Varied[float] = Varied((), ())
    rates_per_s: Varied[float] = Varied((), ())
    slo_s: float = 0.0
    contenders: tuple[Contender, ...]

    def records(self, suite: str, fast: bool) -> Iterator[FigureRecord]:
        """See ``Points``."""
        place = Place()
        lengths = mixed_lengths(place, self.num_requests // 8 if fast else self.num_requests)
        alone_s = [least_alone(request_of(place, each)).ttft_s for each in lengths]
        rates = [(f"load {load:g}", load * len(lengths) / sum(alone_s)) for load in self.loads.of(fast)]
        rates += [("mixed", rate_per_s) for rate_per_s in self.rates_per_s.of(fast)]
        for workload, rate_per_s in rates:
            requests = tuple(
                request_of(place, each, arrival_s=arrival_s, slo_s=self.slo_s or DEADLINE_FACTOR * least_s)
                for each, arrival_s, least_s in zip(
                    lengths, poisson_times_s(len(lengths), rate_per_s), alone_s, strict=True
                )
            )
            crowd = Crowd(requests=requests, workload=workload, rate_per_s=rate_per_s, slo_s=self.slo_s)
            yield from crowded(suite, place, crowd, contenders=self.contenders)


ALWAYS = 10**9
"""A crossover length that no prefix reaches: layer-wise whatever the length."""
IN_CHUNKS = (
    Contender(name="token-wise", restore="cacheflow_v1", crossover_tokens=0),
    Contender(name="layer-wise", restore="cacheflow_v1", crossover_tokens=ALWAYS),
    Contender(name=OURS, restore=OURS),
)
ONE_PASS = Contender(name="layer-wise, one pass", restore="cacheflow_v1", crossover_tokens=ALWAYS, reads_in_flight=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossover:
    """Restoration alone; layer-wise in chunks, and with each layer in one pass over the whole prefix."""

    places: Varied[Place]
    lengths: Varied[int]

    def records(self, suite: str, fast: bool) -> Iterator[FigureRecord]:
        """See ``Points``."""
        for place in self.places.of(fast):
            one_pass = replace(place, chunk_tokens=0)
            for num_tokens in self.lengths.of(fast):
                chunks = place.problem(num_tokens=num_tokens, suffix_tokens=0)
                whole = one_pass.problem(num_tokens=num_tokens, suffix_tokens=0)
                own_s = place.prefill(chunks).suffix_s
                least_s = min(bound(chunks).restore_s, bound(whole).restore_s, own_s)
                least, workload = Bound(restore_s=least_s, ttft_s=least_s), f"chunks of {place.chunk_tokens}"
                yield from alone(suite, place, chunks, contenders=IN_CHUNKS, least=least, workload=workload)
                yield from alone(suite, one_pass, whole, contenders=(ONE_PASS,), least=least, workload=workload)


@dataclass(frozen=True, slots=True)
class _Turn:
    arrival_s: float
    lengths: tuple[int, int]


@cache
def _costs(place: Place, prefix_tokens: int, suffix_tokens: int) -> tuple[RestoreProblem, RestoreProblem]:
    """Of restoring, and of prefilling everything."""
    problem = place.problem(num_tokens=prefix_tokens, suffix_tokens=suffix_tokens)
    prefill = place.prefill(problem)
    return replace(problem, prefill_s=prefill.suffix_s), prefill


def request_of(
    place: Place, lengths: tuple[int, int], *, arrival_s: float = 0.0, slo_s: float | None = None
) -> FigureRequest:
    """A request with so many tokens of prefix and so many new ones; one without a prefix does not count."""
    problem, prefill = _costs(place, *lengths)
    return FigureRequest(arrival_s=arrival_s, problem=problem, prefill=prefill, slo_s=slo_s, counts=lengths[0] > 0)


def session_crowd(place: Place, workload: str, *, num_sessions: int, load: float) -> Crowd:
    """Turns of sessions whose earlier turn was evicted: the prompt of that turn is the prefix.

    The answer before a turn stands among its new tokens: its KV is of decode steps and was not saved. Turns arrive at
    the times of the trace, however long the turn before took. First turns restore nothing and do not count.
    """
    one_a_second = [request_of(place, turn.lengths) for turn in _turns(workload, num_sessions, 1.0)]
    work_s = sum(each.prefill.suffix_s for each in one_a_second)
    rate_per_s = load * num_sessions / work_s
    requests = tuple(
        request_of(place, turn.lengths, arrival_s=turn.arrival_s) for turn in _turns(workload, num_sessions, rate_per_s)
    )
    return Crowd(requests=requests, workload=workload, rate_per_s=rate_per_s)


def _turns(workload: str, num_sessions: int, rate_per_s: float) -> Iterator[_Turn]:
    prompts: dict[int, int] = {}
    for each in generate_sessions(
        PROFILES[workload],
        num_sessions=num_sessions,
        arrivals=Poisson(rate_per_s),
        seed=SEED,
        max_tokens=MAX_PROMPT_TOKENS,
    ):
        prompts[each.request_id] = each.input_tokens
        prefix_tokens = 0 if each.after is None else prompts[each.after]
        yield _Turn(each.arrival_s, (prefix_tokens, each.input_tokens - prefix_tokens))


def mixed_lengths(place: Place, num_requests: int, *, seed: int = SEED) -> list[tuple[int, int]]:
    """Prefixes of many lengths, log-uniform, and few or many new tokens after them."""
    rng = np.random.default_rng(seed)
    chunks = np.exp(rng.uniform(np.log(LEAST_CHUNKS), np.log(MOST_CHUNKS + 1), num_requests)).astype(int)
    suffixes = rng.choice(SUFFIXES, num_requests)
    return [
        (int(num_chunks) * place.chunk_tokens, int(suffix)) for num_chunks, suffix in zip(chunks, suffixes, strict=True)
    ]


def poisson_times_s(num_requests: int, rate_per_s: float, *, seed: int = SEED) -> list[float]:
    """Arrival times; the same gaps at every rate, only longer or shorter."""
    gaps = np.random.default_rng([seed, 1]).exponential(1.0, num_requests)
    gaps[0] = 0.0
    times_s: list[float] = (gaps.cumsum() / rate_per_s).tolist()
    return times_s
