"""Handles that hold outcomes back until a gate lets them pass.

They need no thread of their own: the thread that waits for an outcome sleeps until it may be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition
from typing import Generic, Protocol

from cacheflow.stores.base import Handle
from cacheflow.stores.handle import Ledger, O, wait_s
from cacheflow.types import Clock


class Gate(Protocol):
    """Decides when the items of one batch pass; called with the handle's condition held."""

    def release_at_s(self, index: int, *, done: bool | None) -> float:
        """When an item may pass; ``inf`` for never. May change until it has passed.

        ``done`` says whether the inner store has done it, None while it works on it.
        """
        ...

    def forget(self, index: int, now_s: float) -> None:
        """An item has its outcome."""
        ...


@dataclass(frozen=True, slots=True)
class Held(Generic[O]):
    """Where the outcome of one item comes from: an item of the inner batch, or given from the start (or neither)."""

    inner_index: int | None = None
    outcome: O | None = None


@dataclass(frozen=True, slots=True)
class FixedGate:
    """Lets each item pass at a time known from the start: ``-inf`` for at once, ``inf`` for never."""

    release_times_s: tuple[float, ...]

    def release_at_s(self, index: int, *, done: bool | None) -> float:
        """See ``Gate``; failures are held like successes."""
        del done
        return self.release_times_s[index]

    def forget(self, index: int, now_s: float) -> None:
        """See ``Gate``; nothing to do."""


class HeldHandle(Generic[O]):
    """A batch whose outcomes become known when a gate lets them pass, not when the inner store has them."""

    def __init__(
        self, inner: Handle[O], items: Sequence[Held[O]], gate: Gate, *, ledger: Ledger[O], condition: Condition,
        clock: Clock,
    ) -> None:  # fmt: skip
        """Hold the outcomes of ``inner`` back.

        Args:
            inner: The batch submitted to the inner store.
            items: Where each outcome comes from.
            gate: When each may pass.
            ledger: Where it is written; one per handle.
            condition: Guards gate and ledger; notified when a gate's times change.
            clock: Monotonic clock.
        """
        self._inner = inner
        self._items = items
        self._gate = gate
        self._ledger = ledger
        self._condition = condition
        self._clock = clock
        self._pending_until_s = [float("-inf")] * len(items)

    def poll(self) -> tuple[O | None, ...]:
        """See ``Handle.poll``."""
        with self._condition:
            self._update()
            return tuple(self._ledger.outcomes)

    def wait(self, timeout_s: float | None = None) -> tuple[O | None, ...]:
        """See ``Handle.wait``."""
        until_s = float("inf") if timeout_s is None else self._clock() + timeout_s
        while True:
            with self._condition:
                now_s, wake_s, inner_pending = self._update()
                if not self._ledger.num_pending or now_s >= until_s:
                    return tuple(self._ledger.outcomes)
                timeout = wait_s(min(until_s, wake_s), now_s)
                if not inner_pending:
                    self._condition.wait(timeout)
            if inner_pending:  # first, since a failure may pass before the gate would let a success pass
                self._inner.wait(timeout)

    def cancel(self) -> None:
        """See ``Handle.cancel``."""
        with self._condition:
            now_s, _, _ = self._update()
            for index in self._pending():
                self._settle(index, self._ledger.verdicts.cancelled, now_s)
            self._condition.notify_all()
        self._inner.cancel()

    def _update(self) -> tuple[float, float, bool]:
        """Let pass what may.

        Returns:
            Now; when the gate lets the next item pass; whether the inner store still works on an item.
        """
        now_s = self._clock()
        inner = self._inner.poll()
        wake_s = deadline_s = self._ledger.deadline_at_s
        inner_pending = False
        for index in self._pending():
            item = self._items[index]
            outcome = item.outcome if item.inner_index is None else inner[item.inner_index]
            done = None if outcome is None else outcome is self._ledger.verdicts.done
            release_s = self._gate.release_at_s(index, done=done)
            if outcome is None and item.inner_index is not None:
                self._pending_until_s[index] = now_s
                inner_pending = True
            if release_s > min(now_s, deadline_s):
                wake_s = min(wake_s, release_s)
            elif outcome is not None:
                # the time it was due, unless the inner store is what it waited for
                self._settle(index, outcome, release_s if release_s > self._pending_until_s[index] else now_s)
        if now_s >= deadline_s:
            for index in self._pending():
                self._settle(index, self._ledger.verdicts.late, now_s)
        return now_s, wake_s, inner_pending

    def _pending(self) -> list[int]:
        return [index for index, outcome in enumerate(self._ledger.outcomes) if outcome is None]

    def _settle(self, index: int, outcome: O, at_s: float) -> None:
        self._ledger.settle(index, outcome, at_s)
        self._gate.forget(index, self._clock())
