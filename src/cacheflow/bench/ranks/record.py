"""The record of one restoration on several ranks of vLLM: a ``RestoreRecord`` with the split it ran on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cacheflow.bench.record import RestoreRecord
from cacheflow.bench.results_file import read_lines
from cacheflow.errors import ConfigError

SUITE = "ranks"


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksRecord(RestoreRecord):
    """One request whose prefix was saved and evicted before, on an engine of several ranks.

    ``link_bytes_per_s`` is of each rank's own link; ``load_compute_ratio`` is that of one rank behind such a link.
    ``restore_s`` and ``bound_restore_s`` are the engine's, the latter from costs it measured at its start.

    Attributes:
        pipeline_parallel_size: Pipeline stages.
        tensor_parallel_size: Ranks of a stage.
        gpu_axis: Whether stages start from stored boundary states, each for itself; False: activations are handed over
            from stage to stage. Always True with one stage.
        recompute_s: Time to first token of vLLM's own prefill of the same prompt, on the same engine.
        equal_tokens: Generated tokens that equal vLLM's own answer, counted from the first.
        compared_tokens: Generated tokens in all.
        note: Why the prefix was not restored; empty when it was.
    """

    pipeline_parallel_size: int
    tensor_parallel_size: int
    gpu_axis: bool
    recompute_s: float
    equal_tokens: int
    compared_tokens: int
    note: str = ""

    def __post_init__(self) -> None:
        """Check what is ours besides ``RestoreRecord``.

        Raises:
            ConfigError: A size is below 1, one stage has no axis, or the run counts as correct although tokens differ.
        """
        RestoreRecord.__post_init__(self)  # not super(): a dataclass with slots is made anew, super() means the old one
        if self.pipeline_parallel_size < 1 or self.tensor_parallel_size < 1:
            raise ConfigError(
                f"record: {self.pipeline_parallel_size} stages of {self.tensor_parallel_size} ranks, at least 1 each"
            )
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


def read_ranks_records(path: Path) -> list[RanksRecord]:
    """Every record of this suite in a results file; lines of other suites are skipped.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed; the message names the line.
    """

    def parse(line: str) -> RanksRecord:
        record = RanksRecord.from_json(line)
        assert isinstance(record, RanksRecord)
        return record

    return read_lines(path, parse, wanted=lambda line: f'"suite": "{SUITE}"' in line)
