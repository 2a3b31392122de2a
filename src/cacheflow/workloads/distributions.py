"""Distributions that session profiles are made of, each given by the figures that papers state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cacheflow.errors import ConfigError

_Z90 = 1.2815515655446004
"""90th percentile of the standard normal distribution."""


class Distribution(Protocol):
    """Gives one value at a time, 0 or more."""

    def sample(self, rng: np.random.Generator) -> float:
        """One value."""
        ...


@dataclass(frozen=True, slots=True)
class LogNormal:
    """``median * exp(sigma * z)``: the long-tailed shape of prompt lengths, answer lengths and pauses."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        if not (self.median > 0 and self.sigma >= 0 and math.isfinite(self.median) and math.isfinite(self.sigma)):
            raise ConfigError(f"{self}: median must be above 0, sigma 0 or more")

    @classmethod
    def of_mean(cls, mean: float, *, deviation: float) -> LogNormal:
        """The one with this mean and standard deviation."""
        variance = math.log1p((deviation / mean) ** 2)
        return cls(median=mean * math.exp(-variance / 2), sigma=math.sqrt(variance))

    @classmethod
    def of_percentiles(cls, *, p50: float, p90: float) -> LogNormal:
        """The one with this median and 90th percentile."""
        return cls(median=p50, sigma=math.log(p90 / p50) / _Z90)

    @property
    def mean(self) -> float:
        """The mean, which the tail pulls above the median."""
        return self.median * math.exp(self.sigma**2 / 2)

    def sample(self, rng: np.random.Generator) -> float:
        """One value."""
        return float(self.median * math.exp(self.sigma * rng.standard_normal()))


@dataclass(frozen=True, slots=True)
class Geometric:
    """1, 2, 3…: after each one it ends with the same probability, 1 / mean."""

    mean: float

    def __post_init__(self) -> None:
        if not 1 <= self.mean < math.inf:
            raise ConfigError(f"{self}: mean must be 1 or more")

    def sample(self, rng: np.random.Generator) -> float:
        """One value."""
        return float(rng.geometric(1 / self.mean))
