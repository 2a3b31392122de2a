"""Damage to the very bytes that a store keeps, on any backend: a record is read whole, changed, and put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cacheflow.stores.base import PutOutcome
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.record import HEADER_BYTES, encode_header
from cacheflow.stores.threaded import ThreadedStore

Damage = Callable[[ThreadedStore, ObjectKey, ObjectKey], None]
"""Takes the store, the key whose record is damaged, and another with the same chunk."""

STRANGER = "5" * 32
"""A namespace that is nobody's."""


def record_of(store: ThreadedStore, key: ObjectKey) -> bytearray:
    """Header and payload as the backend has them."""
    header, payload = bytearray(HEADER_BYTES), bytearray(1)
    num_bytes = store.read_record(key, memoryview(header), memoryview(payload))
    assert num_bytes is not None, f"{key} is not there"
    payload = bytearray(num_bytes)
    assert store.read_record(key, memoryview(header), memoryview(payload)) == num_bytes
    return header + payload


def put_back(store: ThreadedStore, key: ObjectKey, record: bytes | bytearray) -> None:
    assert store.write_record(key, [memoryview(record)], replace=True) is PutOutcome.STORED


def truncate(store: ThreadedStore, key: ObjectKey, other: ObjectKey) -> None:
    put_back(store, key, record_of(store, key)[:-7])


def flip_a_bit(store: ThreadedStore, key: ObjectKey, other: ObjectKey) -> None:
    record = record_of(store, key)
    record[HEADER_BYTES + (len(record) - HEADER_BYTES) // 2] ^= 0x10
    put_back(store, key, record)


def swap(store: ThreadedStore, key: ObjectKey, other: ObjectKey) -> None:
    mine, theirs = record_of(store, key), record_of(store, other)
    put_back(store, key, theirs)
    put_back(store, other, mine)


def of_another_namespace(store: ThreadedStore, key: ObjectKey, other: ObjectKey) -> None:
    """An intact record of the same tokens and layers, which other weights made."""
    payload = bytes(255 - byte for byte in record_of(store, key)[HEADER_BYTES:])
    header = bytearray(HEADER_BYTES)
    stranger = dataclasses.replace(key, namespace=STRANGER)
    encode_header(memoryview(header), stranger, [memoryview(payload)], shape=(len(payload),), dtype="uint8")
    put_back(store, key, header + payload)


DAMAGES: dict[str, Damage] = {
    "truncated": truncate,
    "bit flip": flip_a_bit,
    "swapped record": swap,
    "wrong namespace": of_another_namespace,
}
"""By name; after each the record must be found damaged, and never be taken for KV."""
