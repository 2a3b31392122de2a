"""Several restorations that share compute, a link and memory: who is served next, and who is let in.

Pure: no clock, no threads. Its driver (threads in the embedded engine, a virtual clock in the simulator) passes
the time in and holds one lock around every call, those to the restorations' states included. Both resources stay busy
across requests: where the first in the order has nothing to do for a resource, the next is asked.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from cacheflow.errors import ConfigError, PromptError
from cacheflow.plan.batch import BatchPolicy, Ranking, WaitingRequest, bounded, predict_ends
from cacheflow.plan.grid import Piece
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.remaining import remaining_of
from cacheflow.state.compute_side import ClaimKind, ComputeClaim
from cacheflow.state.restoration import RestoreState

RERANK_S = 0.05
"""Rank again after this long although nobody came or went: work goes on, and requests age."""


@dataclass(frozen=True, slots=True)
class BatchClaim:
    """What compute does next, of one request; of kind ``DONE`` when only its first token is left to choose."""

    request_id: int
    claim: ComputeClaim


@dataclass(frozen=True, slots=True)
class BatchRead:
    """What the link reads next, of one request."""

    request_id: int
    piece: Piece


@dataclass(slots=True)
class _Entry:
    """One request: its restoration starts, and is planned, when a resource first turns to it."""

    problem: RestoreProblem
    arrival_s: float
    first_token_due_s: float | None
    ready: bool
    state: RestoreState | None = None
    finishing: bool = False


class BatchScheduler:
    """Any number of restorations on one compute resource and one link."""

    def __init__(
        self,
        policy: BatchPolicy,
        rates: LiveRates,
        *,
        starvation_s: float = float("inf"),
        min_claim_s: float = 0.0,
    ) -> None:
        """Start without requests.

        Args:
            policy: Ranks them, and plans each.
            rates: What compute and the link really do; shared by all restorations.
            starvation_s: A request that has waited this long goes before all that came after it, whatever the policy.
            min_claim_s: See ``RestoreState``.

        Raises:
            ConfigError: ``starvation_s`` is not above 0.
        """
        if not starvation_s > 0:
            raise ConfigError(f"starvation_s is {starvation_s}, must be above 0 seconds")
        self.policy, self.rates = policy, rates
        self._starvation_s, self._min_claim_s = starvation_s, min_claim_s
        self._entries: dict[int, _Entry] = {}
        self._plans: dict[int, RestorePlan] = {}
        self._ranking = Ranking(compute=(), link=())
        self._rank_at_s: float | None = None

    def __len__(self) -> int:
        """Number of requests that have no first token yet."""
        return len(self._entries)

    def add(
        self,
        request_id: int,
        problem: RestoreProblem,
        *,
        arrival_s: float,
        first_token_due_s: float | None = None,
        ready: bool = True,
    ) -> None:
        """Take a request in; the next to ask for work may get some of it.

        Args:
            request_id: Its name until ``remove``.
            problem: What its restoration and its new tokens cost.
            arrival_s: When it came; it may have waited elsewhere since.
            first_token_due_s: When its first token should be there, for policies that mind.
            ready: Whether compute may begin: not while what lies before the grid is still being restored.

        Raises:
            ConfigError: The name is taken.
        """
        if request_id in self._entries:
            raise ConfigError(f"request {request_id} is being restored already")
        self._entries[request_id] = _Entry(problem, arrival_s, first_token_due_s, ready)
        self._plans.clear()
        self._rank_at_s = None

    def adopt(
        self, request_id: int, state: RestoreState, *, arrival_s: float, first_token_due_s: float | None = None
    ) -> None:
        """Take in a restoration that was planned elsewhere, for a driver that asks its state for work by ``ranking``.

        Raises:
            ConfigError: The name is taken.
        """
        self.add(request_id, state.problem, arrival_s=arrival_s, first_token_due_s=first_token_due_s)
        self._entries[request_id].state = state

    def make_ready(self, request_id: int) -> None:
        """Let compute begin a request that was added before it could."""
        self._entries[request_id].ready = True

    def remove(self, request_id: int) -> None:
        """Forget a request: it has its first token, or was given up; the driver ends what it has under way."""
        del self._entries[request_id]
        self._plans.pop(request_id, None)
        self._rank_at_s = None

    def state(self, request_id: int) -> RestoreState:
        """A request's state machine, for reporting what was done; planned now if nobody had turned to it."""
        return self._started(request_id)

    def ranking(self, now_s: float) -> Ranking:
        """Whom each resource serves first now."""
        if self._rank_at_s is None or now_s >= self._rank_at_s:
            self._rank(now_s)
        return self._ranking

    def claim_compute(self, now_s: float) -> BatchClaim | None:
        """What compute does next; None when every request waits for the link, or none is there."""
        for request_id in self.ranking(now_s).compute:
            entry = self._entries[request_id]
            if entry.finishing or not entry.ready:
                continue
            claim = self._started(request_id).claim_compute(now_s)
            if claim.kind is not ClaimKind.WAIT:
                entry.finishing = claim.kind is ClaimKind.DONE
                return BatchClaim(request_id, claim)
        return None

    @property
    def num_tiers(self) -> int:
        """Stores that cells of any request may lie in; each is read by itself."""
        return max((entry.problem.num_tiers for entry in self._entries.values()), default=1)

    def busy_tiers(self, wanted: Sequence[int]) -> frozenset[int]:
        """Of several tiers those from which as many cells are being read as ``wanted`` says, for whichever request."""
        num_tiers = self.num_tiers
        if num_tiers == 1:
            return frozenset()
        states = [entry.state for entry in self._entries.values() if entry.state is not None]
        return frozenset(
            tier for tier in range(num_tiers) if sum(state.link.reads_by_tier[tier] for state in states) >= wanted[tier]
        )

    def claim_read(self, now_s: float, busy: Container[int] = ()) -> BatchRead | None:
        """Claim what the link reads next; None when it should wait or nothing is left to load.

        Cells of tiers that are ``busy`` are passed over.
        """
        for request_id in self.ranking(now_s).link:
            if self._entries[request_id].finishing:
                continue
            piece = self._started(request_id).claim_read(now_s, busy)
            if piece is not None:
                return BatchRead(request_id, piece)
        return None

    def close_link(self) -> None:
        """Stop loading for every request that is there; compute restores the rest."""
        for request_id in self._entries:
            self._started(request_id).close_link()

    def waiting(self, now_s: float) -> tuple[WaitingRequest, ...]:
        """What the policy sees, in the order of arrival."""
        requests = [
            WaitingRequest(
                request_id=request_id,
                arrival_s=entry.arrival_s,
                remaining=entry.state.remaining(now_s)
                if entry.state
                else remaining_of(
                    entry.problem, compute_factor=self.rates.compute_factor, bytes_per_s=self.rates.bytes_per_s
                ),
                first_token_due_s=entry.first_token_due_s,
            )
            for request_id, entry in self._entries.items()
        ]
        return tuple(sorted(requests, key=lambda request: (request.arrival_s, request.request_id)))

    def _rank(self, now_s: float) -> None:
        if len(self._entries) == 1:  # alone there is nothing to rank, until somebody comes
            [(request_id, entry)] = self._entries.items()
            self._ranking, self._rank_at_s = Ranking(compute=(request_id,), link=(request_id,)), float("inf")
            if entry.state is not None:
                entry.state.yield_to(compute_s=0.0, link_s=0.0)
            return
        waiting = self.waiting(now_s)
        ranking = bounded(self.policy.rank(now_s, waiting), waiting, now_s, starvation_s=self._starvation_s)
        self._ranking, self._rank_at_s = ranking, now_s + RERANK_S
        by_id = {request.request_id: request for request in waiting}
        ends = predict_ends([by_id[request_id] for request_id in ranking.compute])
        shares = dict(zip(ranking.compute, (end.compute_share for end in ends), strict=True))
        compute_s = 0.0
        ahead_s = {}
        for request_id in ranking.compute:
            ahead_s[request_id] = compute_s
            left = by_id[request_id].remaining
            compute_s += shares[request_id] * left.compute_s + left.suffix_s
        link_s = 0.0
        for request_id in ranking.link:
            state = self._entries[request_id].state
            if state is not None:
                state.yield_to(compute_s=ahead_s[request_id], link_s=link_s)
            link_s += (1.0 - shares[request_id]) * by_id[request_id].remaining.load_s

    def _started(self, request_id: int) -> RestoreState:
        entry = self._entries[request_id]
        if entry.state is None:
            plan = self._plans.pop(request_id, None) or self._plan(request_id)
            stored = entry.problem.boundary_bytes_K.any()
            entry.state = RestoreState(
                entry.problem,
                plan,
                self.rates,
                min_claim_s=self._min_claim_s,
                source=BoundarySource.STORED if stored else BoundarySource.FIRST_STAGE,
            )
        return entry.state

    def _plan(self, request_id: int) -> RestorePlan:
        waiting = sorted(self._entries, key=lambda other: (self._entries[other].arrival_s, other))
        problems = {other: self._entries[other].problem for other in waiting if self._entries[other].state is None}
        self._plans = dict(self.policy.plans(request_id, problems))
        return self._plans.pop(request_id)


