"""The requests that a simulation replays: a trace or generated sessions, shaped by options, checked at the door."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from cacheflow.errors import CostRangeError, TraceError
from cacheflow.plan.grid import Grid, regular_ends
from cacheflow.plan.problem import LinkCost
from cacheflow.sim.cluster import ClusterConfig
from cacheflow.sim.costs import ChunkCosts
from cacheflow.workloads.arrivals import Poisson, TraceTiming, retime
from cacheflow.workloads.request import TraceRequest
from cacheflow.workloads.sessions import PROFILES, generate_sessions
from cacheflow.workloads.traces import read_trace

DEFAULT_CONTEXT_TOKENS = 131_072
"""Longest prompt of generated sessions unless ``--max-tokens`` says another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests that can be read again for each policy."""

    name: str
    read: Callable[[], Iterator[TraceRequest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSize:
    """What a workload holds: read once before any policy runs, so that errors come at the door.

    Attributes:
        reusable_tokens: Those of them, in full blocks, with which a prompt before began too: the most that a memory
            without bounds could hold for them.
        fingerprint: Digest of all of them: equal for equal requests, whatever file and options they come from.
    """

    num_requests: int
    input_tokens: int
    reusable_tokens: int
    fingerprint: str

    @property
    def reusable_share(self) -> float:
        """Share of the prompts' tokens that could be restored or found in GPU memory at all."""
        return self.reusable_tokens / self.input_tokens


def trace_workload(path: Path, *, format: str, block_tokens: int, repeat: int) -> Workload:
    """The requests of a file, ``repeat`` times after each other, each time with prefixes of its own."""

    def read() -> Iterator[TraceRequest]:
        return _repeated(lambda: read_trace(path, format=format, block_tokens=block_tokens), repeat)

    return Workload(name=path.name, read=read)


def generated_workload(
    name: str, *, num_sessions: int, rate_per_s: float, seed: int, block_tokens: int, max_tokens: int | None
) -> Workload:
    """Sessions of a profile."""
    arrivals = Poisson(rate_per_s)

    def read() -> Iterator[TraceRequest]:
        return generate_sessions(
            PROFILES[name],
            num_sessions=num_sessions,
            arrivals=arrivals,
            seed=seed,
            block_tokens=block_tokens,
            max_tokens=max_tokens or DEFAULT_CONTEXT_TOKENS,
        )

    return Workload(name=name, read=read)


def restarted(workload: Workload, *, rate_per_s: float, seed: int) -> Workload:
    """The same sessions, starting at random; read whole, because they interleave anew.

    Raises:
        ConfigError: The rate is not above 0.
    """
    arrivals = Poisson(rate_per_s)
    return replace(workload, read=lambda: retime(workload.read(), arrivals, seed))


def shaped(
    workload: Workload,
    *,
    limit: int | None,
    duration_s: float | None,
    rate_scale: float,
    seed: int,
    max_tokens: int | None,
) -> Workload:
    """A workload with other times, and less of it.

    Args:
        workload: What is shaped.
        limit: Requests at most.
        duration_s: Seconds of arrivals at most, after scaling.
        rate_scale: So many times as many requests a second; pauses inside sessions shrink as much.
        seed: Of everything that is drawn.
        max_tokens: Longer prompts are left out; a turn after one follows the one before it.
    """

    def read() -> Iterator[TraceRequest]:
        requests: Iterable[TraceRequest] = workload.read()
        if max_tokens is not None:
            requests = _without_long(requests, max_tokens)
        if rate_scale != 1.0:
            requests = retime(requests, TraceTiming(1.0 / rate_scale), seed)
        if duration_s is not None:
            requests = takewhile(lambda request: request.arrival_s <= duration_s, requests)
        return _limited(requests, limit)

    return replace(workload, read=read)


