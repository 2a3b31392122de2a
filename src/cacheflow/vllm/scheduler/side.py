"""The scheduler side: looks prefixes up, decides, orders each step's work, and takes in what came of it.

One object per engine, on the scheduler's thread alone; nothing in here waits for a store or a worker. It does not
import vLLM: the connector translates.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cacheflow.plan.plan import Choice
from cacheflow.restore.work import StepReport
from cacheflow.stores.base import Store
from cacheflow.types import Clock
from cacheflow.vllm.adapters import Adapter
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.scheduler.decide import Decider
from cacheflow.vllm.scheduler.explain import Siblings
from cacheflow.vllm.scheduler.kv_identity import KvIdentity, describe, shared_namespace
from cacheflow.vllm.scheduler.lookup import PrefixLookup
from cacheflow.vllm.scheduler.questions import StoreQuestions
from cacheflow.vllm.scheduler.request import MIXED, BlockIdsOf, Decision, TrackedRequest
from cacheflow.vllm.scheduler.request_prefix import MediaSpan, RequestPrefix
from cacheflow.vllm.scheduler.restorations import Restorations
from cacheflow.vllm.scheduler.saves import OrderedSaves
from cacheflow.vllm.scheduler.sharing import Sharing
from cacheflow.vllm.scheduler.stage_planner import slowest_of_stages
from cacheflow.vllm.scheduler.store_census import StoreCensus
from cacheflow.vllm.scheduler.unrestored import BROUGHT_BY_ANOTHER, EMBEDDED, why_unrestored
from cacheflow.vllm.scheduler.wishes import Mode, Wishes
from cacheflow.vllm.step import NOTHING, CaptureWork, ModelNews, SaveWork, StepWork, WeightsChange

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """What a connector passes on of vLLM's request.

    Attributes:
        request_id: vLLM's.
        tokens: Known token ids, prompt and output; a live view that grows.
        num_prompt_tokens: Tokens of the prompt.
        salt: ``cache_salt``.
        adapter: Its LoRA adapter; None without.
        media: Images and sounds in the prompt.
        params: ``kv_transfer_params``.
        hashable: Whether the token ids say what the prompt is (not so for prompt embeddings).
        computes_all: Whether vLLM computes the whole prompt, whatever is cached of it.
    """

    request_id: str
    tokens: Sequence[int]
    num_prompt_tokens: int
    salt: str = ""
    adapter: Adapter | None = None
    media: Sequence[MediaSpan] = ()
    params: Mapping[str, Any] | None = None
    hashable: bool = True
    computes_all: bool = False


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request of a step, and how many of its tokens are computed when the step is through.

    Attributes:
        request_id: vLLM's.
        num_computed: Tokens.
        num_scheduled: Those of them that the step computes.
        unproven: Another connector loads a prefix for this very step, and may fail, which shows when it is through.
    """

    request_id: str
    num_computed: int
    num_scheduled: int = 0
    unproven: bool = False


