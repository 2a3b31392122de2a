"""Records of the study on a GPU."""

from __future__ import annotations

from cacheflow.bench.records.base import BenchRecord, Count, Environment, Name


class GpuRecord(BenchRecord, frozen=True, kw_only=True):
    """One finding of the study on a GPU that is no restoration.

    Attributes:
        part: Of the study.
        name: What was measured; ``done`` of a part that is through.
        device: ``"cuda"``; ``"cpu"`` for a rehearsal.
        values: What was found, by name with its unit.
        correct: Whether bits were right, where they were compared.
    """

    part: Count
    name: Name
    device: Name
    values: Environment
    correct: bool | None = None
    environment: Environment

    @property
    def is_good(self) -> bool:
        """Whether nothing was compared and found wrong."""
        return self.correct is not False
