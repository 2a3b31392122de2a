"""Records of engines of several ranks."""

from __future__ import annotations

from cacheflow.bench.records.base import Count, Positive, Seconds
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.errors import ConfigError


class RanksRecord(RestoreRecord, frozen=True, kw_only=True):
    """One request on an engine of several ranks, whose prefix was saved and evicted before.

    ``link_bytes_per_s`` is of each rank's own link; ``load_compute_ratio`` is that of one rank with such a link.
    ``restore_s`` and ``bound_restore_s`` are the engine's, the latter from costs it measured at its start.

    Attributes:
        gpu_axis: Whether stages start from stored boundary states, each for itself; False: activations are handed over
            from stage to stage. Always True with one stage.
        recompute_s: Time to first token of vLLM's own prefill of the same prompt, on the same engine.
        equal_tokens: Generated tokens that equal vLLM's own answer, counted from the first.
        note: Why the prefix was not restored; empty when it was.
    """

    pipeline_parallel_size: Positive
    tensor_parallel_size: Positive
    gpu_axis: bool
    recompute_s: Seconds
    equal_tokens: Count
    compared_tokens: Count
    note: str = ""

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            ConfigError: One stage has no axis, or the run counts as correct although tokens differ.
        """
        super().__post_init__()
        if not self.gpu_axis and self.pipeline_parallel_size == 1:
            raise ConfigError("record: with one pipeline stage there is no GPU axis to switch off")
        if self.correct and self.equal_tokens < self.compared_tokens:
            raise ConfigError(
                f"record: correct, but only {self.equal_tokens} of {self.compared_tokens} tokens are equal"
            )

    @property
    def split(self) -> str:
        """The split for people: ``PP 2``, ``PP 2 in order``, ``TP 2``, ``PP 2, TP 2``, ``1 rank``."""
        parts = []
        if self.pipeline_parallel_size > 1:
            parts.append(f"PP {self.pipeline_parallel_size}" + ("" if self.gpu_axis else " in order"))
        if self.tensor_parallel_size > 1:
            parts.append(f"TP {self.tensor_parallel_size}")
        return ", ".join(parts) or "1 rank"

    @property
    def over_bound(self) -> float | None:
        """``restore_s`` over its bound; None where either is unknown or the run was wrong."""
        if not self.timed or self.restore_s is None or not self.bound_restore_s:
            return None
        return self.restore_s / self.bound_restore_s
