"""Asks the store what it holds of a prompt, off the scheduler's thread: chunks of KV, boundary and running states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from cacheflow.stores.asker import Asker
from cacheflow.stores.base import Store
from cacheflow.stores.keys import ObjectKey
from cacheflow.types import Clock
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.scheduler.stage_planner import slowest_rank_of_each_stage

T = TypeVar("T")

INLINE_WAIT_S = 0.001
"""A lookup that a local store answers at once is waited for, once; a slow one is asked about again in each step without
waiting: vLLM asks for every request in its queue, between the tokens of those that decode."""
QUEUED_S = 1.0
"""A request that vLLM considers only so long after its arrival has queued, and its question to the store is old."""
NUM_THREADS = 2
CHUNKS_PER_PROBE = 64
"""Chunks asked for in one ``contains``; bounds what is asked after the prompts part."""


class Lookup(Generic[T]):
    """What the store holds of some chunks; ``poll`` from the thread that asked."""

    def __init__(self, future: Future[T], nothing: T, *, deadline_at_s: float, clock: Clock) -> None:
        self._future, self._nothing, self._deadline_at_s, self._clock = future, nothing, deadline_at_s, clock
        self._wait_s = INLINE_WAIT_S
        self.timed_out = False

    @property
    def is_over(self) -> bool:
        """Whether ``poll`` has an answer without waiting for one, or gives up."""
        return self.timed_out or self._future.done() or self._clock() >= self._deadline_at_s

    def poll(self) -> T | None:
        """The answer; that it holds nothing after the deadline, None while it is not known."""
        if self.timed_out:
            return self._nothing
        wait_s, self._wait_s = self._wait_s, 0.0
        try:
            return self._future.result(wait_s)
        except TimeoutError:
            self.timed_out = self._clock() >= self._deadline_at_s
            if self.timed_out:
                self._future.cancel()  # a store that hangs now is not to be asked all that once it answers again
            return self._nothing if self.timed_out else None


class PrefixLookup:
    """Threads that ask ``Store.contains``: a store that hangs costs a request its deadline, nobody else."""

    def __init__(self, store: Store, *, timeout_s: float, clock: Clock, num_threads: int = NUM_THREADS) -> None:
        """Ask ``store`` on so many threads; a question is given up after ``timeout_s``."""
        self._store, self._timeout_s, self._clock = store, timeout_s, clock
        self._asker = Asker("cacheflow-lookup", num_threads=num_threads)

    def start(self, keys_by_chunk: Sequence[Sequence[ObjectKey]]) -> Lookup[int]:
        """Ask how many of the leading chunks have all of these objects."""
        return self._ask(partial(self._count_leading, keys_by_chunk), 0)

    def which(self, keys_by_chunk: Sequence[Sequence[ObjectKey]]) -> Lookup[frozenset[int]]:
        """Ask which of the chunks have all of these objects."""
        return self._ask(partial(self._found, keys_by_chunk), frozenset())

    def tiers(self, keys: Sequence[ObjectKey]) -> Lookup[tuple[int, ...]] | None:
        """Ask in which of the store's tiers each of these objects is; None of a store that has none."""
        return self._ask(partial(self._store.locate, keys), ()) if self._store.stats().tiers else None

    def _ask(self, question: Callable[[], T], nothing: T) -> Lookup[T]:
        future = self._asker.ask(question, nothing)
        return Lookup(future, nothing, deadline_at_s=self._clock() + self._timeout_s, clock=self._clock)

    def _count_leading(self, keys_by_chunk: Sequence[Sequence[ObjectKey]]) -> int:
        missing = (index for index, complete in self._complete(keys_by_chunk) if not complete)
        return next(missing, len(keys_by_chunk))

    def _found(self, keys_by_chunk: Sequence[Sequence[ObjectKey]]) -> frozenset[int]:
        return frozenset(index for index, complete in self._complete(keys_by_chunk) if complete)

    def _complete(self, keys_by_chunk: Sequence[Sequence[ObjectKey]]) -> Iterator[tuple[int, bool]]:
        """Of each chunk in order whether the store has all of its objects."""
        for first in range(0, len(keys_by_chunk), CHUNKS_PER_PROBE):
            probe = keys_by_chunk[first : first + CHUNKS_PER_PROBE]
            there = iter(self._store.contains([key for keys in probe for key in keys]))
            for index, keys in enumerate(probe):
                found = [next(there) for _ in keys]
                yield first + index, all(found)

    def close(self) -> None:
        """End the threads without waiting for a store that hangs."""
        self._asker.close()


@dataclass(slots=True, kw_only=True)
class StoreQuestion:
    """What the store was asked about one request, and what it answered; written by ``StoreQuestions``.

    Attributes:
        namespace: Of the request's objects.
        chain_hashes: Chain hash (hex) at the end of each chunk asked about.
        asked_after_saves: ``SaveLog.num_saves`` when it was asked.
        asked_at_s: When it was asked, on the clock of ``StoreQuestions``.
        lookup: Of the chunks' KV.
        checkpoint_lookup: Of the running states at the end of each chunk; None of a model without recurrent layers.
        boundary_lookups: Of the boundary states of each stage above the first that stores them.
        repeated: Asked once more, because chunks were saved while the request queued.
        num_stored: Leading chunks the store holds.
        num_boundaries: Leading chunks of whose boundary states it holds, by ``boundary_lookups``.
        checkpoints: Chunks at whose end it holds the running states; None of a model without recurrent layers.
        tier_lookup: Of the tier that each chunk's KV is in; None where the store has no tiers.
        tiers: The number of each chunk's tier; empty where that is not known, or there is but one.
    """

    namespace: str
    chain_hashes: tuple[str, ...]
    asked_after_saves: int
    asked_at_s: float
    lookup: Lookup[int]
    boundary_lookups: tuple[Lookup[int], ...]
    checkpoint_lookup: Lookup[frozenset[int]] | None = None
    repeated: bool = False
    num_stored: int = 0
    num_boundaries: tuple[int, ...] = ()
    checkpoints: frozenset[int] | None = None
    tier_lookup: Lookup[tuple[int, ...]] | None = None
    tiers: tuple[int, ...] = ()


