"""Measures a store's link: latency of one small read, bandwidth of pipelined reads of cell-sized objects.

What is read goes through the store's codec, and looks like keys and values to it. As many reads are under way as a
restoration would have, so that a store far away is measured as it will be used.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from cacheflow.errors import StoreError
from cacheflow.plan.problem import LinkCost
from cacheflow.plan.read_window import MAX_BYTES, Flight, ReadMeter, ReadWindow
from cacheflow.stores.base import GetHandle, GetRequest, PutOutcome, PutRequest, Store
from cacheflow.stores.codec import TensorForm
from cacheflow.stores.floats import ITEM_BYTES, numbers_of, round_into
from cacheflow.stores.keys import ObjectKey, RankKeys, chain_hash, chain_root
from cacheflow.stores.record import HEADER_BYTES
from cacheflow.stores.shared import SharedStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.stores.timed_calls import ends_in_time
from cacheflow.types import Bytes, LoadOutcome

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 60.0
"""Longest wait for one read."""

DELETE_TIMEOUT_S = 60.0
"""Longest wait until the probes are deleted; what has not gone by then may stay."""

PROBES = "0" * 32
"""The namespace of what is written to be measured; what is left of it was left by a process that was killed."""
_SMALL_BYTES = 4096
_LEAST_READS = 3
_CHANNELS = 128
_SPREAD, _OFFSET = 0.7, 0.5


@dataclass(frozen=True, slots=True)
class KvLike:
    """Random numbers as keys and values have them: each channel normal, around a mean and with a spread of its own.

    Attributes:
        buffer: Their bytes.
        form: One axis of tokens, one of channels.
    """

    buffer: Bytes
    form: TensorForm

    @classmethod
    def draw(cls, num_bytes: int, *, dtype: str) -> KvLike:
        """Always the same ones; bytes, where codecs do not know the dtype or they are no whole numbers of it."""
        generator, item_bytes = np.random.default_rng(7), ITEM_BYTES.get(dtype, 1)
        if item_bytes == 1 or num_bytes % item_bytes:
            return cls(generator.integers(256, size=num_bytes, dtype=np.uint8), TensorForm((num_bytes,), "uint8"))
        num_items = num_bytes // item_bytes
        channels = math.gcd(num_items, _CHANNELS)
        values = generator.standard_normal((num_items // channels, channels), np.float32)
        values *= generator.lognormal(0.0, _SPREAD, channels).astype(np.float32)
        values += generator.normal(0.0, _OFFSET, channels).astype(np.float32)
        buffer = np.empty(num_bytes, np.uint8)
        round_into(numbers_of(buffer, dtype).reshape(values.shape), values, dtype)
        return cls(buffer, TensorForm(values.shape, dtype, (0,)))

    def request(self, key: ObjectKey) -> PutRequest:
        """What puts them into a store."""
        return PutRequest(key, [self.buffer], self.form.shape, self.form.dtype, token_axes=self.form.token_axes)


def stored_share(store: Store, *, object_bytes: int, dtype: str) -> float:
    """Bytes of an object as it is stored, over its own: 1, and less with a codec. Writes one, and deletes it.

    Raises:
        StoreError: It could not be written.
    """
    key = _probe_key(0, uuid.uuid4().hex)
    try:
        _write(store, [KvLike.draw(object_bytes, dtype=dtype).request(key)], f"an object of {object_bytes} bytes")
        return store.stored_bytes([(key, object_bytes)])[0] / object_bytes
    finally:
        _delete(store, [key])


def measure_link(
    store: Store,
    *,
    object_bytes: int,
    num_objects: int = 64,
    rounds: int = 3,
    dtype: str = "bfloat16",
    most_share: float | None = None,
) -> LinkCost:
    """Write probe objects, read them back in pipelined rounds, delete them.

    Of a store of several tiers each is measured, and told what it was measured to do; the fastest one's is returned.

    Several processes may measure one shared store at once: no two calls use the same names.

    Args:
        store: The store to measure; its capacity must hold the probes.
        object_bytes: Size of a probe, that of a cell.
        num_objects: Probes of a round.
        most_share: Of what the store has room for, the share that the probes may take: fewer of them where they are
            large, but one. A full store throws out no more for them. None: as many as ``num_objects``.
        rounds: The best round counts, since neighbours only slow a link down; the latency is a median.
        dtype: Of keys and values, on which depends what a codec makes of them.

    Raises:
        StoreError: A probe could not be written, or not be read back in a minute.
    """
    if isinstance(store, TieredStore):
        links = []
        for tier in store.tiers:
            links.append(
                measure_link(
                    tier.store,
                    object_bytes=object_bytes,
                    num_objects=num_objects,
                    rounds=rounds,
                    dtype=dtype,
                    most_share=most_share,
                )
            )
            tier.promise(bytes_per_s=links[-1].bytes_per_s, latency_s=links[-1].latency_s)
        return links[0]
    if most_share is not None:
        num_fit = most_share * _room_bytes(store) / (object_bytes + HEADER_BYTES)
        num_objects = max(1, int(min(num_objects, num_fit)))
    salt = uuid.uuid4().hex
    keys = [_probe_key(index, salt) for index in range(num_objects + 1)]
    probe, small = (KvLike.draw(num_bytes, dtype=dtype) for num_bytes in (object_bytes, _SMALL_BYTES))
    try:
        # The small one is read before the others are written: there may be no room for all at once.
        what = f"{num_objects} objects of {object_bytes} bytes"
        _write(store, [small.request(keys[-1])], what)
        latency_s = statistics.median(_read_one_s(store, keys[-1], _SMALL_BYTES) for _ in range(4 * rounds))
        _write(store, [probe.request(key) for key in keys[:-1]], what)
        reads = _Reads(store, object_bytes)
        busy_s = min(reads.all_s(keys[:-1]) for _ in range(rounds))
    finally:
        _delete(store, keys)
    return LinkCost(bytes_per_s=num_objects * object_bytes / busy_s, latency_s=latency_s)


def _room_bytes(store: Store) -> float:
    """What the store can hold: its capacity, or less where its medium has less room."""
    capacity_bytes = store.capabilities().capacity_bytes
    room_bytes = math.inf if capacity_bytes is None else capacity_bytes
    if isinstance(store, SharedStore):
        with suppress(OSError):  # it does not answer, which the first probe finds out
            room_bytes = min(room_bytes, store.stats().used_bytes + store.free_bytes())
    return room_bytes


def _write(store: Store, requests: list[PutRequest], what: str) -> None:
    if not set(store.submit_put(requests).wait(120.0)) <= {PutOutcome.STORED, PutOutcome.EXISTS}:
        raise StoreError(f"link probe: {what} could not be written")


def _delete(store: Store, keys: Sequence[ObjectKey]) -> None:
    if not ends_in_time(partial(store.delete, keys), timeout_s=DELETE_TIMEOUT_S):
        logger.warning(
            "link probe: the store did not delete %d probes in %g s, and some may stay, in namespace %s: it hangs, or "
            "is very slow", len(keys), DELETE_TIMEOUT_S, PROBES,
        )  # fmt: skip


def _probe_key(index: int, salt: str) -> ObjectKey:
    chain = chain_hash(chain_root(f"cacheflow link probe {salt}"), [index])
    return RankKeys().kv(PROBES, chain.hex(), (0, 1))


def _read_one_s(store: Store, key: ObjectKey, num_bytes: int) -> float:
    started_s = time.perf_counter()
    _finish(store.submit_get([GetRequest(key, np.empty(num_bytes, np.uint8))]))
    return time.perf_counter() - started_s


class _HangsError(StoreError):
    """A read is under way still."""


class _Reads:
    """Pipelined reads of one store; what they tell is kept from one round to the next."""

    def __init__(self, store: Store, num_bytes: int) -> None:
        self._store, self._num_bytes = store, num_bytes
        self._meter, self._window = ReadMeter(), ReadWindow()
        self._buffers: list[npt.NDArray[np.uint8]] = []

    def all_s(self, keys: Sequence[ObjectKey]) -> float:
        """Seconds that it takes to read all of these."""
        under_way: deque[tuple[GetHandle, Flight, npt.NDArray[np.uint8]]] = deque()
        started_s = time.perf_counter()
        try:
            for key in keys:
                while len(under_way) >= self._wanted:
                    self._end(under_way)
                buffer = self._buffers.pop() if self._buffers else np.empty(self._num_bytes, np.uint8)
                flight = self._meter.begin(time.perf_counter())
                under_way.append((self._store.submit_get([GetRequest(key, buffer)]), flight, buffer))
            while under_way:
                self._end(under_way)
        except _HangsError:
            raise  # ``cancel`` would wait until the store lets go of the buffers, which nobody else uses
        except StoreError:
            for handle, _, _ in under_way:
                handle.cancel()
            raise
        return time.perf_counter() - started_s

    @property
    def _wanted(self) -> int:
        return min(self._window.reads(least=_LEAST_READS), max(_LEAST_READS, MAX_BYTES // self._num_bytes))

    def _end(self, under_way: deque[tuple[GetHandle, Flight, npt.NDArray[np.uint8]]]) -> None:
        """Wait for the oldest read."""
        handle, flight, buffer = under_way.popleft()
        _finish(handle)
        self._buffers.append(buffer)
        sample = self._meter.end(flight, time.perf_counter())
        if sample is not None:
            self._window.learn(sample)


def _finish(handle: GetHandle) -> None:
    (outcome,) = handle.wait(READ_TIMEOUT_S)
    if outcome is None:
        raise _HangsError(f"link probe: a read is still pending after {READ_TIMEOUT_S:g} s: the store hangs")
    if outcome is not LoadOutcome.OK:
        raise StoreError(f"link probe: a read ended as {outcome.value}")