class SchedulerSide:
    """Everything that is decided, in one process, once per step."""

    def __init__(
        self, options: ConnectorOptions, store: Store, facts_by_rank: Sequence[EngineFacts], *, clock: Clock
    ) -> None:
        """Serve the engine whose workers found out ``facts_by_rank``."""
        by_stage = slowest_of_stages(facts_by_rank)
        self._options, self._store = options, store
        self._ranks, self._block_size = tuple(facts_by_rank), by_stage[0].block_size
        self._requests: dict[str, TrackedRequest] = {}
        self._weights_versions: dict[int, int] = {}
        self._siblings = Siblings()
        self.counts = Counts()
        self._identity = KvIdentity(shared_namespace(facts_by_rank))
        self._parts = describe(facts_by_rank)
        self._census = StoreCensus(store)
        self._census.describe(self._identity.namespace(None), self._parts)
        self._lookup = PrefixLookup(store, timeout_s=options.lookup_timeout_s, clock=clock)
        self._ordered_saves = OrderedSaves()
        self._questions = StoreQuestions(self._lookup, facts_by_rank, self._ordered_saves, clock=clock)
        self._decider = Decider(by_stage, options, clock=clock)
        self._restorations = Restorations(
            options,
            self._decider,
            ranks_per_stage=len(facts_by_rank) // len(by_stage),
            clock=clock,
            counts=self.counts,
        )

    def knows(self, request_id: str) -> bool:
        """Whether a request was noted and has not ended."""
        return request_id in self._requests

    def new_request(self, view: RequestView) -> None:
        """Note a request and ask the store for its prefix; a second call for the same request changes nothing."""
        if view.request_id in self._requests:
            return
        wishes = Wishes.of(view.params)
        if not view.hashable:
            wishes = replace(wishes, mode=Mode.OFF)
        elif view.computes_all:
            wishes = replace(wishes, max_load_tokens=0)
        if wishes.complaint:
            logger.warning("request %s: kv_transfer_params: %s", view.request_id, wishes.complaint)
        request = TrackedRequest(
            request_id=view.request_id,
            tokens=view.tokens,
            num_prompt_tokens=view.num_prompt_tokens,
            computes_all=view.computes_all,
            wishes=wishes,
            adapter=view.adapter,
            prefix=RequestPrefix(
                namespace="", chunk_tokens=self._options.chunk_tokens, salt=view.salt, media=view.media
            ),
        )
        self._requests[view.request_id] = request
        self._siblings.join(view.request_id)
        if wishes.mode is Mode.OFF:
            request.reason = "the request asked for 'off'" if view.hashable else EMBEDDED
        self._identify(request)

    def _identify(self, request: TrackedRequest) -> None:
        """Name a request's KV by the present weights and adapter, and ask the store for it; none of it exists yet."""
        request.claim = None if request.adapter is None else self._identity.claim(request.adapter)
        request.generation = self._identity.generation
        namespace = self._identity.namespace(request.claim)
        self._census.describe(namespace, self._parts | self._identity.parts(request.claim))
        request.prefix = replace(request.prefix, namespace=namespace)
        request.forget_store()
        if request.wishes.mode is Mode.OFF:
            return
        if request.adapter is not None and request.claim is None:
            request.generation = MIXED
            request.reason = (
                f"the files of its adapter {request.adapter.name!r} in {request.adapter.path} cannot be read"
            )
        elif self._identity.stopped:
            request.reason = self._identity.stopped
        else:
            self._questions.ask(request)

    def _ask_anew(self, request: TrackedRequest, num_preemptions: int) -> None:
        """Ask again where the answer is out of date: the engine has another generation, or vLLM took the KV away."""
        if request.generation != self._identity.generation:
            self._identify(request)  # vLLM asks only while it has computed nothing of it, or nothing is left of it
        elif num_preemptions != request.num_preemptions:
            request.decision = None
            if request.wishes.mode is not Mode.OFF:
                self._questions.ask(request)  # by now the store may hold what the request itself has computed
        request.num_preemptions = num_preemptions

    def num_matched(self, request_id: str, num_computed: int, *, num_preemptions: int = 0) -> int | None:
        """Tokens to restore beyond ``num_computed``; 0 for none, None to be asked again in the next step."""
        request = self._requests.get(request_id)
        if request is None:
            return 0
        request.asked_by_vllm = True
        request.num_local, request.num_brought = num_computed, 0
        self._ask_anew(request, num_preemptions)
        if request.wishes.mode is Mode.OFF or request.lookup is None or request.given_up:
            return 0
        if not self._questions.answered(request):
            return None
        request.allocating = None
        decision = request.decision
        if decision is None or decision.start != num_computed:
            decision = self._decide(request, num_computed)
        if decision.end > decision.start:
            shared = self._restorations.shared(request, decision)
            if shared.sharing is Sharing.WAIT:
                return None
            if shared.sharing is Sharing.COPY:
                # Not kept: the blocks are the other's only as long as it is under way. vLLM allocates in this step.
                request.allocating = self._decider.behind_copy(decision, shared)
            else:
                request.allocating = decision
        return decision.end - decision.start

    def _decide(self, request: TrackedRequest, num_computed: int) -> Decision:
        decision = self._decider.decide(
            request, start=num_computed, num_tokens=len(request.tokens), num_stored=request.num_stored
        )
        request.decision, request.reason = decision, decision.reason
        if request.lookup is not None and request.lookup.timed_out:
            self.counts.lookup_timeouts += 1  # once a decision: vLLM asks in every step while the request waits
            request.reason = f"the store did not answer within {self._options.lookup_timeout_s:g} s"
        if decision.end == decision.start and decision.plan is not None and decision.plan.guard is not None:
            self.counts.guard[Choice.RECOMPUTE.value] += 1
        return decision

    def allocated(self, request_id: str, block_ids: Sequence[int], num_external: int) -> None:
        """Begin a restoration that vLLM has set blocks aside for, of ``num_external`` tokens; 0 is none."""
        request = self._requests.get(request_id)
        if num_external == 0 or request is None:
            return
        decision = request.allocating
        if decision is None or decision.end - decision.start != num_external:
            raise AssertionError(f"vLLM allocated {num_external} tokens for {request_id}, decided was {decision}")
        self._restorations.start(request, decision, block_ids)
        request.decision = request.allocating = None

    def passed_over(self, request_id: str, *, num_brought: int | None) -> None:
        """Note that vLLM has set blocks aside without asking for a restoration.

        Args:
            request_id: vLLM's.
            num_brought: Tokens that some connector brings; None where that is not known.
        """
        request = self._requests.get(request_id)
        if request is None or request.restoration is not None or request.records:
            return  # vLLM calls again when our own restoration has ended
        request.num_brought = 1 if num_brought is None else num_brought
        if num_brought or request.allocating is not None:
            request.allocating, request.reason = None, BROUGHT_BY_ANOTHER

    def step(
        self, scheduled: Iterable[ScheduledRequest], block_ids_of: BlockIdsOf, *, num_scheduled_tokens: int
    ) -> StepWork:
        """Order the work of one step: restorations go on, computed chunks are saved.

        Args:
            scheduled: The requests of the step.
            block_ids_of: KV blocks of a request of the step; asked only where a chunk is to be saved.
            num_scheduled_tokens: Tokens of the step's forward; 0 when nobody runs.
        """
        saves, captures = self._saves(scheduled, block_ids_of) if self._options.save else ((), ())
        generation = self._identity.generation
        if not saves and not captures and self._restorations.idle:
            return StepWork(generation=generation) if generation else NOTHING
        orders = self._restorations.step(saves, busy=num_scheduled_tokens > 0)
        versions = dict(self._weights_versions)
        return replace(orders, captures=captures, weights_versions=versions, generation=generation)

    def _saves(
        self, scheduled: Iterable[ScheduledRequest], block_ids_of: BlockIdsOf
    ) -> tuple[tuple[SaveWork, ...], tuple[CaptureWork, ...]]:
        saves: list[SaveWork] = []
        captures: list[CaptureWork] = []
        capturing = any(facts.boundary_token_bytes for facts in self._ranks)
        for each in scheduled:
            request = self._requests.get(each.request_id)
            if request is None or request.wishes.mode is Mode.OFF or not self._is_current(request):
                continue
            if each.unproven:
                request.proven_after = len(request.tokens)
            if len(request.tokens) <= request.proven_after:
                continue
            if capturing and (capture := self._capture(request, each)) is not None:
                captures.append(capture)
            orders = request.saves(
                num_computed=each.num_computed,
                block_ids_of=block_ids_of,
                block_size=self._block_size,
                decode_too=self._options.save_decode_kv,
            )
            saves += self._ordered_saves.new(orders, asked_at=request.asked_at)
        return tuple(saves), tuple(captures)

    def _is_current(self, request: TrackedRequest) -> bool:
        """Whether all of a request's KV is of the weights and the adapter that its name stands for."""
        if self._identity.stopped or request.generation != self._identity.generation:
            return False
        return not self._identity.may_be_old(
            request.adapter, num_local=request.num_local, num_brought=request.num_brought
        )

    def _capture(self, request: TrackedRequest, scheduled: ScheduledRequest) -> CaptureWork | None:
        return request.capture(
            start=scheduled.num_computed - scheduled.num_scheduled,
            end=scheduled.num_computed,
            decode_too=self._options.save_decode_kv,
        )

    def reset(self) -> None:
        """Restore nothing that was saved so far; what is being restored is given up. The store keeps it for others."""
        self._identity.reset()
        self._restorations.discard("the connector was reset")
        logger.info("reset: nothing saved so far is restored any more; from now on KV is saved for this engine alone")

    def local_cache_was_reset(self) -> None:
        """VLLM has emptied its own prefix cache."""
        self._identity.local_cache_was_reset()

    def take_news(self, news: Mapping[int, ModelNews]) -> None:
        """Take in what became of the workers' weights and adapters, by rank; before the report of the same step."""
        for each in news.values():
            for restore_id, reason in each.refused.items():
                self._restorations.discard(reason, restore_id)
            for request in self._requests.values():
                if request.claim is not None and request.claim.number in each.replaced_adapters:
                    request.generation = MIXED
        changes = {rank: each.weights for rank, each in news.items() if each.weights is not None}
        self._weights_versions |= {rank: change.version for rank, change in changes.items()}
        if changes:
            self._weights_changed(min(changes.values(), key=lambda change: change.announced))

    def _weights_changed(self, change: WeightsChange) -> None:
        if change.announced:
            self._identity.weights_changed()
            logger.warning(
                "the model's weights were changed (%s): nothing saved so far is restored any more, and KV is saved for "
                "this engine alone. Reset vLLM's prefix cache too (reset_prefix_cache): it holds KV of the old weights",
                change.how,
            )  # fmt: skip
        elif not self._identity.stopped:
            self._identity.weights_changed(
                stop=f"the model's weights were changed without notice ({change.how}); reset the connector to go on"
            )
            logger.error(
                "the model's weights were changed without notice (%s): nothing is saved or restored until the "
                "connector is reset (POST /reset_prefix_cache?reset_external=true, or "
                "reset_prefix_cache(reset_connector=True))", change.how,
            )  # fmt: skip
        self._restorations.discard("the model's weights have changed")

    def take_report(self, report: StepReport) -> None:
        """Take in what the workers did."""
        self._restorations.apply(report)

    def load_failed(self) -> None:
        """Save nothing of requests whose prefix another connector was to load, and of which no token came since.

        A load failed, and vLLM computes again what depended on it: not in all of its runners with the right result.
        """
        for request in self._requests.values():
            if len(request.tokens) <= request.proven_after:
                request.proven_after = sys.maxsize

    def finished(self, request_id: str) -> dict[str, Any] | None:
        """A request ended or was aborted; what is under way for it is cancelled.

        Returns:
            What the response's ``kv_transfer_params`` are to hold; None for nothing.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        if request.restoration is not None:
            self._restorations.cancel(request)
        answer: dict[str, Any] = {}
        if request.wishes.complaint:
            answer["cacheflow_error"] = request.wishes.complaint
        if request.wishes.explain or self._options.explain:
            answer["cacheflow"] = request.records
            if not any(record["outcome"] == "done" for record in request.records):
                answer["cacheflow_reason"] = why_unrestored(request)
        return self._siblings.ended(request_id, answer) or None

    @property
    def has_work(self) -> bool:
        """Whether a restoration is under way."""
        return not self._restorations.idle

    def close(self) -> None:
        """End the lookups and the census."""
        self._lookup.close()
        self._census.close()
