"""What the store is asked about a request: how many leading chunks it holds, and boundary states of how many."""

from __future__ import annotations

from collections.abc import Sequence

from cacheflow.stores.keys import ObjectKey
from cacheflow.types import Clock
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.scheduler.lookup import Lookup, PrefixLookup
from cacheflow.vllm.scheduler.request import TrackedRequest
from cacheflow.vllm.scheduler.saves import OrderedSaves
from cacheflow.vllm.scheduler.stage_planner import slowest_of_stages

QUEUED_S = 1.0
"""A request that vLLM considers only so long after its arrival has queued, and its question to the store is old."""


class StoreQuestions:
    """Asks without waiting. Scheduler's thread alone."""

    def __init__(
        self, lookup: PrefixLookup, facts_by_rank: Sequence[EngineFacts], saves: OrderedSaves, *, clock: Clock
    ) -> None:
        """Ask for the objects of these ranks.

        Args:
            lookup: Reaches the store.
            facts_by_rank: What the workers found out at start.
            saves: What this engine has ordered to be saved.
            clock: Says how long a request has queued.
        """
        self._lookup, self._ranks, self._saves, self._clock = lookup, tuple(facts_by_rank), saves, clock
        self._boundary_stages = [
            facts for facts in slowest_of_stages(facts_by_rank)[1:] if facts.boundary_token_bytes
        ]  # fmt: skip

    def ask(self, request: TrackedRequest) -> None:
        """Ask about every whole chunk of a request."""
        num_chunks = request.prefix.extend(request.tokens)
        request.asked_at, request.asked_at_s = self._saves.now, self._clock()
        if num_chunks:
            request.lookup = self._lookup.start([self._probe_keys(request, chunk) for chunk in range(num_chunks)])
            request.boundary_lookups = tuple(
                self._lookup.start([self._boundary_keys(request, chunk, facts) for chunk in range(num_chunks)])
                for facts in self._boundary_stages
            )
        else:
            request.reason = f"the prompt has no whole chunk of {request.prefix.chunk_tokens} tokens"

    def answered(self, request: TrackedRequest) -> bool:
        """Note in the request what the store holds; False while that is not known."""
        num_stored = None if request.lookup is None else self._num_stored(request, request.lookup)
        boundaries = [lookup.poll() for lookup in request.boundary_lookups]  # of the newest question
        if num_stored is None or None in boundaries:
            return False
        request.num_stored = num_stored
        request.num_boundaries = tuple(num or 0 for num in boundaries)
        return True

    def _num_stored(self, request: TrackedRequest, lookup: Lookup) -> int | None:
        """Leading chunks the store holds, None while it is not known.

        Asked once more where a request has queued and chunks were saved since: what it lacks may have been computed
        meanwhile by the one before it.
        """
        num_stored = lookup.poll()
        if num_stored is None or lookup.timed_out or request.asked_again:
            return num_stored
        queued = self._clock() - request.asked_at_s > QUEUED_S and request.asked_at != self._saves.now
        if not queued or num_stored == len(request.prefix.hashes):
            return num_stored
        request.asked_again = True
        self.ask(request)
        return None if request.lookup is None else request.lookup.poll()

    def _probe_keys(self, request: TrackedRequest, chunk: int) -> list[ObjectKey]:
        """The bottom and the top object of a chunk on every rank: the first and the last that a save writes."""
        namespace, chain_hash = request.prefix.namespace, request.prefix.hashes[chunk].hex()
        keys = []
        for facts in self._ranks:
            layers, step = facts.shape.num_layers, facts.layers_per_block
            top_lo = (layers - 1) // step * step
            ends = [(0, min(step, layers)), (top_lo, layers)] if top_lo else [(0, layers)]
            keys += [facts.keys.kv(namespace, chain_hash, each) for each in ends]
        return keys

    def _boundary_keys(self, request: TrackedRequest, chunk: int, facts: EngineFacts) -> list[ObjectKey]:
        """The boundary states from which a stage recomputes a chunk."""
        return [facts.keys.boundary(request.prefix.namespace, request.prefix.hashes[chunk].hex())]
