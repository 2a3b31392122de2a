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
from cacheflow.restore.orders import StepReport
from cacheflow.stores.base import Store
from cacheflow.types import Clock
from cacheflow.vllm.decide import Decider
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.identity import lora_namespace, shared_namespace
from cacheflow.vllm.lookup import PrefixLookup
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.ordered_saves import OrderedSaves
from cacheflow.vllm.questions import StoreQuestions
from cacheflow.vllm.request_prefix import MediaSpan, RequestPrefix
from cacheflow.vllm.restorations import Restorations
from cacheflow.vllm.sharing import Sharing
from cacheflow.vllm.stage_plans import slowest_of_stages
from cacheflow.vllm.step import NOTHING, CaptureOrder, SaveOrder, StepOrders
from cacheflow.vllm.tracked import BlockIdsOf, Decision, TrackedRequest
from cacheflow.vllm.wishes import Mode, Wishes

logger = logging.getLogger(__name__)

NOT_TAKEN_UP = (
    "vLLM did not take up what the store holds: it computes a prompt whose log-probabilities are asked for (echo, "
    "prompt_logprobs)"
)

BROUGHT_BY_ANOTHER = "another connector of this engine brought the prefix"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """What a connector passes on of vLLM's request.

    Attributes:
        request_id: vLLM's.
        tokens: Known token ids, prompt and output; a live view that grows.
        num_prompt_tokens: Tokens of the prompt.
        salt: ``cache_salt``.
        adapter: Name and path of the LoRA adapter; None without.
        media: Images and sounds in the prompt.
        params: ``kv_transfer_params``.
        hashable: Whether the token ids say what the prompt is (not so for prompt embeddings).
    """

    request_id: str
    tokens: Sequence[int]
    num_prompt_tokens: int
    salt: str = ""
    adapter: tuple[str, str] | None = None
    media: Sequence[MediaSpan] = ()
    params: Mapping[str, Any] | None = None
    hashable: bool = True


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

    def __init__(self, options: ConnectorOptions, store: Store, *, clock: Clock) -> None:
        """Wait for the workers' facts; until then nothing is restored or saved."""
        self._options, self._store, self._clock = options, store, clock
        self._requests: dict[str, TrackedRequest] = {}
        self._lookup = PrefixLookup(store, timeout_s=options.lookup_timeout_s, clock=clock)
        self._decider: Decider | None = None
        self._restorations: Restorations | None = None
        self._facts: EngineFacts | None = None
        self._ranks: tuple[EngineFacts, ...] = ()
        self._questions: StoreQuestions | None = None
        self._namespace = ""
        self._ordered_saves = OrderedSaves()
        self.counts = Counts()

    def set_facts(self, facts_by_rank: Sequence[EngineFacts]) -> None:
        """Take in what the workers found out, before the first request.

        vLLM repeats it when it has slept. Workers answer what they found at start, so nothing changes then.
        """
        if self._ranks:
            return
        by_stage = slowest_of_stages(facts_by_rank)
        self._facts, self._ranks = by_stage[0], tuple(facts_by_rank)
        self._questions = StoreQuestions(self._lookup, facts_by_rank, self._ordered_saves, clock=self._clock)
        self._namespace = shared_namespace(facts_by_rank)
        self._decider = Decider(by_stage, self._options, clock=self._clock)
        self._restorations = Restorations(
            self._options,
            self._decider,
            ranks_per_stage=len(facts_by_rank) // len(by_stage),
            clock=self._clock,
            counts=self.counts,
        )

    def knows(self, request_id: str) -> bool:
        """Whether a request was noted and has not ended; one whose token ids do not say what it is never is."""
        return request_id in self._requests

    def new_request(self, view: RequestView) -> None:
        """Note a request and ask the store for its prefix; a second call for the same request changes nothing."""
        if self._questions is None or view.request_id in self._requests or not view.hashable:
            return
        wishes = Wishes.of(view.params)
        if wishes.complaint:
            logger.warning("request %s: kv_transfer_params: %s", view.request_id, wishes.complaint)
        namespace = self._namespace
        if view.adapter is not None:
            name, path = view.adapter
            namespace = lora_namespace(namespace, name=name, path=path)
        request = TrackedRequest(
            request_id=view.request_id,
            tokens=view.tokens,
            num_prompt_tokens=view.num_prompt_tokens,
            wishes=wishes,
            prefix=RequestPrefix(
                namespace=namespace,
                chunk_tokens=self._options.chunk_tokens,
                salt=view.salt,
                media=view.media,
            ),
        )
        self._requests[view.request_id] = request
        if wishes.mode is Mode.OFF:
            request.reason = "the request asked for 'off'"
        else:
            self._questions.ask(request)

    def num_matched(self, request_id: str, num_computed: int, *, num_preemptions: int = 0) -> int | None:
        """Tokens to restore beyond ``num_computed``; 0 for none, None to be asked again in the next step."""
        request = self._requests.get(request_id)
        if request is None or self._decider is None or self._restorations is None or self._questions is None:
            return 0
        if num_preemptions != request.num_preemptions:
            request.num_preemptions, request.decision = num_preemptions, None
            if request.wishes.mode is not Mode.OFF:
                self._questions.ask(request)  # by now the store may hold what the request itself has computed
        if request.wishes.mode is Mode.OFF or request.lookup is None or request.given_up:
            return 0
        if not self._questions.answered(request):
            return None
        request.allocating = None
        decision = request.decision
        if decision is None or decision.start != num_computed:
            decision = self._decide(request, self._decider, num_computed)
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

    def _decide(self, request: TrackedRequest, decider: Decider, num_computed: int) -> Decision:
        decision = decider.decide(
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
        if num_external == 0 or request is None or self._restorations is None:
            return
        decision = request.allocating
        if decision is None or decision.end - decision.start != num_external:
            raise AssertionError(f"vLLM allocated {num_external} tokens for {request_id}, decided was {decision}")
        self._restorations.start(request, decision, block_ids)
        request.decision = request.allocating = None

    def passed_over(self, request_id: str, *, num_brought: int) -> None:
        """Note that vLLM has set blocks aside without asking for a restoration.

        Args:
            request_id: vLLM's.
            num_brought: Tokens that some connector brings; 0 where that is none, or not known.
        """
        request = self._requests.get(request_id)
        if request is None or request.restoration is not None or request.records:
            return  # vLLM calls again when our own restoration has ended
        if num_brought or request.allocating is not None:
            request.allocating, request.reason = None, BROUGHT_BY_ANOTHER

    def step(
        self, scheduled: Iterable[ScheduledRequest], block_ids_of: BlockIdsOf, *, num_scheduled_tokens: int
    ) -> StepOrders:
        """Order the work of one step: restorations go on, computed chunks are saved.

        Args:
            scheduled: The requests of the step.
            block_ids_of: KV blocks of a request of the step; asked only where a chunk is to be saved.
            num_scheduled_tokens: Tokens of the step's forward; 0 when nobody runs.
        """
        if self._restorations is None:
            return NOTHING
        saves, captures = self._saves(scheduled, block_ids_of) if self._options.save else ((), ())
        if not saves and not captures and self._restorations.idle:
            return NOTHING
        orders = self._restorations.step(saves, busy=num_scheduled_tokens > 0)
        return replace(orders, captures=captures) if captures else orders

    def _saves(
        self, scheduled: Iterable[ScheduledRequest], block_ids_of: BlockIdsOf
    ) -> tuple[tuple[SaveOrder, ...], tuple[CaptureOrder, ...]]:
        assert self._facts is not None
        saves: list[SaveOrder] = []
        captures: list[CaptureOrder] = []
        capturing = any(facts.boundary_token_bytes for facts in self._ranks)
        for each in scheduled:
            request = self._requests.get(each.request_id)
            if request is None or request.wishes.mode is Mode.OFF:
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
                block_size=self._facts.block_size,
                decode_too=self._options.save_decode_kv,
            )
            saves += self._ordered_saves.new(orders, asked_at=request.asked_at)
        return tuple(saves), tuple(captures)

    def _capture(self, request: TrackedRequest, scheduled: ScheduledRequest) -> CaptureOrder | None:
        return request.capture(
            start=scheduled.num_computed - scheduled.num_scheduled,
            end=scheduled.num_computed,
            decode_too=self._options.save_decode_kv,
        )

    def take_report(self, report: StepReport) -> None:
        """Take in what the workers did."""
        if self._restorations is not None:
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
        if request.restoration is not None and self._restorations is not None:
            self._restorations.cancel(request)
        answer: dict[str, Any] = {}
        if request.wishes.complaint:
            answer["cacheflow_error"] = request.wishes.complaint
        if request.wishes.explain or self._options.explain:
            answer["cacheflow"] = request.records
            if not any(record["outcome"] == "done" for record in request.records):
                answer["cacheflow_reason"] = request.reason or NOT_TAKEN_UP
        return answer or None

    @property
    def has_work(self) -> bool:
        """Whether a restoration is under way."""
        return self._restorations is not None and not self._restorations.idle

    def close(self) -> None:
        """End the lookups."""
        self._lookup.close()
