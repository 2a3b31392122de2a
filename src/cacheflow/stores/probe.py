"""Measures a store's link: latency of one small read, bandwidth of pipelined reads of cell-sized objects."""

from __future__ import annotations

import statistics
import time
import uuid
from collections import deque

import numpy as np

from cacheflow.errors import StoreError
from cacheflow.plan.problem import LinkCost
from cacheflow.stores.base import GetHandle, GetRequest, PutOutcome, PutRequest, Store
from cacheflow.stores.keys import ObjectKey, RankKeys, chain_hash, chain_root
from cacheflow.stores.tiered import TieredStore
from cacheflow.types import LoadOutcome

_NAMESPACE = "0" * 32
_SMALL_BYTES = 4096
_DEPTH = 3


def measure_link(store: Store, *, object_bytes: int, num_objects: int = 64, rounds: int = 3) -> LinkCost:
    """Write probe objects, read them back in pipelined rounds, delete them.

    Of a store of several tiers each is measured, and told what it was measured to do; the fastest one's is returned.

    Several processes may measure one shared store at once: no two calls use the same names.

    Args:
        store: The store to measure; its capacity must hold the probes.
        object_bytes: Size of a probe, that of a cell.
        num_objects: Probes of a round.
        rounds: The best round counts, since neighbours only slow a link down; the latency is a median.

    Raises:
        StoreError: A probe could not be written or read back.
    """
    if isinstance(store, TieredStore):
        links = []
        for tier in store.tiers:
            links.append(measure_link(tier.store, object_bytes=object_bytes, num_objects=num_objects, rounds=rounds))
            tier.promise(bytes_per_s=links[-1].bytes_per_s, latency_s=links[-1].latency_s)
        return links[0]
    salt = uuid.uuid4().hex
    keys = [_probe_key(index, salt) for index in range(num_objects + 1)]
    sizes = [object_bytes] * num_objects + [_SMALL_BYTES]
    payload = np.arange(max(sizes), dtype=np.uint64).astype(np.uint8)
    try:
        handle = store.submit_put(
            [PutRequest(k, [payload[:n]], (n,), "uint8") for k, n in zip(keys, sizes, strict=True)]
        )
        outcomes = handle.wait(120.0)
        if not set(outcomes) <= {PutOutcome.STORED, PutOutcome.EXISTS}:
            raise StoreError(f"link probe: {num_objects} objects of {object_bytes} bytes could not be written")
        latency_s = statistics.median(_read_one_s(store, keys[-1], _SMALL_BYTES) for _ in range(4 * rounds))
        busy_s = min(_read_all_s(store, keys[:-1], object_bytes) for _ in range(rounds))
    finally:
        store.delete(keys)
    return LinkCost(bytes_per_s=num_objects * object_bytes / busy_s, latency_s=latency_s)


def _probe_key(index: int, salt: str) -> ObjectKey:
    chain = chain_hash(chain_root(f"cacheflow link probe {salt}"), [index])
    return RankKeys().kv(_NAMESPACE, chain.hex(), (0, 1))


def _read_one_s(store: Store, key: ObjectKey, num_bytes: int) -> float:
    started_s = time.perf_counter()
    _finish(store.submit_get([GetRequest(key, np.empty(num_bytes, np.uint8))]))
    return time.perf_counter() - started_s


def _read_all_s(store: Store, keys: list[ObjectKey], num_bytes: int) -> float:
    buffers = [np.empty(num_bytes, np.uint8) for _ in range(_DEPTH)]
    under_way: deque[GetHandle] = deque()
    started_s = time.perf_counter()
    try:
        for index, key in enumerate(keys):
            if len(under_way) == _DEPTH:
                _finish(under_way.popleft())
            under_way.append(store.submit_get([GetRequest(key, buffers[index % _DEPTH])]))
        while under_way:
            _finish(under_way.popleft())
    finally:
        for handle in under_way:
            handle.cancel()
    return time.perf_counter() - started_s


def _finish(handle: GetHandle) -> None:
    (outcome,) = handle.wait(60.0)
    if outcome is not LoadOutcome.OK:
        handle.cancel()
        raise StoreError(f"link probe: a read ended as {outcome.value if outcome else 'still pending after 60 s'}")
