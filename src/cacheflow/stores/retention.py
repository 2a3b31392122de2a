"""How long a bounded store keeps what it holds, and for whom."""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.errors import ConfigError

SHORTEST_TTL_S = 1.0
"""Below it what expires is looked for all the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What goes first when room is needed, and what goes without.

    Attributes:
        ttl_s: Seconds after its last use at which an object goes by itself; None: only to make room.
        pinned_share: Share of the capacity that pins of this process may hold; what would exceed it is not pinned.
        tenant_quota: Share of the capacity beyond which a tenant's own objects make room before any other's, and its
            pins hold ``pinned_share`` of that; None: the least recently used goes first, whose ever it is.
    """

    ttl_s: float | None = None
    pinned_share: float = 0.5
    tenant_quota: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.ttl_s is not None and not SHORTEST_TTL_S <= self.ttl_s < float("inf"):
            raise ConfigError(f"ttl_s is {self.ttl_s}, must be at least {SHORTEST_TTL_S:g} and finite, or none")
        if not 0 <= self.pinned_share <= 1:
            raise ConfigError(f"pinned_share is {self.pinned_share}, must be a share of the capacity, from 0 to 1")
        if self.tenant_quota is not None and not 0 < self.tenant_quota <= 1:
            raise ConfigError(
                f"tenant_quota is {self.tenant_quota}, must be a share of the capacity, above 0 and up to 1, or none"
            )


DEFAULT_RETENTION = Retention()
