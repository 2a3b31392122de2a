"""The ranking of a batch whose requests share prefixes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from cacheflow.plan.batch import BatchPolicy, Ranking, WaitingRequest
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import RestoreProblem


class LeadersFirst:
    """Ranks as another policy does, with each leader moved before the first of its followers.

    So nobody waits after a stranger for what a leader restores for it.
    """

    name: ClassVar[str] = "leaders_first"

    def __init__(self, policy: BatchPolicy, leader_of: Callable[[int], int | None]) -> None:
        """Take the policy, and who restores something for a request; None for nobody."""
        self._policy, self._leader_of = policy, leader_of

    def rank(self, now_s: float, waiting: Sequence[WaitingRequest]) -> Ranking:
        """See ``BatchPolicy.rank``."""
        ranking = self._policy.rank(now_s, waiting)
        return Ranking(compute=self._leaders_first(ranking.compute), link=self._leaders_first(ranking.link))

    def plans(self, request_id: int, problems: Mapping[int, RestoreProblem]) -> Mapping[int, RestorePlan]:
        """See ``BatchPolicy.plans``."""
        return self._policy.plans(request_id, problems)

    def _leaders_first(self, ranked: tuple[int, ...]) -> tuple[int, ...]:
        there, moved = frozenset(ranked), dict[int, None]()
        for request_id in ranked:
            chain: list[int] = []
            name: int | None = request_id
            while name is not None and name in there and name not in moved:
                chain.append(name)
                name = self._leader_of(name)
            moved.update(dict.fromkeys(reversed(chain)))
        return tuple(moved)
