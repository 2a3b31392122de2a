"""Prefixes that are to be in the store's fastest tier before they are restored.

Of requests that wait in vLLM's queue, the first few in the sequence of their arrival, and of those that another request
has announced. Workers bring them there, while nothing that runs reads from the tier where they are.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from cacheflow.stores.base import Store
from cacheflow.stores.keys import chain_hashes, chain_root
from cacheflow.types import Clock
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.options import ServingOptions
from cacheflow.vllm.scheduler.keeps import Keeps
from cacheflow.vllm.scheduler.kv_identity import KvIdentity, KvName
from cacheflow.vllm.scheduler.lookup import PrefixLookup, StoreQuestion, StoreQuestions
from cacheflow.vllm.scheduler.request import TrackedRequest
from cacheflow.vllm.scheduler.request_params import Keep, Mode
from cacheflow.vllm.step import KeepWork, PrefetchWork

RENEW_S = 10.0
"""Workers are told so often of a request that still queues; of one that no longer does they drop what is left then."""
ANNOUNCED_S = 300.0
"""What was announced without being kept is brought within so many seconds, or not at all."""
MAX_ANNOUNCED = 256
"""Announced prefixes that may wait for the store's answer; of more the oldest are dropped."""
LOOK_S = 1.0
"""While vLLM asks about a request whose chunks were to be brought, the store is asked so often where they are."""
LOOKUP_S = 10.0
"""Longest wait for that answer: nothing waits for it but these prefixes."""


@dataclass(slots=True, eq=False)
class _Queued:
    request: TrackedRequest
    sent_at_s: float = float("-inf")
    looked_at_s: float = float("-inf")


@dataclass(frozen=True, slots=True, eq=False)
class _Announced:
    name: KvName
    question: StoreQuestion
    tenant: str
    keep: Keep


