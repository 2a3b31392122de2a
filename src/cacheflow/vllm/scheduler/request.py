"""What the scheduler side keeps of one request, from its arrival to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.restore.pipeline import PipelineRestoration
from cacheflow.vllm.adapters import Adapter, AdapterClaim
from cacheflow.vllm.scheduler.lookup import Lookup
from cacheflow.vllm.scheduler.request_prefix import RequestPrefix
from cacheflow.vllm.scheduler.wishes import Wishes
from cacheflow.vllm.step import CaptureWork, SaveWork

MIXED = -1
"""Generation of a request whose KV is of more than one state of the weights or of its adapter: it is not saved."""
BlockIdsOf = Callable[[str], Sequence[int]]
"""KV blocks of a request, in order, by its id."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagePlan:
    """How one pipeline stage is to restore its layers.

    Attributes:
        problem: Costs.
        plan: The policy's plan.
        source: Where the activations below its first layer come from.
    """

    problem: RestoreProblem
    plan: RestorePlan
    source: BoundarySource = BoundarySource.FIRST_STAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a prefix is to be restored, for one state of the local prefix cache.

    Attributes:
        start: Tokens that are in the KV cache already.
        end: Tokens that will be there after the restoration; equals ``start`` when nothing is restored.
        stages: A plan for each pipeline stage, bottom first; none when nothing is restored, and none was considered.
        planning_s: Seconds the plan took.
        copied_from: KV blocks of another restoration that hold the tokens behind ``start``; they are copied, the rest
            is restored.
        reason: Why nothing is restored; empty when something is.
    """

    start: int
    end: int
    stages: tuple[StagePlan, ...] = ()
    planning_s: float = 0.0
    copied_from: tuple[int, ...] = ()
    reason: str = ""

    @property
    def slowest(self) -> StagePlan | None:
        """The stage that is predicted to take longest; None without stages."""
        return max(self.stages, key=lambda stage: stage.plan.predicted.restore_s, default=None)

    @property
    def problem(self) -> RestoreProblem | None:
        """Costs of the slowest stage."""
        return None if self.slowest is None else self.slowest.problem

    @property
    def plan(self) -> RestorePlan | None:
        """Plan of the slowest stage."""
        return None if self.slowest is None else self.slowest.plan


@dataclass(slots=True, kw_only=True)
class TrackedRequest:
    """One request. Only the scheduler's thread touches it.

    Attributes:
        request_id: vLLM's.
        tokens: Its known token ids, a live view.
        num_prompt_tokens: Tokens of the prompt.
        wishes: What it asked for.
        prefix: Its chunks.
        adapter: Its LoRA adapter; None without.
        claim: The adapter by the content of its files; None without one, or where they cannot be read.
        generation: The engine's generation (``KvIdentity``) in which its KV is computed; ``MIXED`` where its KV is of
            more than one, or of an adapter that cannot be told.
        num_local: Tokens that vLLM's own prefix cache held when it was scheduled.
        num_brought: Tokens that another connector brought.
        lookup: The question to the store; None before it was asked.
        asked_at: When it was asked, as ``OrderedSaves`` counts.
        asked_at_s: ... and in seconds.
        asked_again: The question was repeated, because chunks were saved while the request queued.
        boundary_lookups: The question about the boundary states of each stage behind the first.
        num_stored: Leading chunks the store is known to hold.
        num_boundaries: Leading chunks of whose boundary states it is known, for each stage behind the first.
        next_save: The first chunk that was not ordered to be saved.
        proven_after: Nothing is saved before it has more tokens: the next one shows that what another connector loaded
            for a step was there. 0 where none did, more than there can be where the load failed.
        decision: The last decision; None before the first.
        allocating: The decision vLLM was told of in this step, with what can be copied now; None otherwise.
        restoration: What is under way; None otherwise.
        num_preemptions: How often vLLM had preempted it when the store was last asked.
        given_up: A restoration failed: vLLM asks again for a request of which nothing was restored, and whatever broke
            the first attempt would break every other.
        computes_all: vLLM computes the whole prompt, whatever is cached of it.
        asked_by_vllm: vLLM has asked how much can be restored.
        records: Explain records of its restorations.
        reason: Why nothing was restored when it was last looked at, or why what was begun did not end well; empty when
            something was restored.
    """

    request_id: str
    tokens: Sequence[int]
    num_prompt_tokens: int
    wishes: Wishes
    prefix: RequestPrefix
    adapter: Adapter | None = None
    claim: AdapterClaim | None = None
    generation: int = 0
    num_local: int = 0
    num_brought: int = 0
    lookup: Lookup | None = None
    boundary_lookups: tuple[Lookup, ...] = ()
    asked_at: int = 0
    asked_at_s: float = 0.0
    asked_again: bool = False
    num_stored: int = 0
    num_boundaries: tuple[int, ...] = ()
    next_save: int = 0
    proven_after: int = 0
    decision: Decision | None = None
    allocating: Decision | None = None
    restoration: PipelineRestoration | None = None
    num_preemptions: int = 0
    given_up: bool = False
    computes_all: bool = False
    asked_by_vllm: bool = False
    records: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""

    def forget_store(self) -> None:
        """Forget what the store was asked and has answered: the request's KV has another name from now on."""
        self.lookup, self.boundary_lookups, self.asked_again = None, (), False
        self.num_stored, self.num_boundaries, self.next_save = 0, (), 0
        self.decision = None

    def save_again(self, chunk: int) -> None:
        """Count a chunk as not stored: it could not be read, and is written again unless the store has it after all."""
        self.num_stored, self.next_save = min(self.num_stored, chunk), min(self.next_save, chunk)

    def capture(self, *, start: int, end: int, decode_too: bool) -> CaptureWork | None:
        """What to keep of boundary states of tokens ``[start, end)``, which the step computes; asked before ``saves``.

        Args:
            start: First token of the step.
            end: One past its last.
            decode_too: Save chunks with tokens behind the prompt.
        """
        chunk_tokens = self.prefix.chunk_tokens
        start = max(start, max(self.next_save, self.num_stored) * chunk_tokens)
        limit = end if decode_too else min(end, self.num_prompt_tokens // chunk_tokens * chunk_tokens)
        return CaptureWork(request_id=self.request_id, start=start, end=limit) if start < limit else None

    def saves(
        self, *, num_computed: int, block_ids_of: BlockIdsOf, block_size: int, decode_too: bool
    ) -> list[SaveWork]:
        """Chunks that are wholly computed and were not saved before; they count as saved from now on.

        Args:
            num_computed: Tokens whose KV is there when this step's forward is through.
            block_ids_of: KV blocks of a request; asked only when there is something to save.
            block_size: Tokens of a block.
            decode_too: Save chunks with tokens behind the prompt.
        """
        chunk_tokens = self.prefix.chunk_tokens
        limit = min(num_computed, len(self.tokens) if decode_too else self.num_prompt_tokens)
        end = (max(self.next_save, self.num_stored) + 1) * chunk_tokens
        if end > limit:
            return []
        self.next_save = max(self.next_save, self.num_stored)
        self.prefix.extend(self.tokens)
        block_ids = block_ids_of(self.request_id)
        orders = []
        while end <= limit:
            first, last = (end - chunk_tokens) // block_size, end // block_size
            orders.append(
                SaveWork(
                    namespace=self.prefix.namespace,
                    chain_hash=self.prefix.hashes[self.next_save].hex(),
                    block_ids=tuple(block_ids[first:last]),
                    request_id=self.request_id,
                    chunk=self.next_save,
                    adapter=self.claim,
                )
            )
            self.next_save += 1
            end += chunk_tokens
        return orders
