"""What an operator does to a store that is there: look at its records, check them, choose what goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores.directory import is_record_directory
from cacheflow.stores.keys import key_of, namespace_of
from cacheflow.stores.opening import open_store
from cacheflow.stores.record import HEADER_BYTES, verify
from cacheflow.stores.shared import UNBOUNDED, FoundRecord, SharedStore
from cacheflow.stores.shm import shm_folder
from cacheflow.stores.url import StoreUrl
from cacheflow.types import LoadOutcome


def open_existing(url: str, *, only_look: bool) -> SharedStore:
    """Open a store whose records outlive a process.

    Args:
        url: See ``stores.url``.
        only_look: Closing it leaves the store; otherwise a shared-memory store goes with its last user.

    Raises:
        ConfigError: The URL is wrong, or there is no such store: none is made.
        StoreError: It cannot be reached or used, or its records cannot be listed.
    """
    parsed = StoreUrl.parse(url)
    if parsed.scheme == "memory":
        raise ConfigError("a memory store is its process's own: there is nothing to look after from here")
    folder = {"file": Path(parsed.path), "shm": shm_folder(parsed.host)}.get(parsed.scheme)
    try:
        is_there = folder is None or is_record_directory(folder)
    except OSError as error:  # a folder of records is closed to other users
        raise StoreError(
            f"store {url} cannot be looked at: {error}; run this as the user whose processes write it"
        ) from error
    if not is_there:
        raise ConfigError(f"there is no store {url}: {folder} is no folder of records")
    store = open_store(url, capacity_bytes=UNBOUNDED, only_look=only_look)
    if not isinstance(store, SharedStore) or not store.can_list:
        store.close()
        raise StoreError(f"store {url}: its records cannot be listed, {store} has no way to")
    return store


def records_of(store: SharedStore, namespaces: Sequence[str] = ()) -> list[FoundRecord]:
    """Every record; with namespaces, those whose namespace begins with one of them.

    Raises:
        StoreError: The store does not answer.
    """
    try:
        found = store.scan({})
    except OSError as error:
        raise StoreError(f"{store}: {error.strerror or error}") from error
    return [each for each in found if not namespaces or each.name.startswith(tuple(namespaces))]


def space_of(record: FoundRecord) -> str:
    """The namespace of a record that a scan found."""
    found = namespace_of(record.name)
    assert found is not None, "scans leave other names out"
    return found


def lives_of(store: SharedStore, records: Sequence[FoundRecord]) -> dict[str, float]:
    """Seconds after which the medium itself removes records, by name; those that it leaves are left out.

    Raises:
        StoreError: The store does not answer.
    """
    names = [each.name for each in records]
    try:
        lives_s = store.lives_s(names)
    except OSError as error:
        raise StoreError(f"{store}: {error.strerror or error}") from error
    return {name: life_s for name, life_s in zip(names, lives_s, strict=True) if life_s is not None}


def check_record(store: SharedStore, record: FoundRecord, *, on_error: Callable[[str], None]) -> LoadOutcome:
    """Read a record and verify it, on this thread; ``ERROR`` where the store does not give it out, which says why."""
    header = memoryview(bytearray(HEADER_BYTES))
    payload = memoryview(bytearray(max(1, record.num_bytes - HEADER_BYTES)))
    try:
        key = key_of(record.name)
        num_found = store.read_record(key, header, payload)
        if num_found is not None and num_found > 0 and num_found != payload.nbytes:  # the size was an estimate
            payload = memoryview(bytearray(num_found))
            num_found = store.read_record(key, header, payload)
    except ConfigError:
        return LoadOutcome.CORRUPT
    except OSError as error:
        on_error(str(error.strerror or error))
        return LoadOutcome.ERROR
    if num_found is None:
        return LoadOutcome.MISS
    return verify(header, payload, key) if num_found == payload.nbytes else LoadOutcome.CORRUPT


def remove_records(store: SharedStore, records: Iterable[FoundRecord]) -> int:
    """Remove records; returns the bytes freed.

    Raises:
        StoreError: One is there and cannot be removed.
    """
    freed = 0
    for each in records:
        try:
            freed += each.num_bytes if store.erase(each.name) else 0
        except OSError as error:
            raise StoreError(f"{store}: {each.name} cannot be removed: {error.strerror or error}") from error
        store.note_gone(each.name)
    return freed


def garbage(
    records: Sequence[FoundRecord], *, now_s: float, older_than_s: float | None, max_bytes: int | None
) -> list[FoundRecord]:
    """What goes: records unused for longer than ``older_than_s``, then the least recently used beyond ``max_bytes``.

    With neither, all of them.
    """
    if older_than_s is None and max_bytes is None:
        return list(records)
    by_use = sorted(records, key=lambda each: (each.used_s, each.name))
    left_bytes = sum(each.num_bytes for each in by_use)
    chosen = []
    for each in by_use:
        is_old = older_than_s is not None and now_s - each.used_s > older_than_s
        if is_old or (max_bytes is not None and left_bytes > max_bytes):
            chosen.append(each)
            left_bytes -= each.num_bytes
    return chosen
