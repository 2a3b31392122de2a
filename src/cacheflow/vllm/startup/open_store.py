"""The store of a connector; the scheduler's and the worker's side share one where they share a process."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from cacheflow.stores import opening
from cacheflow.stores.base import Store
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.vllm.options import ConnectorOptions


def open_store(options: ConnectorOptions) -> Store:
    """Open what the options name.

    Raises:
        ConfigError: A package is missing; says which extra brings it.
        StoreError: The store cannot be reached or used.
    """
    store = opening.open_store(options.store_urls, capacity_bytes=options.cpu_bytes_to_use, retention=options.retention)
    if options.throttle_bytes_per_s is not None or options.throttle_latency_s > 0:
        store = ThrottledStore(store, options.throttle_bytes_per_s or float("inf"), options.throttle_latency_s)
    return store


@dataclass(slots=True)
class _Shared:
    store: Store
    num_users: int = 0


_lock = threading.Lock()
_by_engine: dict[str, _Shared] = {}


def acquire_store(engine_id: str, options: ConnectorOptions) -> Store:
    """The store of an engine in this process, opened for whoever asks first; give it back with ``release_store``.

    Raises:
        ConfigError, StoreError: See ``open_store``.
    """
    with _lock:
        shared = _by_engine.get(engine_id)
        if shared is None:
            shared = _by_engine[engine_id] = _Shared(open_store(options))
        shared.num_users += 1
        return shared.store


def release_store(engine_id: str) -> None:
    """Give a store back; the last user closes it."""
    with _lock:
        shared = _by_engine.get(engine_id)
        if shared is None:
            return
        shared.num_users -= 1
        if shared.num_users > 0:
            return
        del _by_engine[engine_id]
    shared.store.close()
