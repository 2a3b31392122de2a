"""What a response says of its restorations: a record of each, or the reason why there was none.

A reason that was known when it arose stands in ``TrackedRequest.reason``: the request asked for it, its prompt has no
whole chunk or is no text, vLLM computes all of it, the store holds too little or did not answer in time, the guard, a
restoration that failed. The others follow from how far the request came.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from cacheflow.plan.report import Lane, RestoreReport
from cacheflow.restore.pipeline import PipelineRestoration
from cacheflow.vllm.scheduler.decide import Decision
from cacheflow.vllm.scheduler.request import TrackedRequest
from cacheflow.vllm.scheduler.request_params import Mode

UNNAMED = (
    "what the prompt holds besides tokens has no hash: it is given as embeddings, or an image by a name of its own "
    "(multi_modal_uuids), or vLLM hashes none (no prefix caching and mm_processor_cache_gb 0)"
)
STREAMS = "its input streams: vLLM changes the prompt while it is served, so that its chunks have no lasting names"
LOADED_BY_ANOTHER = "another connector of this engine loaded the prefix"
COMPUTES_ALL = (
    "vLLM computes all of this prompt, whatever is cached: its log-probabilities are asked for (echo, "
    "prompt_logprobs), or skip_reading_prefix_cache is set"
)
NOT_ASKED = "the request ended before vLLM asked what could be restored"
NOT_ANSWERED = "the request ended before the store said what it holds"
ENDED_FIRST = "the request ended while its prefix was being restored"

_CHILD = re.compile(r"(\d+)_(.+)", re.DOTALL)
"""vLLM's id of a choice's request: ``<index>_<id of the response's request>``."""


def record_of(
    decision: Decision,
    restoration: PipelineRestoration,
    report: RestoreReport,
    *,
    outcome: str,
    error: str,
    now_s: float,
) -> dict[str, Any]:
    """What a response says of a restoration; stage by stage where there are several."""
    staged = restoration.stage_reports(now_s)
    stages = {"stages": staged.as_dicts()} if len(staged.stages) > 1 else {}
    return (
        report.as_dict()
        | stages
        | {
            "start": decision.start,
            "end": decision.end,
            "outcome": outcome,
            "error": error,
            "bound_restore_s": staged.bound_restore_s,
        }
    )


def overlap(report: RestoreReport) -> float:
    """Share of the shorter side's busy time during which the other worked too; 0 when one side did nothing."""
    busy = {lane: sum(s.end_s - s.start_s for s in report.spans if s.lane is lane) for lane in Lane}
    shorter_s = min(busy.values())
    if shorter_s <= 0:
        return 0.0
    union_s, reached_s = 0.0, 0.0
    for span in sorted(report.spans, key=lambda s: s.start_s):
        union_s += max(0.0, span.end_s - max(span.start_s, reached_s))
        reached_s = max(reached_s, span.end_s)
    return min(1.0, max(0.0, (sum(busy.values()) - union_s) / shorter_s))


def answer_of(request: TrackedRequest, *, explain: bool) -> dict[str, Any]:
    """What the response's ``kv_transfer_params`` say of a request.

    Returns:
        ``cacheflow`` (records) and ``cacheflow_reason`` where the request or the operator (``explain``) asked for them,
        and ``cacheflow_error``.
    """
    answer: dict[str, Any] = {}
    if request.params.complaint:
        answer["cacheflow_error"] = request.params.complaint
    if request.params.explain or explain:
        answer["cacheflow"] = request.records
        if not request.restored:
            answer["cacheflow_reason"] = _why_unrestored(request)
    return answer


def _why_unrestored(request: TrackedRequest) -> str:
    if request.view.computes_all and request.params.mode in (Mode.AUTO, Mode.LOAD):
        return COMPUTES_ALL
    if request.reason:
        return request.reason
    if request.records:
        return ENDED_FIRST
    if request.decision is None:
        return NOT_ASKED if not request.asked_by_vllm else NOT_ANSWERED
    offered = request.decision.end - request.decision.start
    return (
        f"vLLM did not take up the {offered} tokens that were offered: the request ended first, or another connector "
        "of the engine loaded them"
    )


@dataclass(slots=True)
class _Family:
    members: set[str] = field(default_factory=set)
    joined: int = 0
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)


class Siblings:
    """The requests of responses with several choices (``n`` above 1). Scheduler's thread alone.

    vLLM makes a request of each choice, and answers with the parameters of the one that ended last. So each one's
    answer holds those of the siblings that ended before it too.
    """

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def join(self, request_id: str) -> None:
        """Note that a request has begun."""
        if (match := _CHILD.fullmatch(request_id)) is not None:
            family = self._families.setdefault(match[2], _Family())
            family.members.add(request_id)
            family.joined += 1

    def ended(self, request_id: str, answer: dict[str, Any]) -> dict[str, Any]:
        """A request's ``answer`` with those of its siblings that have ended; its own where it has none.

        Returns:
            The records of all of them, each with its ``choice_index``; the reason of the first choice where nothing was
            restored for any.
        """
        match = _CHILD.fullmatch(request_id)
        family = None if match is None else self._families.get(match[2])
        if match is None or family is None or request_id not in family.members:
            return answer
        family.answers[int(match[1])] = answer
        family.members.remove(request_id)
        if not family.members:
            del self._families[match[2]]
        return answer if family.joined == 1 else _together(family.answers)


def _together(answers: dict[int, dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for index, answer in sorted(answers.items()):
        for key, value in answer.items():
            if key == "cacheflow":
                merged.setdefault(key, []).extend(record | {"choice_index": index} for record in value)
            else:
                merged.setdefault(key, value)
    if any(record["outcome"] == "done" for record in merged.get("cacheflow", ())):
        merged.pop("cacheflow_reason", None)
    return merged
