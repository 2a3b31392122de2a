"""What the scheduler side keeps of one request, from its arrival to its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cacheflow.vllm.scheduler.checkpoints import RequestCheckpoints
from cacheflow.vllm.scheduler.decide import Decision
from cacheflow.vllm.scheduler.kv_identity import KvName
from cacheflow.vllm.scheduler.lookup import StoreQuestion
from cacheflow.vllm.scheduler.request_params import RequestParams
from cacheflow.vllm.scheduler.request_prefix import RequestPrefix
from cacheflow.vllm.scheduler.saves import RequestSaves
from cacheflow.vllm.scheduler.view import RequestView


@dataclass(slots=True, kw_only=True)
class TrackedRequest:
    """One request. Its fields are written by ``SchedulerSide`` alone; the objects in them write their own.

    Attributes:
        view: The request as vLLM has it.
        params: What it asked for.
        prefix: Its chunks.
        saves: Which of them are still to be saved.
        name: Under which its KV is saved and looked for.
        checkpoints: Where its running states are saved; None in a model without recurrent layers.
        question: What the store was asked of it and has answered; None where it was not asked.
        num_preemptions: How often vLLM had preempted it when the store was last asked.
        asked_by_vllm: vLLM has asked how much can be restored.
        taken_up: vLLM has taken what it was offered when it last asked.
        num_local: Tokens that vLLM's own prefix cache held when it was scheduled.
        num_loaded: Tokens that another connector loaded.
        decision: The last decision; None before the first.
        offered: What vLLM was offered in this step, with what can be copied now; None otherwise.
        given_up: A restoration failed: vLLM asks again for a request of which nothing was restored, and whatever broke
            the first attempt would break every other.
        records: Explain records of its restorations.
        reason: Why nothing was restored when it was last looked at, or why what was begun did not end well; empty when
            something was restored.
    """

    view: RequestView
    params: RequestParams
    prefix: RequestPrefix
    saves: RequestSaves
    name: KvName
    checkpoints: RequestCheckpoints | None = None
    question: StoreQuestion | None = None
    num_preemptions: int = 0
    asked_by_vllm: bool = False
    taken_up: bool = False
    num_local: int = 0
    num_loaded: int = 0
    decision: Decision | None = None
    offered: Decision | None = None
    given_up: bool = False
    records: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""

    @property
    def restored(self) -> bool:
        """Whether one of its restorations is done."""
        return any(record["outcome"] == "done" for record in self.records)