class Prefetches:
    """What comes next, and what workers are to be told of it. Scheduler's thread alone."""

    def __init__(  # noqa: PLR0913 -- one engine's, keyword-only but for the first three
        self,
        store: Store,
        facts_by_rank: Sequence[EngineFacts],
        options: ServingOptions,
        *,
        identity: KvIdentity,
        questions: StoreQuestions,
        keeps: Keeps,
        clock: Clock,
    ) -> None:
        """Look announced prefixes up in ``store``; ``questions`` has the answers about requests."""
        self._options, self._identity, self._questions = options, identity, questions
        self._keeps, self._clock = keeps, clock
        # Of its own: the question of a request, which has a deadline, does not queue after these.
        self._lookup = PrefixLookup(store, timeout_s=LOOKUP_S, clock=clock, num_threads=1)
        self._own_questions = StoreQuestions(self._lookup, facts_by_rank, num_saves=lambda: 0, clock=clock)
        self._queued: OrderedDict[str, _Queued] = OrderedDict()
        self._awaiting: set[str] = set()
        self._announced: deque[_Announced] = deque(maxlen=MAX_ANNOUNCED)
        self._has_tiers = bool(store.stats().tiers)

    def arrived(self, request: TrackedRequest) -> None:
        """A request waits in vLLM's queue from now on; those that it announces come after it."""
        loads = self._options.policy != "recompute" and request.params.mode in (Mode.AUTO, Mode.LOAD)
        if self._has_tiers and self._options.prefetch_queued and loads:
            self._queued[request.view.request_id] = _Queued(request)
        if request.params.prefetch and not self._identity.stopped and self._is_current(request.name):
            self._announce(request)

    def _is_current(self, name: KvName) -> bool:
        """Whether KV of that name can still be found."""
        return name.generation == self._identity.generation

    def left(self, request_id: str) -> None:
        """It has left the queue: it begins, or it has ended. Another, or again, does nothing."""
        self._queued.pop(request_id, None)

    def look_anew(self, request: TrackedRequest) -> bool:
        """Ask where a request's chunks are by now, if they were to be brought; whether it is to be decided anew for it.

        Call before vLLM's question about it is answered.
        """
        queued, now_s = self._queued.get(request.view.request_id), self._clock()
        if queued is None or request.question is None or queued.sent_at_s == float("-inf"):
            return False
        if now_s < queued.looked_at_s + LOOK_S:
            return False
        queued.looked_at_s = now_s
        self._questions.locate_anew(request.question)
        return True

    def asked(self, request_id: str, *, answered: bool) -> None:
        """In this step vLLM has asked about a request; one that it would begin but for our answer does not queue."""
        if answered:
            self._awaiting.discard(request_id)
        else:
            self._awaiting.add(request_id)

    def _announce(self, request: TrackedRequest) -> None:
        """Look up the prefixes that a request announces; their KV goes by its name, and is kept as long as its own."""
        size, name, salt = self._options.chunk_tokens, request.name, request.view.salt
        keep = request.params.keep or Keep(keep_s=self._options.keep_tool_s, until_next=True)
        for tokens in request.params.prefetch:
            ends = range(size, len(tokens) // size * size + 1, size)
            hashes = tuple(each.hex() for each in chain_hashes(tokens, ends, salt))
            if hashes:
                question = self._own_questions.ask(name.namespace, hashes)
                self._announced.append(_Announced(name, question, chain_root(salt).hex(), keep))

    def due(self) -> tuple[list[PrefetchWork], list[KeepWork]]:
        """What workers are to bring, and to pin, from the step on that is being made."""
        works, keeps = self._of_queued(), list[KeepWork]()
        for _ in range(len(self._announced)):
            announced = self._announced.popleft()
            if not self._is_current(announced.name):
                continue
            if not (
                self._own_questions.is_answered(announced.question) and self._own_questions.poll(announced.question)
            ):
                self._announced.append(announced)
                continue
            keep, question = announced.keep, announced.question
            found = question.chain_hashes[: question.num_stored]
            keeps += self._keeps.announced(question.namespace, found, keep)
            works += self._works(
                question, found, tenant=announced.tenant, within_s=keep.keep_s or ANNOUNCED_S, keep_s=keep.keep_s
            )
        return works, keeps

    def _of_queued(self) -> list[PrefetchWork]:
        works, now_s = list[PrefetchWork](), self._clock()
        for request_id, queued in islice(self._queued.items(), self._options.prefetch_queued):
            request, question = queued.request, queued.request.question
            if question is None or not self._is_current(request.name) or request_id in self._awaiting:
                continue
            if now_s < queued.sent_at_s + RENEW_S or not self._questions.is_answered(question):
                continue
            if self._questions.poll(question):
                queued.sent_at_s = now_s
                found = question.chain_hashes[: self._num_wanted(request, question)]
                works += self._works(question, found, tenant=chain_root(request.view.salt).hex(), within_s=RENEW_S)
        self._awaiting.clear()
        return works

    def _num_wanted(self, request: TrackedRequest, question: StoreQuestion) -> int:
        """Leading chunks that can be restored of a request; its last token is computed in any case."""
        limits = (len(request.view.tokens) - 1, self._options.max_load_tokens, request.params.max_load_tokens)
        num_tokens = min(each for each in limits if each is not None)
        return min(question.num_stored, num_tokens // self._options.chunk_tokens)

    def _works(
        self, question: StoreQuestion, found: tuple[str, ...], *, tenant: str, within_s: float, keep_s: float = 0.0
    ) -> list[PrefetchWork]:
        """The work of bringing these chunks; none where they are in the fastest tier."""
        if question.checkpoints is not None:  # what is after the last running states is not restored
            ends = (chunk + 1 for chunk in question.checkpoints if chunk < len(found))
            found = found[: max(ends, default=0)]
        if not any(question.tiers[: len(found)]):
            return []
        return [
            PrefetchWork(
                namespace=question.namespace, chain_hashes=found, tenant=tenant, within_s=within_s, keep_s=keep_s
            )
        ]

    def close(self) -> None:
        """End the lookups without waiting for a store that hangs."""
        self._lookup.close()
