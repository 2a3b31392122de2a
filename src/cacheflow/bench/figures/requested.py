"""Requests of the figures that have many: sessions of a workload, and mixed batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from cacheflow.bench.figures.runs import Crowd
from cacheflow.bench.figures.setting import Setting
from cacheflow.bench.figures.simulate import Request
from cacheflow.plan.problem import RestoreProblem
from cacheflow.workloads.arrivals import Poisson
from cacheflow.workloads.sessions import PROFILES, generate_sessions

SEED = 20260428
MAX_PROMPT_TOKENS = 32_768
"""Longest prompt of a session."""
LEAST_CHUNKS, MOST_CHUNKS = 4, 64
"""Prefixes of mixed batches: log-uniform, in whole chunks."""
SUFFIXES = (64, 256, 1024)


@dataclass(frozen=True, slots=True)
class _Turn:
    arrival_s: float
    lengths: tuple[int, int]


@cache
def _costs(setting: Setting, prefix_tokens: int, suffix_tokens: int) -> tuple[RestoreProblem, RestoreProblem]:
    """Of restoring, and of prefilling everything."""
    problem = setting.problem(num_tokens=prefix_tokens, suffix_tokens=suffix_tokens)
    prefill = setting.prefill(problem)
    return replace(problem, prefill_s=prefill.suffix_s), prefill


def request_of(
    setting: Setting, lengths: tuple[int, int], *, arrival_s: float = 0.0, slo_s: float | None = None
) -> Request:
    """A request with so many tokens of prefix and so many new ones; one without a prefix does not count."""
    problem, prefill = _costs(setting, *lengths)
    return Request(arrival_s=arrival_s, problem=problem, prefill=prefill, slo_s=slo_s, counts=lengths[0] > 0)


def session_crowd(setting: Setting, workload: str, *, num_sessions: int, load: float) -> Crowd:
    """Turns of sessions whose earlier turn was evicted: the prompt of that turn is the prefix.

    The answer before a turn stands among its new tokens: its KV is of decode steps and was not saved. Turns arrive at
    the times of the trace, however long the turn before took. First turns restore nothing and do not count.

    Args:
        setting: Where.
        workload: Name of a session profile.
        num_sessions: Sessions.
        load: Seconds of prefill of whole prompts that arrive each second.
    """
    one_a_second = [request_of(setting, turn.lengths) for turn in _turns(workload, num_sessions, 1.0)]
    work_s = sum(each.prefill.suffix_s for each in one_a_second)
    rate_per_s = load * num_sessions / work_s
    requests = tuple(
        request_of(setting, turn.lengths, arrival_s=turn.arrival_s)
        for turn in _turns(workload, num_sessions, rate_per_s)
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


def mixed_lengths(setting: Setting, num_requests: int, *, seed: int = SEED) -> list[tuple[int, int]]:
    """Prefixes of many lengths, log-uniform, and few or many new tokens behind them."""
    rng = np.random.default_rng(seed)
    chunks = np.exp(rng.uniform(np.log(LEAST_CHUNKS), np.log(MOST_CHUNKS + 1), num_requests)).astype(int)
    suffixes = rng.choice(SUFFIXES, num_requests)
    return [
        (int(num_chunks) * setting.chunk_tokens, int(suffix))
        for num_chunks, suffix in zip(chunks, suffixes, strict=True)
    ]


def poisson_times_s(num_requests: int, rate_per_s: float, *, seed: int = SEED) -> list[float]:
    """Arrival times; the same gaps at every rate, only longer or shorter."""
    gaps = np.random.default_rng([seed, 1]).exponential(1.0, num_requests)
    gaps[0] = 0.0
    times_s: list[float] = (gaps.cumsum() / rate_per_s).tolist()
    return times_s