class Admission:
    """Lets waiting requests in whose keys and values fit in memory together; not thread-safe.

    Who does not fit may be passed by others that do, but not for ever: one that has waited ``starvation_s`` holds the
    door until it fits.
    """

    def __init__(self, capacity_tokens: int | None = None, *, starvation_s: float = float("inf")) -> None:
        """Start empty.

        Args:
            capacity_tokens: Tokens of KV that fit; None for no limit.
            starvation_s: A request that has waited this long is passed by nobody any more.

        Raises:
            ConfigError: A value is out of range.
        """
        if capacity_tokens is not None and capacity_tokens < 1:
            raise ConfigError(f"capacity_tokens is {capacity_tokens}, must be at least 1, or None for no limit")
        if not starvation_s > 0:
            raise ConfigError(f"starvation_s is {starvation_s}, must be above 0 seconds")
        self.capacity_tokens = capacity_tokens
        self._starvation_s = starvation_s
        self._waiting: dict[int, tuple[int, float]] = {}
        self._held: dict[int, int] = {}

    @property
    def held_tokens(self) -> int:
        """Tokens of the requests that are in."""
        return sum(self._held.values())

    def ask(self, request_id: int, num_tokens: int, *, arrival_s: float) -> None:
        """Let a request wait for room.

        Raises:
            PromptError: It does not fit even alone.
            ConfigError: The name is taken.
        """
        self.check(num_tokens)
        if request_id in self._waiting or request_id in self._held:
            raise ConfigError(f"request {request_id} has asked for room already")
        self._waiting[request_id] = (num_tokens, arrival_s)

    def check(self, num_tokens: int) -> None:
        """Pass if a request of so many tokens fits alone.

        Raises:
            PromptError: It does not.
        """
        if self.capacity_tokens is not None and num_tokens > self.capacity_tokens:
            raise PromptError(
                f"the request needs keys and values of {num_tokens} tokens, memory holds {self.capacity_tokens}: "
                "shorten the prompt or the answer, or raise kv_capacity_tokens"
            )

    def admit(self, order: Sequence[int], now_s: float) -> list[int]:
        """Let in those that fit, and return them.

        Args:
            order: Every request that waits, first served first.
            now_s: On the clock of ``arrival_s``.
        """
        starved = [name for name in order if self._has_starved(name, now_s)]
        starved.sort(key=lambda name: self._waiting[name][1])
        passed = frozenset(starved)
        admitted = []
        for request_id in (*starved, *(name for name in order if name not in passed)):
            num_tokens = self._waiting[request_id][0]
            if self.capacity_tokens is None or self.held_tokens + num_tokens <= self.capacity_tokens:
                del self._waiting[request_id]
                self._held[request_id] = num_tokens
                admitted.append(request_id)
            elif request_id in passed:
                break
        return admitted

    def release(self, request_id: int) -> None:
        """Take a request out: it has ended, or waits no longer."""
        self._waiting.pop(request_id, None)
        self._held.pop(request_id, None)

    def _has_starved(self, request_id: int, now_s: float) -> bool:
        return now_s - self._waiting[request_id][1] > self._starvation_s
