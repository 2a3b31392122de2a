"""What each step saves of the requests in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cacheflow.vllm.scheduler.checkpoints import CheckpointDue, StatesUnderWay
from cacheflow.vllm.scheduler.kv_identity import KvIdentity
from cacheflow.vllm.scheduler.request import TrackedRequest
from cacheflow.vllm.scheduler.request_params import Mode
from cacheflow.vllm.scheduler.saves import SaveLog
from cacheflow.vllm.scheduler.view import BlockIdsOf, ScheduledRequest, StateBlocksOf
from cacheflow.vllm.step import CaptureWork, SaveWork


class StepSaves:
    """Chunks that steps complete, with the running states and boundary states that go with them.

    Only what is proven to be of the weights and the adapter that its name stands for, and nothing twice.
    """

    def __init__(self, identity: KvIdentity, under_way: StatesUnderWay, *, captures: bool) -> None:
        """Nothing is saved yet; ``captures``: some rank saves boundary states."""
        self._identity, self._under_way, self._captures = identity, under_way, captures
        self._log = SaveLog()

    @property
    def num_saves(self) -> int:
        """Chunks that were given to workers to save so far."""
        return self._log.num_saves

    def of_step(
        self,
        requests: Mapping[str, TrackedRequest],
        scheduled: Iterable[ScheduledRequest],
        block_ids_of: BlockIdsOf,
        state_blocks_of: StateBlocksOf,
    ) -> tuple[tuple[SaveWork, ...], tuple[CaptureWork, ...]]:
        """The chunks to save after a step of these ``scheduled``, and the boundary states to set aside for later ones.

        Arguments are those of ``SchedulerSide.step``; a request that is not among ``requests`` is not saved.
        """
        saves: list[SaveWork] = []
        captures: list[CaptureWork] = []
        for each in scheduled:
            request = requests.get(each.request_id)
            if request is None or request.params.mode is Mode.OFF or not self._is_current(request, each):
                continue
            own, num_computed = request.saves, each.num_computed
            if each.unproven:
                own.distrust_loads()
            if not own.proven:
                continue
            if self._captures and (capture := own.capture(num_computed - each.num_scheduled, num_computed)) is not None:
                captures.append(capture)
            computed = own.take(request.name, num_computed=num_computed, block_ids_of=block_ids_of)
            checkpoint = self._checkpoint(request, num_computed, block_ids_of, state_blocks_of)
            if checkpoint is not None:
                computed = [*(save for save in computed if save.chunk != checkpoint.chunk), checkpoint]
            question = request.question
            new = self._log.new(computed, asked_after_saves=question.asked_after_saves if question else 0)
            for save in new:
                if save.keep:
                    self._under_way.keep(save)
            saves += new
        return tuple(saves), tuple(captures)

    def _checkpoint(
        self, request: TrackedRequest, num_computed: int, block_ids_of: BlockIdsOf, state_blocks_of: StateBlocksOf
    ) -> SaveWork | None:
        """The chunk that ends with the step, with its running states; None where they are not to be saved.

        Where vLLM schedules ahead of what it has sampled, a chunk's last token is known a step late. Then its states
        are saved in that step: vLLM still has them.
        """
        num_computed = min(num_computed, len(request.view.tokens))
        due = None if request.checkpoints is None else request.checkpoints.due(num_computed)
        if due is None:
            return None
        return request.saves.checkpoint(
            request.name,
            num_computed=num_computed,
            block_ids_of=block_ids_of,
            state_blocks_of=state_blocks_of,
            keep=due is CheckpointDue.AT_END,
        )

    def _is_current(self, request: TrackedRequest, each: ScheduledRequest) -> bool:
        """Whether all of a request's KV is of the weights and the adapter that its name stands for."""
        if self._identity.stopped or request.name.generation != self._identity.generation:
            return False
        return not self._identity.may_be_old(
            request.name.adapter,
            num_local=request.num_local,
            num_loaded=request.num_loaded,
            num_before=each.num_computed - each.num_scheduled,
        )
