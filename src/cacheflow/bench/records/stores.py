"""Records of stores that were read as fast as they go."""

from __future__ import annotations

from cacheflow.bench.records.base import Above0, BenchRecord, Count, Environment, Name, Positive


class StoreReadRecord(BenchRecord, frozen=True, kw_only=True):
    """One turn of one way to read the objects of a store, over and over.

    Attributes:
        store: Its scheme.
        way: Who read them, and how.
        object_bytes: Payload of each object.
        reads_in_flight: Reads asked for at once, or connections or threads that read.
        link_bytes_per_s: Bandwidth of the link they were read over; None where there was none but the store's own.
        repeat: Which alternation of the ways this turn belongs to.
        read_bytes: Payload bytes read in the turn.
        read_s: Seconds that took.
        correct: Whether every object that the way read in this turn was what had been written.
    """

    suite: Name = "stores"
    store: Name
    way: Name
    object_bytes: Positive
    num_objects: Positive
    reads_in_flight: Positive
    link_bytes_per_s: Above0 | None
    repeat: Count
    read_bytes: Positive
    read_s: Above0
    correct: bool
    environment: Environment

    @property
    def is_good(self) -> bool:
        """Whether what was read was what had been written."""
        return self.correct

    @property
    def bytes_per_s(self) -> float:
        """Payload bytes a second."""
        return self.read_bytes / self.read_s
