"""Records of single restorations in the embedded engine, and what those of other suites have of them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cacheflow.bench.records.base import Count, Name, Positive, RunRecord, Seconds, Share
from cacheflow.errors import ConfigError


class GuardRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the never-slower guard chose for this run, and why."""

    choice: str
    reason: str


class RestoreRecord(RunRecord, frozen=True, kw_only=True):
    """One restoration under one policy.

    Attributes:
        restore_s: From the start of the restoration to the last prefix cell; None when the run was not timed.
        ttft_s: From the start of the restoration to the first token; None without a suffix or when not timed.
        bound_restore_s: The least possible ``restore_s``, from costs measured in the same process.
        compute_busy: Share of ``restore_s`` in which compute worked on the prefix.
        io_busy: Share of ``restore_s`` in which the link moved bytes.
        wasted_bytes: Bytes moved for cells that were recomputed all the same.
        failed_loads: Reads that were missing, corrupt, late or failing.
        planning_s: Time to make the plan; part of ``restore_s``.
        overhead_s: Executor time that was neither compute nor waiting for the link.
        perturbation: What was made wrong on purpose, such as ``{"cost_error": 2.0}``; empty for a clean run.
        objective: What the plan minimised, ``"ttft"`` or ``"restore"``.
        layers_per_block: Layers of one block, which is one object of the store per chunk.
    """

    num_tokens: Count
    restore_s: Seconds | None
    ttft_s: Seconds | None
    bound_restore_s: Seconds | None
    bound_ttft_s: Seconds | None
    compute_busy: Share | None
    io_busy: Share | None
    recomputed_cells: Count
    loaded_cells: Count
    wasted_bytes: Count
    loaded_bytes: Count = 0
    failed_loads: Count = 0
    planning_s: Seconds | None = None
    overhead_s: Seconds | None = None
    perturbation: Mapping[str, float] = msgspec.field(default_factory=dict)
    guard: GuardRecord | None = None
    objective: Name = "ttft"
    layers_per_block: Positive = 1
    store: Name = "memory"

    def __post_init__(self) -> None:
        """Refuse a time without a check.

        Raises:
            ConfigError: ``restore_s`` or ``ttft_s`` is set but ``correct`` is no outcome of a check.
        """
        super().__post_init__()
        if (self.restore_s is not None or self.ttft_s is not None) and not isinstance(self.correct, bool):
            raise ConfigError(f"a record cannot hold a time without a check: correct is {self.correct!r}")

    @property
    def timed(self) -> bool:
        """Whether the times of this record may be shown."""
        return self.correct is True and self.restore_s is not None
