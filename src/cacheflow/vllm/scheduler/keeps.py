"""Prefixes that requests have asked to keep in the store, their own or announced ones, and which later requests end.

An agent that waits for a tool comes back with a longer prompt; until then its prefix should not make room for others.
Several requests may keep the same chunks, such as a common system prompt: those stay until the last of them is over.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cacheflow.stores.keys import RankObjects
from cacheflow.types import Clock
from cacheflow.vllm.scheduler.request_params import Keep
from cacheflow.vllm.step import KeepWork

MAX_KEPT = 4096
"""Prefixes that are remembered; what is forgotten ends by its time alone."""


@dataclass(frozen=True, slots=True, order=True)
class _Tip:
    """The last chunk of a kept prefix, and whether the next request on it ends that."""

    namespace: str
    chain_hash: str
    until_next: bool


@dataclass(frozen=True, slots=True)
class _Kept:
    chain_hashes: tuple[str, ...]
    until_s: float


class Keeps:
    """What is kept, by the last chunk of each prefix. Scheduler's thread alone."""

    def __init__(self, objects: Iterable[RankObjects], *, clock: Clock) -> None:
        """``objects``: of all ranks."""
        self._objects, self._clock = tuple(objects), clock
        self._kept: OrderedDict[_Tip, _Kept] = OrderedDict()
        self._ends: list[tuple[float, _Tip]] = []  # a heap; one whose prefix has another end by now means nothing
        self._num_keeping: Counter[tuple[str, str]] = Counter()  # of each chunk

    @property
    def empty(self) -> bool:
        """Whether nothing is kept."""
        return not self._kept

    def request_ended(self, namespace: str, chain_hashes: Sequence[str], asked: Keep | None) -> list[KeepWork]:
        """A request with these chunks has ended; returns what workers are to pin, and no longer to pin.

        It ends what was kept until the next request on a prefix of its own, and renews that where it asks to keep its
        own; one that asks for 0 seconds ends all that is kept of such prefixes.
        """
        self._forget_what_is_over()
        all_of_them = asked is not None and not asked.keep_s
        ended: list[str] = []
        for each in chain_hashes:
            for until_next in (True, False) if all_of_them else (True,):
                ended += self._end(_Tip(namespace, each, until_next))
        works = []
        if asked is not None and asked.keep_s and chain_hashes:
            self._begin(_Tip(namespace, chain_hashes[-1], asked.until_next), tuple(chain_hashes), asked.keep_s)
            works.append(self._work(namespace, tuple(chain_hashes), asked.keep_s))
        free = tuple(each for each in dict.fromkeys(ended) if not self._num_keeping[namespace, each])
        if free:
            works.append(self._work(namespace, free, 0.0))
        return works

    def announced(self, namespace: str, chain_hashes: Sequence[str], asked: Keep) -> list[KeepWork]:
        """Requests with these chunks come next; returns what workers are to pin meanwhile."""
        self._forget_what_is_over()
        if not chain_hashes or not asked.keep_s:
            return []
        self._begin(_Tip(namespace, chain_hashes[-1], asked.until_next), tuple(chain_hashes), asked.keep_s)
        return [self._work(namespace, tuple(chain_hashes), asked.keep_s)]

    def _work(self, namespace: str, chain_hashes: tuple[str, ...], keep_s: float) -> KeepWork:
        return KeepWork(namespace=namespace, chain_hashes=chain_hashes, objects=self._objects, keep_s=keep_s)

    def _begin(self, tip: _Tip, chain_hashes: tuple[str, ...], keep_s: float) -> None:
        until_s = self._clock() + keep_s
        before = self._kept.get(tip)
        if before is not None:
            until_s = max(until_s, before.until_s)
            self._end(tip)
        self._kept[tip] = _Kept(chain_hashes, until_s)
        heapq.heappush(self._ends, (until_s, tip))
        self._num_keeping.update((tip.namespace, each) for each in chain_hashes)
        while len(self._kept) > MAX_KEPT:
            self._end(next(iter(self._kept)))

    def _end(self, tip: _Tip) -> tuple[str, ...]:
        kept = self._kept.pop(tip, None)
        if kept is None:
            return ()
        for each in kept.chain_hashes:
            chunk = tip.namespace, each
            self._num_keeping[chunk] -= 1
            if not self._num_keeping[chunk]:
                del self._num_keeping[chunk]
        return kept.chain_hashes

    def _forget_what_is_over(self) -> None:
        now_s = self._clock()
        while self._ends and self._ends[0][0] <= now_s:
            until_s, tip = heapq.heappop(self._ends)
            if tip in self._kept and self._kept[tip].until_s == until_s:
                self._end(tip)
