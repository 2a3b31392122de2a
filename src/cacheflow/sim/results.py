"""What a run adds up to: one float a request is kept (its time to first token), everything else is a running sum."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacheflow.sim.replica import Served

BUCKET_RATIO = 1.01
"""Neighbouring buckets of a histogram differ by this factor: percentiles are right to 1 %."""
LEAST_S = 1e-6


class LogHistogram:
    """Percentiles of positive durations to 1 %, in memory that does not grow with their number."""

    def __init__(self) -> None:
        """Start empty."""
        self._counts: dict[int, int] = {}
        self._num = 0
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration; 0 and less count as a microsecond."""
        bucket = math.floor(math.log(max(seconds, LEAST_S) / LEAST_S) / math.log(BUCKET_RATIO))
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self._num += 1
        self._sum_s += seconds

    @property
    def mean_s(self) -> float:
        """Exact mean; 0 without any."""
        return self._sum_s / self._num if self._num else 0.0

    def percentile_s(self, percent: float) -> float:
        """The middle of the bucket that holds the percentile; 0 without any."""
        below = 0
        for bucket in sorted(self._counts):
            below += self._counts[bucket]
            if below >= self._num * percent / 100.0:
                return float(LEAST_S * BUCKET_RATIO ** (bucket + 0.5))
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One policy over one workload.

    Attributes:
        num_requests: Requests served; all that came.
        simulated_s: From the first arrival to the last token.
        ttft_mean_s: Time to first token, from arrival; exact, as are its percentiles.
        ttlt_mean_s: Time to last token; its percentiles to 1 %.
        goodput_per_s: Requests a second whose first token came within the limit.
        in_time_share: Their share.
        compute_busy: Share of all GPUs' time spent on restoring, prefilling and decoding.
        restore_prefill_busy: ... on restoring and prefilling alone.
        link_busy: Share of all store links' time in which they moved bytes.
        store_bytes: Bytes moved from the shared store.
        host_bytes: Bytes moved from host tiers.
        wasted_bytes: Bytes of both that were not used.
        hit_tokens: Prompt tokens found in GPU memory.
        loaded_tokens: Tokens restored by loading; cells counted as their share of a token's bytes, a hybrid's
            checkpoint as loaded to the same share as all of the prefix.
        recomputed_tokens: Tokens restored by compute.
        new_tokens: Prompt tokens that nobody held.
        output_tokens: Tokens of answers.
    """

    num_requests: int
    simulated_s: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    ttft_max_s: float
    ttlt_mean_s: float
    ttlt_p50_s: float
    ttlt_p99_s: float
    goodput_per_s: float
    in_time_share: float
    compute_busy: float
    restore_prefill_busy: float
    link_busy: float
    store_bytes: int
    host_bytes: int
    wasted_bytes: int
    hit_tokens: int
    loaded_tokens: float
    recomputed_tokens: float
    new_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What GPUs and links of a cluster have done.

    Attributes:
        num_replicas: GPUs, and as many store links.
        given_busy_s: GPU seconds on restoring and prefilling.
        decode_busy_s: GPU seconds on decoding.
        store_busy_s: Seconds of store links.
        store_bytes: Bytes they moved.
        host_bytes: Bytes host links moved.
    """

    num_replicas: int
    given_busy_s: float
    decode_busy_s: float
    store_busy_s: float
    store_bytes: int
    host_bytes: int


class Tally:
    """Adds up served requests.

    Attributes:
        ttfts_s: Times to first token, in the order in which requests were served.
        first_arrival_s: When the first request came.
    """

    def __init__(self, *, slo_ttft_s: float, kv_bytes_per_token: int, checkpoint_bytes: int = 0) -> None:
        """Start empty.

        Args:
            slo_ttft_s: A first token within this is good.
            kv_bytes_per_token: To count loaded bytes in tokens.
            checkpoint_bytes: What a prefix of a hybrid model has besides.
        """
        self._slo_s, self._token_bytes = slo_ttft_s, kv_bytes_per_token
        self._checkpoint_bytes, self._loaded_states = checkpoint_bytes, 0.0
        self.ttfts_s = array("d")
        self.first_arrival_s = math.inf
        self._ttlt = LogHistogram()
        self._in_time = 0
        self._hit = self._restored = self._input = self._output = self._loaded_bytes = self._wasted_bytes = 0

    def __len__(self) -> int:
        """Requests served."""
        return len(self.ttfts_s)

    def add(self, served: Served) -> None:
        """Count a request that has its last token."""
        ttft_s = served.first_token_at_s - served.arrival_s
        self.ttfts_s.append(ttft_s)
        self.first_arrival_s = min(self.first_arrival_s, served.arrival_s)
        self._ttlt.add(served.last_token_at_s - served.arrival_s)
        self._in_time += ttft_s <= self._slo_s
        self._hit += served.hit_tokens
        self._restored += served.restored_tokens
        self._input += served.request.input_tokens
        self._output += served.request.output_tokens
        self._loaded_bytes += served.loaded_bytes
        if self._checkpoint_bytes and served.restored_tokens:
            whole_bytes = served.restored_tokens * self._token_bytes + self._checkpoint_bytes
            self._loaded_states += self._checkpoint_bytes * min(1.0, served.loaded_bytes / whole_bytes)
        self._wasted_bytes += served.wasted_bytes

    def result(self, resources: Resources, *, end_s: float) -> RunResult:
        """Everything so far; at least one request was served.

        Args:
            resources: What the cluster did.
            end_s: When the last token was there.
        """
        simulated_s = max(end_s - self.first_arrival_s, 1e-12)
        p50_s, p90_s, p99_s, max_s = percentiles_s(self.ttfts_s, (50.0, 90.0, 99.0, 100.0))
        device_s = simulated_s * resources.num_replicas
        loaded_tokens = (self._loaded_bytes - self._loaded_states) / self._token_bytes
        return RunResult(
            num_requests=len(self),
            simulated_s=simulated_s,
            ttft_mean_s=math.fsum(self.ttfts_s) / len(self),
            ttft_p50_s=p50_s,
            ttft_p90_s=p90_s,
            ttft_p99_s=p99_s,
            ttft_max_s=max_s,
            ttlt_mean_s=self._ttlt.mean_s,
            ttlt_p50_s=self._ttlt.percentile_s(50.0),
            ttlt_p99_s=self._ttlt.percentile_s(99.0),
            goodput_per_s=self._in_time / simulated_s,
            in_time_share=self._in_time / len(self),
            compute_busy=(resources.given_busy_s + resources.decode_busy_s) / device_s,
            restore_prefill_busy=resources.given_busy_s / device_s,
            link_busy=resources.store_busy_s / device_s,
            store_bytes=resources.store_bytes,
            host_bytes=resources.host_bytes,
            wasted_bytes=self._wasted_bytes,
            hit_tokens=self._hit,
            loaded_tokens=loaded_tokens,
            recomputed_tokens=self._restored - loaded_tokens,
            new_tokens=self._input - self._hit - self._restored,
            output_tokens=self._output,
        )


def percentiles_s(values_s: array[float], percents: Sequence[float]) -> list[float]:
    """Exact percentiles: the least value that so many percent do not exceed."""
    return [float(each) for each in np.percentile(np.asarray(values_s), percents, method="inverted_cdf")]
