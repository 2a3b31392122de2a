"""Why nothing of a request was restored: ``cacheflow_reason`` of its response.

A reason that was known when it arose stands in ``TrackedRequest.reason``: the request asked for it, its prompt has no
whole chunk or is no text, vLLM computes all of it, the store holds too little or did not answer in time, the guard, a
restoration that failed. What is left is told here from how far the request came.
"""

from __future__ import annotations

from cacheflow.vllm.scheduler.request import TrackedRequest
from cacheflow.vllm.scheduler.wishes import Mode

EMBEDDED = "the prompt is given as embeddings: its token ids do not say what it is"
BROUGHT_BY_ANOTHER = "another connector of this engine brought the prefix"
COMPUTES_ALL = (
    "vLLM computes all of this prompt, whatever is cached: its log-probabilities are asked for (echo, "
    "prompt_logprobs), or skip_reading_prefix_cache is set"
)
NOT_ASKED = "the request ended before vLLM asked what could be restored"
NOT_ANSWERED = "the request ended before the store said what it holds"
ENDED_FIRST = "the request ended while its prefix was being restored"


def why_unrestored(request: TrackedRequest) -> str:
    """The reason, for a request of which no restoration is done."""
    if request.computes_all and request.wishes.mode in (Mode.AUTO, Mode.LOAD):
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
        "of the engine brought them"
    )
