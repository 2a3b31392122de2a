"""Live correction of predicted costs: how fast compute and the link really are.

Both rates are ratios of exponentially decayed sums, so that a long observation weighs more than a short one and a
change of the hardware's speed shows within a few observations. One ``LiveRates`` outlives its restorations: what one
request learned, the next one starts with. Not thread-safe: the owner of the restoration's lock calls it.
"""

from __future__ import annotations

from cacheflow.errors import ConfigError
from cacheflow.plan.read_window import ReadWindows

DECAY = 0.85
"""Weight an observation keeps when the next one arrives; about seven observations count."""
SLOW = 1.5
"""A read this many times slower than the known bandwidth, right after another such, is a falling link, not noise."""
VERY_SLOW = 2.5
"""... and one alone when it is this many times slower."""
FALLEN_DECAY = 0.2
"""``DECAY`` when the link has fallen: what was observed before hardly counts."""
PRIOR_OBSERVATIONS = 2.0
"""How many observations the prediction is worth before anything was observed."""


TRUST_OBSERVATIONS = 3
"""Observations of each side before its rate is trusted with a decision that cannot be taken back."""


class LiveRates:
    """Observed over predicted compute time, and observed bandwidth, as exponentially weighted means.

    Attributes:
        windows: How many reads of each tier deliver its bandwidth.
    """

    def __init__(self, *, bytes_per_s: float, compute_factor: float = 1.0) -> None:
        """Start from a prediction.

        Args:
            bytes_per_s: Bandwidth the profile expects; above 0, may be ``inf``.
            compute_factor: Seconds that one predicted compute second takes.

        Raises:
            ConfigError: A rate is not positive.
        """
        if not bytes_per_s > 0 or not compute_factor > 0:
            raise ConfigError(f"rates must be above 0: bytes_per_s {bytes_per_s}, compute_factor {compute_factor}")
        self._bytes_per_s = bytes_per_s
        self._compute_factor = compute_factor
        self._predicted_s = self._actual_s = 0.0
        self._bytes = self._busy_s = 0.0
        self._num_computes = self._num_loads = 0
        self._last_was_slow = False
        self.windows = ReadWindows()

    @property
    def trusted(self) -> bool:
        """Whether both sides were observed often enough to commit to a meeting point."""
        return min(self._num_computes, self._num_loads) >= TRUST_OBSERVATIONS

    @property
    def compute_factor(self) -> float:
        """Seconds that one predicted compute second takes now."""
        return self._compute_factor

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth of the link now."""
        return self._bytes_per_s

    def observe_compute(self, *, predicted_s: float, actual_s: float) -> None:
        """Take in one recomputation; observations without a prediction are ignored."""
        if predicted_s <= 0 or actual_s <= 0:
            return
        self._num_computes += 1
        if self._predicted_s == 0.0:
            self._predicted_s = PRIOR_OBSERVATIONS * predicted_s
            self._actual_s = self._predicted_s * self._compute_factor
        self._predicted_s = DECAY * self._predicted_s + predicted_s
        self._actual_s = DECAY * self._actual_s + actual_s
        self._compute_factor = self._actual_s / self._predicted_s

    def observe_load(self, *, num_bytes: int, busy_s: float) -> None:
        """Take in one read: ``busy_s`` is the time the link worked on it, not the time it waited in line."""
        if num_bytes <= 0 or busy_s <= 0:
            return
        self._num_loads += 1
        if self._bytes == 0.0:
            self._bytes = PRIOR_OBSERVATIONS * num_bytes
            self._busy_s = self._bytes / self._bytes_per_s
        decay = self._decay(num_bytes, busy_s)
        self._last_was_slow = busy_s * self._bytes_per_s > SLOW * num_bytes
        self._bytes = decay * self._bytes + num_bytes
        self._busy_s = decay * self._busy_s + busy_s
        self._bytes_per_s = self._bytes / self._busy_s

    def bytes_per_s_while(self, *, num_bytes: float, age_s: float) -> float:
        """Bandwidth while a read of ``num_bytes`` is not done after ``age_s``: as if it ended now, if slower."""
        if num_bytes <= 0 or age_s <= 0 or age_s * self._bytes_per_s <= num_bytes:
            return self._bytes_per_s
        known_bytes, known_s = self._bytes, self._busy_s
        if known_bytes == 0.0:
            known_bytes = PRIOR_OBSERVATIONS * num_bytes
            known_s = known_bytes / self._bytes_per_s
        decay = self._decay(num_bytes, age_s)
        return (decay * known_bytes + num_bytes) / (decay * known_s + age_s)

    def _decay(self, num_bytes: float, busy_s: float) -> float:
        """What earlier observations weigh; a rising link may be learned slowly, a falling one decides what to load."""
        times_slower = busy_s * self._bytes_per_s / num_bytes
        fallen = times_slower > VERY_SLOW or (times_slower > SLOW and self._last_was_slow)
        return FALLEN_DECAY if fallen else DECAY
