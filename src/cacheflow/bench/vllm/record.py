"""The record of one request inside vLLM: a ``RestoreRecord`` with what a client of a server can see besides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cacheflow.bench.record import RestoreRecord
from cacheflow.bench.results_file import read_lines
from cacheflow.errors import ConfigError

SUITE = "vllm"
NEIGHBOUR = {"neighbour": 1.0}
"""The perturbation of runs beside a decoding request, so that they are never mixed with runs alone."""
ITL_SLO_MS = "itl_slo_ms"
"""Stands in the perturbation too where our connector was asked to keep the neighbour's latency within it."""

_TIMES = ("itl_mean_s", "itl_p99_s", "itl_max_s", "first_logprob_distance")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmRecord(RestoreRecord):
    """One request whose prefix was saved and evicted before.

    ``restore_s`` is what the engine counted, None where it does not: a client cannot see when restoration ends. Busy
    shares are None. Cells follow from the engine's counters where it has them, else from the prompt tokens it cached.

    Attributes:
        cached_tokens: Prompt tokens vLLM says it did not compute itself in the usual way.
        equal_tokens: Generated tokens that equal stock vLLM's, counted from the first.
        compared_tokens: Generated tokens in all.
        first_logprob_distance: Largest difference of the log-probabilities of the first token's top candidates; None
            without candidates in common.
        note: Why tokens may differ; empty when they do not.
        itl_mean_s: Mean inter-token latency of the neighbour from request to first token; None without neighbour.
        itl_p99_s: Its 99th percentile.
        itl_max_s: Its maximum.
    """

    cached_tokens: int
    equal_tokens: int
    compared_tokens: int
    first_logprob_distance: float | None = None
    note: str = ""
    itl_mean_s: float | None = None
    itl_p99_s: float | None = None
    itl_max_s: float | None = None

    def __post_init__(self) -> None:
        """Check what is ours besides ``RestoreRecord``.

        Raises:
            ConfigError: A value is impossible, or the run counts as correct although tokens differ without a note.
        """
        RestoreRecord.__post_init__(self)  # not super(): a dataclass with slots is made anew, super() means the old one
        for key in _TIMES:
            value = getattr(self, key)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"record field {key} is {value!r}, must be finite and 0 or more")
        if not 0 <= self.equal_tokens <= self.compared_tokens or self.cached_tokens < 0:
            raise ConfigError(
                f"record: {self.equal_tokens} of {self.compared_tokens} tokens equal, {self.cached_tokens} cached"
            )
        if self.correct and self.equal_tokens < self.compared_tokens and not self.note:
            raise ConfigError("a correct record whose tokens differ needs a note that explains them")

    @property
    def itl_slo_s(self) -> float | None:
        """What our connector was asked to keep ``itl_p99_s`` within; None where it was asked nothing."""
        slo_ms = self.perturbation.get(ITL_SLO_MS)
        return None if slo_ms is None else slo_ms * 1e-3

    @property
    def timed(self) -> bool:
        """Whether the times of this record may be shown."""
        return self.correct is True and self.ttft_s is not None


def read_vllm_records(path: Path) -> list[VllmRecord]:
    """Every record of this suite in a results file; lines of other suites are skipped.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed; the message names the line.
    """

    def parse(line: str) -> VllmRecord:
        record = VllmRecord.from_json(line)
        assert isinstance(record, VllmRecord)
        return record

    return read_lines(path, parse, wanted=lambda line: f'"suite": "{SUITE}"' in line)
