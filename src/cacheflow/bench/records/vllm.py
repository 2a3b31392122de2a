"""Records of servers: one request of a client, and many under load."""

from __future__ import annotations

from cacheflow.bench.records.base import Above0, BenchRecord, Count, Name, Seconds
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.errors import ConfigError

NEIGHBOUR = {"neighbour": 1.0}
"""The perturbation of runs beside a decoding request, so that they are never mixed with runs alone."""
ITL_SLO_MS = "itl_slo_ms"
"""Stands in the perturbation too where our connector was asked to keep the neighbour's latency within it."""


class VllmRecord(RestoreRecord, frozen=True, kw_only=True):
    """One request inside vLLM whose prefix was saved and evicted before, as a client of the server sees it.

    ``restore_s`` is what the engine counted, None where it does not: a client cannot see when restoration ends. Busy
    shares are None. Cells follow from the engine's counters where it has them, else from the prompt tokens it cached.

    Attributes:
        cached_tokens: Prompt tokens vLLM says it did not compute itself in the usual way.
        equal_tokens: Generated tokens that equal stock vLLM's, counted from the first.
        first_logprob_distance: Largest difference of the log-probabilities of the first token's top candidates; None
            without candidates in common.
        note: Why tokens may differ; empty when they do not.
        itl_mean_s: Mean inter-token latency of the neighbour from request to first token; None without neighbour.
    """

    cached_tokens: Count
    equal_tokens: Count
    compared_tokens: Count
    first_logprob_distance: Seconds | None = None
    note: str = ""
    itl_mean_s: Seconds | None = None
    itl_p99_s: Seconds | None = None
    itl_max_s: Seconds | None = None

    def __post_init__(self) -> None:
        """Check the tokens.

        Raises:
            ConfigError: More are equal than compared, or the run is correct although some differ without a note.
        """
        super().__post_init__()
        if self.equal_tokens > self.compared_tokens:
            raise ConfigError(f"record: {self.equal_tokens} of {self.compared_tokens} tokens equal")
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


class LoadRecord(BenchRecord, frozen=True, kw_only=True):
    """What vLLM's own client measured for one policy under load; answers are not compared.

    ``restored_tokens`` is how many prompt tokens the server says came from outside its own cache.
    """

    suite: Name = "vllm-load"
    policy: Name
    model: Name
    rate: Above0
    link_bytes_per_s: Above0
    num_requests: Count
    num_failed: Count
    prompt_tokens: Count
    restored_tokens: Count
    ttft_mean_s: Seconds
    ttft_p50_s: Seconds
    ttft_p99_s: Seconds
    itl_mean_s: Seconds
    itl_p99_s: Seconds
    requests_per_s: Seconds
    tokens_per_s: Seconds

    @property
    def is_good(self) -> bool:
        """Whether every request succeeded."""
        return self.num_failed == 0
