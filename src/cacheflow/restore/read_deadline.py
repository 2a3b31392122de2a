"""When a read counts as late: the only place that says so."""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.errors import ConfigError
from cacheflow.plan.rates import LiveRates


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadDeadline:
    """How long a read may take; what takes longer is ``LATE``, and its cell is recomputed.

    Attributes:
        floor_s: A read may always take this long.
        factor: ... plus this many times what everything under way should take.
    """

    floor_s: float = 0.25
    factor: float = 8.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is not above 0.
        """
        if not (self.floor_s > 0 and self.factor > 0):
            raise ConfigError(f"a read's deadline: floor_s is {self.floor_s}, factor {self.factor}: must be above 0")

    def allowed_s(self, num_bytes: int, rates: LiveRates) -> float:
        """Seconds that a read may take from its claim on.

        Args:
            num_bytes: Bytes under way on its link, its own included.
            rates: How fast that link is.
        """
        return self.floor_s + self.factor * num_bytes / rates.bytes_per_s