class StoreQuestions:
    """Asks about the objects of all ranks, without waiting. Scheduler's thread alone."""

    def __init__(
        self, lookup: PrefixLookup, facts_by_rank: Sequence[EngineFacts], *, num_saves: Callable[[], int], clock: Clock
    ) -> None:
        """Ask for the objects of these ranks; ``num_saves`` is ``SaveLog.num_saves``."""
        self._lookup, self._ranks, self._num_saves, self._clock = lookup, tuple(facts_by_rank), num_saves, clock
        self._ends_by_rank = [
            (facts.keys, tuple(dict.fromkeys((facts.rows_of_blocks[0], facts.rows_of_blocks[-1]))))
            for facts in facts_by_rank
        ]
        self._recurrent = any(facts.recurrent for facts in facts_by_rank)
        self._boundary_stages = [
            facts for facts in slowest_rank_of_each_stage(facts_by_rank)[1:] if facts.boundary_token_bytes
        ]

    def ask(self, namespace: str, chain_hashes: tuple[str, ...]) -> StoreQuestion:
        """Ask about chunks, at least one, by their chain hashes (hex)."""
        return StoreQuestion(
            namespace=namespace,
            chain_hashes=chain_hashes,
            asked_after_saves=self._num_saves(),
            asked_at_s=self._clock(),
            lookup=self._lookup.start([self._ends(namespace, each) for each in chain_hashes]),
            tier_lookup=self._locate(namespace, chain_hashes),
            checkpoint_lookup=(
                self._lookup.which([self._states(namespace, each) for each in chain_hashes])
                if self._recurrent
                else None
            ),
            boundary_lookups=tuple(
                self._lookup.start([[facts.keys.boundary(namespace, each)] for each in chain_hashes])
                for facts in self._boundary_stages
            ),
        )

    def locate_anew(self, question: StoreQuestion) -> None:
        """Ask once more in which tiers the chunks are: they may have been brought to another one."""
        question.tier_lookup = self._locate(question.namespace, question.chain_hashes)

    def _locate(self, namespace: str, chain_hashes: Sequence[str]) -> Lookup[tuple[int, ...]] | None:
        # The objects of a chunk were written and used together: the bottom one stands for all.
        return self._lookup.tiers([self._ends(namespace, each)[0] for each in chain_hashes])

    def is_answered(self, question: StoreQuestion) -> bool:
        """Whether ``poll`` would not have to wait; for those who ask in every step about requests that are not due."""
        others = (question.checkpoint_lookup, question.tier_lookup)
        lookups = (question.lookup, *question.boundary_lookups, *(each for each in others if each is not None))
        return all(each.is_over for each in lookups)

    def poll(self, question: StoreQuestion) -> bool:
        """Note in the question what the store holds; False while that is not known.

        Asks the store once more where the answer is out of date.
        """
        num_stored = question.lookup.poll()
        if num_stored is not None and self._is_old(question, num_stored):
            again = self.ask(question.namespace, question.chain_hashes)
            question.lookup, question.boundary_lookups = again.lookup, again.boundary_lookups
            question.checkpoint_lookup, question.tier_lookup = again.checkpoint_lookup, again.tier_lookup
            question.asked_after_saves, question.asked_at_s = again.asked_after_saves, again.asked_at_s
            question.repeated = True
            num_stored = question.lookup.poll()
        boundaries = [lookup.poll() for lookup in question.boundary_lookups]
        checkpoints = None if question.checkpoint_lookup is None else question.checkpoint_lookup.poll()
        unknown = question.checkpoint_lookup is not None and checkpoints is None
        tiers = () if question.tier_lookup is None else question.tier_lookup.poll()
        if num_stored is None or None in boundaries or unknown or tiers is None:
            return False
        question.tiers = tiers
        question.checkpoints = checkpoints
        question.num_stored, question.num_boundaries = num_stored, tuple(num or 0 for num in boundaries)
        return True

    def _is_old(self, question: StoreQuestion, num_stored: int) -> bool:
        """Whether what is missing may have been computed since, by a request that was scheduled before this one."""
        if question.lookup.timed_out or question.repeated or num_stored == len(question.chain_hashes):
            return False
        return self._clock() - question.asked_at_s > QUEUED_S and question.asked_after_saves != self._num_saves()

    def _ends(self, namespace: str, chain_hash: str) -> list[ObjectKey]:
        """The bottom and the top object of a chunk on every rank: the first and the last that a save writes."""
        return [keys.kv(namespace, chain_hash, rows) for keys, ends in self._ends_by_rank for rows in ends]

    def _states(self, namespace: str, chain_hash: str) -> list[ObjectKey]:
        """The objects of running states at the end of a chunk, of every row on every rank."""
        return [
            facts.keys.states(namespace, chain_hash, rows)
            for facts in self._ranks
            for rows, num_bytes in zip(facts.rows_of_blocks, facts.state_bytes_B, strict=True)
            if num_bytes
        ]
