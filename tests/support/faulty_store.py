"""An engine's store in memory that fails by a plan, which a test may change at any time."""

from __future__ import annotations

from typing import Any

from cacheflow.stores.faults import FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore


def faulty_store(options: Any, *, plan: FaultPlan | None = None, latency_s: float = 0.0) -> ThrottledStore:
    """Instead of ``open_store``; without a plan nothing fails at first."""
    store = FaultyStore(MemoryStore(capacity_bytes=options.cpu_bytes_to_use), plan or FaultPlan())
    return ThrottledStore(store, options.throttle_bytes_per_s, latency_s)


def inject(engine: Any, *rules: FaultRule) -> None:
    """From now on the engine's store fails by these rules."""
    engine.store.inner.set_plan(FaultPlan(rules=rules))
