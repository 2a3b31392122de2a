"""What a trace is like, in the figures that papers state of theirs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cacheflow.errors import TraceError
from cacheflow.workloads.request import TraceRequest


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Median, tail and mean of one quantity."""

    p50: float
    p90: float
    p99: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStatistics:
    """A trace in a few numbers.

    Attributes:
        count: Requests.
        num_sessions: Sessions; each request without one counts by itself.
        duration_s: From the first arrival to the last.
        input_tokens: Prompt lengths.
        output_tokens: Answer lengths.
        reusable_tokens: Leading tokens of a prompt that earlier prompts of the trace began with, in whole blocks: what
            a cache without limits would hit.
        reusable_share: Reusable tokens of all prompts over tokens of all prompts.
    """

    count: int
    num_sessions: int
    duration_s: float
    input_tokens: Percentiles
    output_tokens: Percentiles
    reusable_tokens: Percentiles
    reusable_share: float


def describe(requests: Iterable[TraceRequest]) -> TraceStatistics:
    """Statistics of a trace, in one pass; memory grows with the number of distinct blocks.

    Raises:
        TraceError: There is no request.
    """
    seen: set[int] = set()
    inputs, outputs, reusable = array("q"), array("q"), array("q")
    num_sessions = 0
    first_s = last_s = 0.0
    for request in requests:
        first_s = first_s if inputs else request.arrival_s
        last_s = max(last_s, request.arrival_s)
        num_sessions += request.after is None
        inputs.append(request.input_tokens)
        outputs.append(request.output_tokens)
        reusable.append(_leading_seen(request, seen))
        seen.update(request.block_ids)
    if not inputs:
        raise TraceError("no requests to describe; expected at least one")
    return TraceStatistics(
        count=len(inputs),
        num_sessions=num_sessions,
        duration_s=last_s - first_s,
        input_tokens=_percentiles(inputs),
        output_tokens=_percentiles(outputs),
        reusable_tokens=_percentiles(reusable),
        reusable_share=sum(reusable) / sum(inputs),
    )


def _leading_seen(request: TraceRequest, seen: set[int]) -> int:
    hits = 0
    for block_id in request.block_ids:
        if block_id not in seen:
            break
        hits += 1
    return min(hits * request.block_tokens, request.input_tokens)


def _percentiles(values: array[int]) -> Percentiles:
    numbers = np.frombuffer(values, dtype=np.int64)
    p50, p90, p99 = np.percentile(numbers, (50, 90, 99))
    return Percentiles(p50=float(p50), p90=float(p90), p99=float(p99), mean=float(numbers.mean()))