def measure(workload: Workload, config: ClusterConfig, costs: ChunkCosts) -> WorkloadSize:
    """Read a workload once, and refuse what could not be served.

    Raises:
        TraceError: It is malformed, empty, or time goes backwards.
        ConfigError: A request fits no replica.
        CostRangeError: The longest prompt has no costs.
    """
    count, last_s, longest = 0, 0.0, 0
    reuse = _Reuse()
    digest = hashlib.blake2b(digest_size=8)
    for request in workload.read():
        digest.update(repr(request).encode())
        if request.arrival_s < last_s:
            raise TraceError(
                f"{workload.name}: request {request.request_id} arrives at {request.arrival_s:g} s, "
                f"after one at {last_s:g} s; expected the order of arrival"
            )
        if request.after is not None and not request.session_id:
            raise TraceError(
                f"{workload.name}: request {request.request_id} comes after {request.after}, but its session_id is "
                "empty; expected the session that both are turns of"
            )
        config.check_fits(request)
        reuse.add(request)
        count, last_s, longest = count + 1, request.arrival_s, max(longest, request.input_tokens)
    if not count:
        raise TraceError(f"{workload.name} has no request left; expected at least one")
    _require_costs(costs, longest)
    return WorkloadSize(
        num_requests=count,
        input_tokens=reuse.input_tokens,
        reusable_tokens=reuse.reusable_tokens,
        fingerprint=digest.hexdigest(),
    )


class _Reuse:
    """Counts the prompt tokens that an earlier prompt began with too."""

    def __init__(self) -> None:
        """Start before the first request."""
        self.input_tokens = self.reusable_tokens = 0
        self._seen: set[int] = set()

    def add(self, request: TraceRequest) -> None:
        """Count a request; its full blocks are known to those after it."""
        tokens, ids = request.block_tokens, request.block_ids
        # The last token of a prompt is always computed: it gives the first of the answer.
        known = sum(1 for _ in takewhile(self._seen.__contains__, ids[: (request.input_tokens - 1) // tokens]))
        self.input_tokens += request.input_tokens
        self.reusable_tokens += known * tokens
        self._seen.update(ids[known : request.input_tokens // tokens])


def _require_costs(costs: ChunkCosts, num_tokens: int) -> None:
    grid = Grid(chunk_ends=regular_ends(0, num_tokens, costs.chunk_tokens), num_blocks=costs.shape.num_rows)
    try:
        costs.problem(grid, link=LinkCost(bytes_per_s=math.inf))
    except CostRangeError as error:
        raise CostRangeError(
            f"the longest prompt has {num_tokens:,} tokens, for which {costs.source} has no costs ({error}); "
            "leave such prompts out (--max-tokens) or continue published costs (--extrapolate)"
        ) from error


def _limited(requests: Iterable[TraceRequest], limit: int | None) -> Iterator[TraceRequest]:
    for number, request in enumerate(requests):
        if limit is not None and number >= limit:
            return
        yield request


def _without_long(requests: Iterable[TraceRequest], max_tokens: int) -> Iterator[TraceRequest]:
    left_out: dict[int, int | None] = {}
    for request in requests:
        after = request.after
        while after is not None and after in left_out:
            after = left_out[after]
        if request.input_tokens > max_tokens:
            left_out[request.request_id] = after
        else:
            yield request if after == request.after else replace(request, after=after)


def _repeated(read: Callable[[], Iterator[TraceRequest]], repeat: int) -> Iterator[TraceRequest]:
    """The requests again and again; a repetition begins a mean distance after the last arrival of the one before."""
    start_s, first_id = 0.0, 0
    for number in range(repeat):
        count, last_s = 0, 0.0
        for request in read():
            count, last_s = count + 1, request.arrival_s
            yield _moved(request, number, repeat, start_s=start_s, first_id=first_id) if repeat > 1 else request
        start_s += last_s + last_s / max(1, count)
        first_id += count


def _moved(request: TraceRequest, number: int, repeat: int, *, start_s: float, first_id: int) -> TraceRequest:
    return replace(
        request,
        request_id=request.request_id + first_id,
        arrival_s=request.arrival_s + start_s,
        block_ids=tuple(block_id * repeat + number for block_id in request.block_ids),
        session_id=f"{request.session_id}/{number}" if request.session_id else "",
        after=None if request.after is None else request.after + first_id,
    )
