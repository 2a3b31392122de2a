"""Several restorations that wait for the same compute and the same link: what a batch policy sees, and what it says.

Pure: time is passed in. A batch policy ranks; who is first takes all it can use of a resource, the next what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.remaining import Remaining, compute_share

STARVATION_S = 10.0
"""How long a request waits by default before it goes ahead of all that came after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRequest:
    """One request that waits for its first token.

    Attributes:
        request_id: Who it is.
        arrival_s: When it came, on the clock that ``now_s`` is read from.
        remaining: What its restoration and its new tokens still need.
        first_token_due_s: When its first token should be there, on the same clock; None for no matter when.
    """

    request_id: int
    arrival_s: float
    remaining: Remaining
    first_token_due_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Whom each resource serves first; every waiting request stands once in both.

    Attributes:
        compute: Request ids, first served first.
        link: The same ids for the link.
    """

    compute: tuple[int, ...]
    link: tuple[int, ...]

    def first(self, request_ids: Sequence[int]) -> Ranking:
        """The same order with some requests moved to the front of both resources, in the order given."""
        chosen = frozenset(request_ids)
        return Ranking(
            compute=(*request_ids, *(request_id for request_id in self.compute if request_id not in chosen)),
            link=(*request_ids, *(request_id for request_id in self.link if request_id not in chosen)),
        )


class BatchPolicy(Protocol):
    """Ranks the requests that wait; keeps no state, so that one object may serve any number of engines."""

    name: ClassVar[str]
    """What the policy is called in configuration, records and plots."""

    def rank(self, now_s: float, waiting: Sequence[WaitingRequest]) -> Ranking:
        """Rank the requests for both resources. ``waiting`` is in the order of arrival."""
        ...

    def plans(self, request_id: int, problems: Mapping[int, RestoreProblem]) -> Mapping[int, RestorePlan]:
        """Plan one restoration, with a view to all that have not started.

        Args:
            request_id: Who must have a plan. Plans of others hold until one more request comes.
            problems: What every request costs that has not started, in the order of arrival; its own too.
        """
        ...


class Arrival:
    """Ranks by arrival, and plans nothing: for restorations that were planned already."""

    name: ClassVar[str] = "arrival"

    def rank(self, now_s: float, waiting: Sequence[WaitingRequest]) -> Ranking:
        """The oldest first."""
        arrived = tuple(request.request_id for request in waiting)
        return Ranking(compute=arrived, link=arrived)

    def plans(self, request_id: int, problems: Mapping[int, RestoreProblem]) -> Mapping[int, RestorePlan]:
        """Never asked: every restoration was planned already."""
        raise AssertionError(f"request {request_id} has a plan: it was given to the scheduler by adopt()")


@dataclass(frozen=True, slots=True)
class PredictedEnd:
    """When a request has its first token by prediction, in seconds from now, and the share that compute restores."""

    end_s: float
    compute_share: float


def predict_ends(waiting: Sequence[WaitingRequest]) -> tuple[PredictedEnd, ...]:
    """When each request would end if both served them in this order, each split so that both sides end together.

    A pipeline of two resources over infinitely divisible work: the link may begin a request while compute is still at
    the one before, and the other way round. Conservative by the top block of the new tokens, which waits for the link.

    Args:
        waiting: In the order in which they are served.
    """
    compute_s = link_s = 0.0
    ends = []
    for request in waiting:
        left = request.remaining
        ahead_s = compute_s + left.suffix_s - link_s
        share = compute_share(compute_s=left.compute_s, load_s=left.load_s, ahead_s=ahead_s)
        compute_s += share * left.compute_s + left.suffix_s
        link_s += (1.0 - share) * left.load_s
        ends.append(PredictedEnd(max(compute_s, link_s if share < 1.0 else 0.0), share))
    return tuple(ends)


def bounded(order: Ranking, waiting: Sequence[WaitingRequest], now_s: float, *, starvation_s: float) -> Ranking:
    """An order in which nobody is passed for ever: who has waited too long goes first, in the order of arrival.

    So a request waits at most ``starvation_s``, and then for those that came before it.
    """
    starved = [request.request_id for request in waiting if now_s - request.arrival_s > starvation_s]
    return order.first(starved) if starved else order
