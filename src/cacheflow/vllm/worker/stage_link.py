"""Neighbouring pipeline stages: a chunk's activations, handed over in order where no boundary states are stored.

By vLLM's own pipeline group, on its CPU side, with a tag of its own: what vLLM itself sends between the same two ranks
in the same step is never taken for it. What is sent is received in the next step, or in the same one where that is
the receiver's last (``restore/pipeline.py``).
"""

from __future__ import annotations

import logging
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from cacheflow.restore.work import RestoreTarget
from cacheflow.vllm.models.boundary_states import BoundaryShape, States
from cacheflow.vllm.models.model_access import ModelHandle

logger = logging.getLogger(__name__)

FIRST_TAG = 1 << 30
"""vLLM's own messages have tag 0."""
TAG_RESTORATIONS, TAG_CHUNKS = 1 << 16, 1 << 14
"""Messages have a tag for each chunk of each restoration, because several restorations' hand-overs may be received in
another order than they were sent in; tags are used again after so many restorations."""
PATIENCE_S = 120.0
"""How long a stage waits for what it is to take. It comes or is answered for unless the other rank has died or
stands still; torch then closes the connection, and vLLM, which uses it too, ends with an error of its own."""


class StageLink:
    """This rank's connection to the same tensor-parallel rank of the stages below and above. Main thread only."""

    def __init__(self, group: Any, *, device: torch.device, shape: BoundaryShape) -> None:  # noqa: ANN401
        """Use vLLM's pipeline group (``GroupCoordinator``); ``shape`` is what every stage hands to the next."""
        self._group, self._device, self._shape = group, device, shape
        self._sent: deque[list[tuple[Any, torch.Tensor]]] = deque([[]])
        # Received in the next step; vLLM has as many steps under way as there are stages, and one more where it
        # schedules asynchronously. What was sent in the step before those has been received when a step begins, so
        # waiting for it takes no time.
        self._num_steps_kept = group.world_size + 2

    @property
    def has_stage_above(self) -> bool:
        """Whether there is a stage to send to."""
        return not self._group.is_last_rank

    def begin_step(self) -> None:
        """Free what was received; to be called before a step's work."""
        self._sent.append([])
        while len(self._sent) > self._num_steps_kept:
            for work, _ in self._sent.popleft():
                try:
                    work.wait(timedelta(seconds=PATIENCE_S))
                except RuntimeError:  # the stage above is gone, which vLLM itself finds out
                    logger.warning("the pipeline stage above did not take what it was sent", exc_info=True)

    def send(self, states: States | None, *, restore_id: int, chunk: int, num_tokens: int) -> None:
        """Hand a chunk's activations to the stage above, or word that there are none; does not wait for it."""
        message = torch.zeros(1 + self._num_bytes(num_tokens), dtype=torch.uint8)
        if states is not None:
            message[0] = 1
            message[1:] = self._shape.pack(states)
        work = torch.distributed.isend(
            message, self._group.next_rank, group=self._group.cpu_group, tag=_tag(restore_id, chunk)
        )
        self._sent[-1].append((work, message))

    def receive(self, *, restore_id: int, chunk: int, num_tokens: int) -> States | None:
        """Take what the stage below hands over; None when it could not recompute it.

        Raises:
            RuntimeError: It did not come in time, or that stage is gone.
        """
        message = torch.empty(1 + self._num_bytes(num_tokens), dtype=torch.uint8)
        work = torch.distributed.irecv(
            message, self._group.prev_rank, group=self._group.cpu_group, tag=_tag(restore_id, chunk)
        )
        assert work is not None, "this rank is in its own group"
        work.wait(timedelta(seconds=PATIENCE_S))
        if not message[0]:
            return None
        return self._shape.unpack(message[1:], num_tokens=num_tokens, device=self._device)

    def _num_bytes(self, num_tokens: int) -> int:
        return num_tokens * self._shape.token_bytes


class StageAnswers:
    """Answers the stages above and below for a restoration that cannot begin on this rank (``HandOverPort``)."""

    def __init__(self, link: StageLink, target: RestoreTarget) -> None:
        self._link, self._target = link, target

    def receive(self, chunk: int) -> None:
        """Take what is sent and drop it."""
        self._link.receive(restore_id=self._target.restore_id, chunk=chunk, num_tokens=self._num_tokens(chunk))

    def send(self, chunk: int, *, failed: bool) -> None:
        """Send the stage above word that there is nothing."""
        assert failed, "nothing was recomputed"
        num_tokens = self._num_tokens(chunk)
        self._link.send(None, restore_id=self._target.restore_id, chunk=chunk, num_tokens=num_tokens)

    def _num_tokens(self, chunk: int) -> int:
        start, end = self._target.chunk_range(chunk)
        return end - start


def _tag(restore_id: int, chunk: int) -> int:
    return FIRST_TAG + restore_id % TAG_RESTORATIONS * TAG_CHUNKS + chunk % TAG_CHUNKS


def can_link(handle: ModelHandle) -> bool:
    """Whether this stage can be handed what the one below recomputed."""
    return handle.can_recompute and not handle.is_first_stage


def link_stages(handle: ModelHandle) -> StageLink | None:
    """This rank's link to its neighbours; None in an engine of one stage, and where nothing is recomputed."""
    if handle.shard.pp_size == 1 or not handle.can_recompute:
        return None
    from vllm.distributed.parallel_state import get_pp_group

    shape = BoundaryShape.of(handle.model, dtype=handle.dtype, device=handle.device)
    return StageLink(get_pp_group(), device=handle.device, shape=shape)
