"""The store of a connector; the scheduler's and the worker's half share one where they share a process."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from cacheflow.stores.base import Store
from cacheflow.stores.file import FileStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.vllm.options import ConnectorOptions


def open_store(options: ConnectorOptions) -> Store:
    """Open what the options name.

    Raises:
        StoreError: The directory is not writable or belongs to another record version.
    """
    store: Store
    if options.store == "file":
        assert options.store_path is not None, "checked by ConnectorOptions"
        # No fsync: a torn record is a counted miss, and a save must not wait for the disk.
        root = Path(options.store_path).expanduser()
        store = FileStore(root, capacity_bytes=options.cpu_bytes_to_use, fsync=False)
    else:
        store = MemoryStore(capacity_bytes=options.cpu_bytes_to_use)
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
    """The store of an engine in this process, opened by the first half that asks; give it back with ``release_store``.

    Raises:
        StoreError: See ``open_store``.
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
