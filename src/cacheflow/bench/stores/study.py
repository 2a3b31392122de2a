"""One store with objects of one size, and every way to read them, by turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cacheflow.bench.records.base import Environment
from cacheflow.bench.records.stores import StoreReadRecord
from cacheflow.bench.stores.objects import Objects, check, read_for
from cacheflow.bench.stores.rivals import rivals_of
from cacheflow.bench.stores.unverified import UnverifiedStore
from cacheflow.bench.stores.ways import ChecksumWay, ReadWay, StoreWay
from cacheflow.bench.suite import OnRun, rotated
from cacheflow.errors import StoreError
from cacheflow.stores.base import Store
from cacheflow.stores.threaded import ThreadedStore
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.url import StoreUrl

OURS = "cacheflow"
UNVERIFIED = "unverified"
CHECKSUM = "checksum"
OWN = (OURS, UNVERIFIED, CHECKSUM)
"""Every other way is somebody else's."""


@dataclass(frozen=True, slots=True)
class TimedWay:
    """A way to read, and the link before it; None: none."""

    name: str
    link_bytes_per_s: float | None
    way: ReadWay

    def __str__(self) -> str:
        """For people."""
        link = self.link_bytes_per_s
        return self.name if link is None else f"{self.name} at {link * 8 / 1e9:g} Gbit/s"


@dataclass(frozen=True, slots=True)
class StoreRound:
    """Every way's turn, once."""

    repeat: int
    policies: tuple[str, ...]


class StoreStudy:
    """Objects in a store and who reads them."""

    def __init__(self, url: StoreUrl, objects: Objects, contenders: tuple[TimedWay, ...]) -> None:
        """Made by ``open_store_study``."""
        self.url, self.objects, self.contenders = url, objects, contenders

    def round(self, repeat: int) -> StoreRound:
        """A repeat's turns."""
        return StoreRound(repeat=repeat, policies=tuple(map(str, self.contenders)))

    def run(
        self, round_: StoreRound, *, seconds: float, environment: Environment, on_run: OnRun
    ) -> Iterator[StoreReadRecord]:
        """Let each way read all objects once, to be compared, and then for so many seconds.

        Raises:
            StoreError: An object could not be read.
        """
        for contender in rotated(self.contenders, round_.repeat):
            on_run(str(contender))
            correct = check(contender.way.read_all, self.objects)
            num_times, read_s = read_for(contender.way.read_all, seconds)
            yield StoreReadRecord(
                store=self.url.scheme,
                way=contender.name,
                object_bytes=self.objects.num_bytes,
                num_objects=len(self.objects),
                reads_in_flight=contender.way.num_reads,
                link_bytes_per_s=contender.link_bytes_per_s,
                repeat=round_.repeat,
                read_bytes=num_times * len(self.objects) * self.objects.num_bytes,
                read_s=read_s,
                correct=correct,
                environment=environment,
            )


@contextmanager
def open_store_study(
    store: Store, url: StoreUrl, *, object_bytes: int, num_objects: int, num_reads: int, link_bytes_per_s: float
) -> Iterator[StoreStudy]:
    """Write objects into a store, let everybody who reads them connect, and remove them in the end.

    Args:
        store: Open; stays so.
        url: Its URL.
        object_bytes: Payload of each object.
        num_objects: How many there are.
        num_reads: Reads under way at once.
        link_bytes_per_s: Of the link over which reads are timed with and without verification.

    Raises:
        StoreError: The objects cannot be written, or somebody cannot connect.
    """
    objects = Objects(num_objects=num_objects, num_bytes=object_bytes)
    contenders: list[TimedWay] = []
    unverified = UnverifiedStore(store) if isinstance(store, ThreadedStore) else None
    own: dict[str, Store] = {OURS: store}
    if unverified is not None:
        own[UNVERIFIED] = unverified
    try:
        objects.write(store)
        for name, each in own.items():
            contenders.append(TimedWay(name, None, StoreWay(each, objects, num_reads=num_reads)))
        try:
            for name, rival in rivals_of(url, objects, num_reads=num_reads):
                contenders.append(TimedWay(name, None, rival))
        except OSError as error:
            raise StoreError(f"store {url}: another client cannot read from it: {error}") from error
        contenders.append(TimedWay(CHECKSUM, None, ChecksumWay(objects)))
        for name, each in own.items():
            linked = ThrottledStore(each, link_bytes_per_s)  # closing it would close the store; it has no threads
            way = StoreWay(linked, objects, num_reads=num_reads)
            contenders.append(TimedWay(name, link_bytes_per_s, way))
        yield StoreStudy(url, objects, tuple(contenders))
    finally:
        for contender in contenders:
            contender.way.close()
        if unverified is not None:
            unverified.close()
        store.delete(objects.keys)
