"""Whether a restoration in vLLM's steps is worth them, where vLLM could prefill the prompt itself."""

from __future__ import annotations

from cacheflow.plan.plan import Choice, RestorePlan

STEP_OVERHEAD_S = 0.004
"""What a restoration costs beside its work: three engine steps without a forward, each with the engine's own sleep."""


def why_prefill(plan: RestorePlan) -> str:
    """Why vLLM's own prefill is to compute the prompt; empty when restoring pays, or the plan has no guard."""
    guard = plan.guard
    if guard is None:
        return ""
    if guard.choice in (Choice.RECOMPUTE, Choice.PREFILL):
        return guard.reason
    if plan.predicted.restore_s + STEP_OVERHEAD_S <= guard.without_loading_s:
        return ""
    return f"{guard.reason}; the steps of a restoration add {STEP_OVERHEAD_S * 1e3:g} ms, so vLLM computes it"
