"""How much of an engine step may go to recomputation: all of it while no request runs, a budget while others decode."""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.restore.decode_pace import DecodeLatency

IDLE_COMPUTE_BUDGET_S = 0.05
"""Compute per step while nobody decodes: with 1.2 ms of overhead a step, restorations end at 1.03 of the
bound; with half of it at 1.05; with more, a request that arrives in the middle waits longer for little."""
READ_AHEAD_S = 0.12
"""Reads under way, in seconds of the link: two such steps and a bit, because work may be given a step
before the reports it lacks; one step less, and the link idles (1.3 of the bound)."""
IDLE_WAIT_S = 0.002
"""With nothing to compute and no request running, a worker waits this long for a read to end before the step ends."""
IDLE_CHUNK_SHARE = 0.25
"""Part of what a chunk takes that a step recomputes while no request runs: where chunks are slow, steps cost more as
well. A request that arrives then waits less than it would for a step of vLLM's own prefill."""
CHUNK_SHARE = 0.1
"""Part of what a chunk takes that a step may recompute while others decode, without ``recompute_budget_ms``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBudget:
    """What one step may do for restorations.

    Attributes:
        compute_s: Seconds of recomputation; 0 for none.
        unit_s: Seconds the least work takes; what is left below it goes to no restoration.
        read_ahead_s: Seconds of the link to keep under way.
        wait_s: How long a worker with nothing to compute may wait for a read.
    """

    compute_s: float
    unit_s: float
    read_ahead_s: float
    wait_s: float

    def left_s(self, spent_s: float) -> float:
        """What the next restoration may use of ``compute_s``; 0 where no unit fits."""
        left_s = self.compute_s - spent_s
        return left_s if left_s >= self.unit_s else 0.0


class StepPace:
    """Sets the budget of each step from what recent steps took. Time is passed in."""

    def __init__(self, *, recompute_budget_ms: float | None, itl_slo_ms: float | None) -> None:
        self._budget_s = None if recompute_budget_ms is None else recompute_budget_ms * 1e-3
        self._latency = DecodeLatency(None if itl_slo_ms is None else itl_slo_ms * 1e-3)
        self._last_s: float | None = None
        self._computed_s = 0.0

    def note_computed(self, seconds: float) -> None:
        """Note recomputation that was done in the last steps."""
        self._computed_s += seconds

    def rest(self) -> None:
        """Nothing is being restored from now on: the time until the next budget is asked for is not that of a step."""
        self._last_s = None

    def budget(self, now_s: float, *, busy: bool, chunk_s: float, unit_s: float) -> StepBudget:
        """The budget of the step that is being made.

        ``busy``: other requests run in it. A chunk takes ``chunk_s`` to recompute, the least work ``unit_s``.
        """
        self._observe(now_s, busy=busy)
        if not busy:
            compute_s = max(IDLE_COMPUTE_BUDGET_S, IDLE_CHUNK_SHARE * chunk_s)
            read_ahead_s = READ_AHEAD_S * compute_s / IDLE_COMPUTE_BUDGET_S
            return StepBudget(compute_s=compute_s, unit_s=unit_s, read_ahead_s=read_ahead_s, wait_s=IDLE_WAIT_S)
        # At least a unit: more than a tenth of a chunk where layers are few, or all in one block (compiled).
        compute_s = max(CHUNK_SHARE * chunk_s if self._budget_s is None else self._budget_s, unit_s)
        compute_s = min(compute_s, self._latency.left_s)
        if compute_s < unit_s:
            compute_s = 0.0
        read_ahead_s = max(READ_AHEAD_S, 3 * ((self._latency.round_s or 0.0) + compute_s))
        return StepBudget(compute_s=compute_s, unit_s=unit_s, read_ahead_s=read_ahead_s, wait_s=0.0)

    def _observe(self, now_s: float, *, busy: bool) -> None:
        """Learn from the time since the last step, without the recomputation in it."""
        if busy and self._last_s is not None:
            self._latency.note(max(0.0, now_s - self._last_s - self._computed_s))
        self._last_s = now_s if busy else None
        self._computed_s = 0.0
