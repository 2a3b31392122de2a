"""The scheduler side: looks prefixes up, decides, makes each step's work, and takes in what came of it.

One object per engine, on the scheduler's thread alone; nothing in here waits for a store or a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cacheflow.errors import CostRangeError
from cacheflow.plan.plan import Choice
from cacheflow.restore.work import StepReport
from cacheflow.stores.base import Store
from cacheflow.types import Clock
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.options import ServingOptions
from cacheflow.vllm.scheduler.checkpoints import RequestCheckpoints, StatesUnderWay
from cacheflow.vllm.scheduler.claims import claims_of
from cacheflow.vllm.scheduler.decide import Decider, Decision
from cacheflow.vllm.scheduler.explain import LOADED_BY_ANOTHER, STREAMS, UNNAMED, Siblings, answer_of
from cacheflow.vllm.scheduler.keeps import Keeps
from cacheflow.vllm.scheduler.kv_identity import MIXED, KvIdentity, describe, shared_namespace
from cacheflow.vllm.scheduler.lookup import PrefixLookup, StoreQuestion, StoreQuestions
from cacheflow.vllm.scheduler.prefetches import Prefetches
from cacheflow.vllm.scheduler.request import TrackedRequest
from cacheflow.vllm.scheduler.request_params import KeepLimits, Mode, RequestParams
from cacheflow.vllm.scheduler.request_prefix import RequestPrefix
from cacheflow.vllm.scheduler.restorations import EndedRestoration, RestorationOutcome, Restorations
from cacheflow.vllm.scheduler.saves import RequestSaves
from cacheflow.vllm.scheduler.sharing import Following
from cacheflow.vllm.scheduler.stage_planner import slowest_rank_of_each_stage
from cacheflow.vllm.scheduler.step_saves import StepSaves
from cacheflow.vllm.scheduler.store_census import StoreCensus
from cacheflow.vllm.scheduler.view import (
    NO_STATES,
    BlockIdsOf,
    RequestView,
    ScheduledRequest,
    StateBlocksOf,
    TargetStates,
    no_state_blocks,
)
from cacheflow.vllm.step import NOTHING, CaptureWork, KeepWork, ModelNews, SaveWork, StepWork

logger = logging.getLogger(__name__)


class SchedulerSide:
    """Everything that is decided, in one process, once per step.

    Attributes:
        requests: Those that came and have not ended, by id.
        identity: What KV is called.
        decider: Plans, and holds what was learnt of the link and of compute.
        restorations: Those under way.
        counts: What was counted since they were last taken.
    """

    def __init__(
        self, options: ServingOptions, store: Store, facts_by_rank: Sequence[EngineFacts], *, clock: Clock
    ) -> None:
        """Serve the engine whose workers found out ``facts_by_rank``."""
        by_stage = slowest_rank_of_each_stage(facts_by_rank)
        self._options, self._store = options, store
        self._under_way = StatesUnderWay(patience_s=options.lookup_timeout_s, clock=clock)
        self._block_size = by_stage[0].block_size
        self.requests: dict[str, TrackedRequest] = {}
        self._weights_versions: dict[int, int] = {}
        self._adapters_leak = any(facts.adapters_leak for facts in facts_by_rank)
        self._siblings = Siblings()
        self.counts = Counts()
        self.identity = KvIdentity(shared_namespace(facts_by_rank))
        self._parts = describe(facts_by_rank)
        self._census = StoreCensus(store)
        self._census.describe(self.identity.namespace(None), self._parts)
        self._saves = StepSaves(
            self.identity, self._under_way, captures=any(facts.boundary_token_bytes for facts in facts_by_rank)
        )
        self._keep_limits = KeepLimits(tool_s=options.keep_tool_s, max_s=options.max_keep_s)
        self._keeps = Keeps((facts.objects for facts in facts_by_rank), clock=clock)
        self._keep_works: list[KeepWork] = []
        self._lookup = PrefixLookup(store, timeout_s=options.lookup_timeout_s, clock=clock)
        self._questions = StoreQuestions(
            self._lookup, facts_by_rank, num_saves=lambda: self._saves.num_saves, clock=clock
        )
        self._prefetches = Prefetches(
            store,
            facts_by_rank,
            options,
            identity=self.identity,
            questions=self._questions,
            keeps=self._keeps,
            clock=clock,
        )
        self.decider = Decider(by_stage, options, clock=clock, tier_rates=store.tier_rates)
        self.restorations = Restorations(
            options,
            self.decider,
            ranks_per_stage=len(facts_by_rank) // len(by_stage),
            clock=clock,
            counts=self.counts,
        )

    def knows(self, request_id: str) -> bool:
        """Whether a request was noted and has not ended."""
        return request_id in self.requests

    def new_request(self, view: RequestView) -> None:
        """Note a request and ask the store for its prefix; a second call for the same request changes nothing."""
        if view.request_id in self.requests:
            return
        params = RequestParams.of(view.params, self._keep_limits)
        if view.streams or not view.hashable:
            params = replace(params, mode=Mode.OFF)
        elif view.computes_all:
            params = replace(params, max_load_tokens=0)
        if params.complaint:
            logger.warning("request %s: kv_transfer_params: %s", view.request_id, params.complaint)
        prefix = RequestPrefix(chunk_tokens=self._options.chunk_tokens, salt=view.salt, media=view.media)
        request = TrackedRequest(
            checkpoints=self._checkpoints(view),
            view=view,
            params=params,
            prefix=prefix,
            saves=RequestSaves(view, prefix, block_size=self._block_size, decode_too=self._options.save_decode_kv),
            name=self.identity.name(view.adapter),
        )
        self.requests[view.request_id] = request
        self._siblings.join(view.request_id)
        if view.streams or not view.hashable:
            request.reason = STREAMS if view.streams else UNNAMED
        elif params.mode is Mode.OFF:
            request.reason = "the request asked for 'off'"
        self._begin_name(request)
        self._prefetches.arrived(request)

    def _checkpoints(self, view: RequestView) -> RequestCheckpoints | None:
        if not self.decider.recurrent:
            return None
        options = self._options
        return RequestCheckpoints(
            view,
            chunk_tokens=options.chunk_tokens,
            every_chunks=options.checkpoint_every_chunks,
            decode_too=options.save_decode_kv,
        )

    def _begin_name(self, request: TrackedRequest) -> None:
        """Forget what was known of a request's KV, and ask the store for what has its present name."""
        name, adapter = request.name, request.view.adapter
        self._census.describe(name.namespace, self._parts | self.identity.parts(name.adapter))
        request.question = request.decision = None
        request.saves.forget()
        if request.params.mode is Mode.OFF:
            return
        if adapter is not None and name.adapter is None:
            request.reason = f"the files of its adapter {adapter.name!r} in {adapter.path} cannot be read"
        elif self.identity.stopped:
            request.reason = self.identity.stopped
        else:
            request.question = self._ask(request)

    def _ask(self, request: TrackedRequest) -> StoreQuestion:
        num_chunks = request.prefix.extend(request.view.tokens)
        if not num_chunks:
            request.reason = f"the prompt has no whole chunk of {request.prefix.chunk_tokens} tokens"
        return self._questions.ask(request.name.namespace, request.prefix.chain_hashes(0, num_chunks))

    def _ask_anew(self, request: TrackedRequest, num_preemptions: int) -> None:
        """Ask again where the answer is out of date: the engine has another generation, or vLLM took the KV away."""
        if request.name.generation != self.identity.generation:
            # vLLM asks only while it has computed nothing of it, or nothing is left of it.
            request.name = self.identity.name(request.view.adapter)
            self._begin_name(request)
        elif num_preemptions != request.num_preemptions:
            request.decision = None
            if request.params.mode is not Mode.OFF:
                request.question = self._ask(request)  # by now the store may hold what the request has computed itself
            self._under_way.release(request.view.request_id)
        request.num_preemptions = num_preemptions

    def num_matched(
        self, request_id: str, num_computed: int, *, num_preemptions: int = 0, has_start_states: bool = True
    ) -> int | None:
        """Tokens to restore beyond ``num_computed``; 0 for none, None to be asked again in the next step.

        ``has_start_states``: in a model with recurrent layers their states at ``num_computed`` are there.
        """
        request = self.requests.get(request_id)
        if request is None:
            return 0
        request.asked_by_vllm, request.taken_up, request.num_local, request.num_loaded = True, False, num_computed, 0
        if self._prefetches.look_anew(request):
            request.decision = None
        self._ask_anew(request, num_preemptions)
        matched = self._num_matched(request, num_computed, has_start_states=has_start_states)
        self._prefetches.asked(request_id, answered=matched is not None)
        return matched

    def _num_matched(self, request: TrackedRequest, num_computed: int, *, has_start_states: bool) -> int | None:
        question = request.question
        if question is None or not question.chain_hashes or request.given_up:
            return 0
        if not self._questions.poll(question):
            return None
        request.saves.note_stored(question.num_stored)
        request.offered = None
        if request.checkpoints is not None and question.checkpoints is not None:
            request.checkpoints.note_stored(question.checkpoints)
            if self._under_way.awaited(question):
                request.question = self._ask(request)
                return None
        decision = request.decision
        known = (num_computed, has_start_states)
        if decision is None or (decision.start, decision.has_start_states) != known:
            decision = self._decide(request, question, num_computed, has_start_states=has_start_states)
            request.decision = decision
        if decision.num_tokens:
            shared = self.restorations.shared(request, decision)
            if shared.following is Following.WAIT:
                return None
            # A copy is offered for this step alone: the blocks are the other's only as long as it is under way.
            copies = shared.following is Following.COPY
            request.offered = self.decider.after_copy(decision, shared) if copies else decision
        return decision.num_tokens

    def stop_at(self, request_id: str, num_computed: int, *, vllm_stop: int, kept_within_passes: bool = False) -> int:
        """Where vLLM is to end a step of a prompt that goes on after so many tokens; see ``RequestCheckpoints``.

        It ends one where the prompt's last block does, unless the states there are ``kept_within_passes``.
        """
        request = self.requests.get(request_id)
        if request is None or request.checkpoints is None or request.params.mode is Mode.OFF:
            return vllm_stop
        num_stored = 0 if request.question is None else request.question.num_stored
        return request.checkpoints.stop_at(
            num_stored=num_stored,
            end=num_computed,
            stops_itself=self._options.chunk_tokens == self._block_size and not kept_within_passes,
            vllm_stop=vllm_stop,
        )

    def _decide(
        self, request: TrackedRequest, question: StoreQuestion, num_computed: int, *, has_start_states: bool
    ) -> Decision:
        view = request.view
        try:
            decision = self.decider.decide(
                request.params,
                question,
                start=num_computed,
                num_tokens=len(view.tokens),
                num_text_tokens=view.num_text_tokens,
                has_start_states=has_start_states,
            )
        except CostRangeError as error:
            logger.warning("request %s is computed, not restored: %s", request.view.request_id, error)
            decision = Decision(start=num_computed, end=num_computed, reason=str(error))
        decision = replace(decision, has_start_states=has_start_states)
        request.reason = decision.reason
        if question.lookup.timed_out:
            self.counts.lookup_timeouts += 1  # once a decision: vLLM asks in every step while the request waits
            request.reason = f"the store did not answer within {self._options.lookup_timeout_s:g} s"
        if (
            not decision.num_tokens
            and decision.slowest_stage is not None
            and decision.slowest_stage.plan.guard is not None
        ):
            self.counts.guard[Choice.RECOMPUTE.value] += 1
        return decision

    def allocated(
        self, request_id: str, block_ids: Sequence[int], num_external: int, states: TargetStates = NO_STATES
    ) -> None:
        """Begin a restoration that vLLM has set blocks aside for, of ``num_external`` tokens."""
        request = self.requests.get(request_id)
        if request is None:
            return
        offered = request.offered
        if offered is None or offered.num_tokens != num_external:
            raise AssertionError(f"vLLM allocated {num_external} tokens for {request_id}, offered was {offered}")
        self._prefetches.left(request_id)
        self.restorations.start(request, offered, block_ids, states)
        request.decision = request.offered = None
        request.taken_up = True

    def passed_over(self, request_id: str, *, num_loaded: int | None) -> None:
        """Note that vLLM has set blocks aside without asking for a restoration.

        Another connector loads ``num_loaded`` tokens; None where that is not known.
        """
        self._prefetches.left(request_id)
        request = self.requests.get(request_id)
        if request is None or request.taken_up:
            return  # vLLM calls again when our own restoration has ended
        request.num_loaded = 1 if num_loaded is None else num_loaded
        if request.num_loaded:
            self.identity.loaded_by_another()
        if num_loaded or request.offered is not None:
            request.offered, request.reason = None, LOADED_BY_ANOTHER

    def step(
        self,
        scheduled: Iterable[ScheduledRequest],
        block_ids_of: BlockIdsOf,
        *,
        num_scheduled_tokens: int,
        state_blocks_of: StateBlocksOf = no_state_blocks,
        preempted: Sequence[str] = (),
    ) -> StepWork:
        """The work of one step: restorations go on, computed chunks are saved.

        Args:
            scheduled: The requests of the step.
            block_ids_of: KV blocks of a request of the step; asked only where a chunk is to be saved.
            num_scheduled_tokens: Tokens of the step's forward; 0 when nobody runs.
            state_blocks_of: Where a request of the step has its running states after it; asked only where those are to
                be saved.
            preempted: Requests that lose their KV blocks in this step.
        """
        self.identity.step_made()
        saves: tuple[SaveWork, ...] = ()
        captures: tuple[CaptureWork, ...] = ()
        if self._options.save:
            scheduled = tuple(scheduled)
            self._note_leak(scheduled)
            saves, captures = self._saves.of_step(self.requests, scheduled, block_ids_of, state_blocks_of)
        generation, preempted = self.identity.generation, preempted if self.decider.recurrent else ()
        prefetches, announced = self._prefetches.due()
        keeps, self._keep_works = (*self._keep_works, *announced), []
        if not any((saves, captures, preempted, keeps, prefetches, self.has_work)):
            return StepWork(generation=generation) if generation else NOTHING
        work = self.restorations.step(saves, busy=num_scheduled_tokens > 0)
        return replace(
            work,
            captures=captures,
            preempted=tuple(preempted),
            keeps=keeps,
            prefetches=tuple(prefetches),
            claims=claims_of(work, self.requests) if self._options.tenant_quota is not None else {},
            weights_versions=dict(self._weights_versions),
            generation=generation,
        )

    def _note_leak(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """Save nothing of requests of the base model that vLLM computes in one step with an adapter's."""
        if not self._adapters_leak:
            return
        requests = [self.requests[each.request_id] for each in scheduled if self.knows(each.request_id)]
        base = [request for request in requests if request.view.adapter is None]
        if base and len(base) < len(requests):
            self.identity.base_leaked()
            for request in base:
                request.name = replace(request.name, generation=MIXED)

    def reset(self) -> None:
        """Restore nothing that was saved so far; what is being restored is given up. The store keeps it for others."""
        self.identity.reset()
        self.restorations.discard("the connector was reset")
        logger.info("reset: nothing saved so far is restored any more; from now on KV is saved for this engine alone")

    def local_cache_was_reset(self) -> None:
        """VLLM has emptied its own prefix cache."""
        self.identity.local_cache_was_reset()

    def take_news(self, news: Mapping[int, ModelNews]) -> None:
        """Take in what became of the workers' weights and adapters, by rank; before the report of the same step."""
        for rank, each in news.items():
            for restore_id, reason in each.refused.items():
                self.restorations.discard(reason, restore_id)
            for load in each.adapter_loads:
                self.identity.adapter_loaded(rank, load)
            replaced = {load.version.number for load in each.adapter_loads if load.replaced}
            for request in self.requests.values():
                if request.name.adapter is not None and request.name.adapter.number in replaced:
                    request.name = replace(request.name, generation=MIXED)
        changes = {rank: each.weights for rank, each in news.items() if each.weights is not None}
        self._weights_versions |= {rank: change.version for rank, change in changes.items()}
        if changes:
            worst = min(changes.values(), key=lambda change: (change.announced, change.before_forward))
            self.identity.weights_changed(worst)
            self.restorations.discard("the model's weights have changed")

    def take_report(self, report: StepReport) -> None:
        """Take in what the workers did."""
        for ended in self.restorations.apply(report):
            self._restoration_ended(self.requests[ended.request_id], ended)

    def _restoration_ended(self, request: TrackedRequest, ended: EndedRestoration) -> None:
        request.records.append(ended.record)
        if ended.lost_chunk is not None:
            request.saves.note_lost(ended.lost_chunk)
        if ended.outcome is not RestorationOutcome.DONE:
            error = ended.record["error"]
            request.reason = f"the restoration was {ended.outcome.value}" + (f": {error}" if error else "")
            request.given_up = request.given_up or ended.outcome is RestorationOutcome.FAILED

    def load_failed(self) -> None:
        """Save nothing of requests whose prefix another connector was to load, and of which no token came since.

        A load failed, and vLLM computes again what depended on it: not in all of its runners with the right result.
        """
        for request in self.requests.values():
            request.saves.note_load_failed()

    def finished(self, request_id: str) -> dict[str, Any] | None:
        """A request ended or was aborted; what is under way for it is cancelled.

        Returns:
            What the response's ``kv_transfer_params`` are to hold; None for nothing.
        """
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        self._under_way.release(request_id)
        self._prefetches.left(request_id)
        record = self.restorations.cancel(request_id)
        if record is not None:
            request.records.append(record)
        self._note_keep(request)
        answer = answer_of(request, explain=self._options.explain)
        return self._siblings.ended(request_id, answer) or None

    def _note_keep(self, request: TrackedRequest) -> None:
        """Have workers pin the prefix of a request that ended, if it asked for it, and no longer what it ends."""
        keep = request.params.keep
        if request.params.mode is Mode.OFF or (keep is None and self._keeps.empty):
            return
        num_chunks = request.prefix.extend(request.view.tokens)
        chain_hashes = request.prefix.chain_hashes(0, num_chunks)
        self._keep_works += self._keeps.request_ended(request.name.namespace, chain_hashes, keep)

    @property
    def has_work(self) -> bool:
        """Whether a restoration is under way."""
        return not self.restorations.idle

    def close(self) -> None:
        """End the lookups and the census."""
        self._lookup.close()
        self._prefetches.close()
        self._census.close()
