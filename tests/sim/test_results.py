from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.sim.replica import Served
from cacheflow.sim.results import LogHistogram, Resources, Tally, percentiles_s
from support.clusters import ask


@given(st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=200), st.sampled_from([1.0, 50.0, 90.0, 99.0, 100.0]))
def test_a_histogram_finds_percentiles_to_one_percent(values, percent):
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    exact = percentiles_s(array("d", values), (percent,))[0]
    assert histogram.percentile_s(percent) == pytest.approx(exact, rel=0.0101)
    assert histogram.mean_s == pytest.approx(float(np.mean(values)))


def test_an_empty_histogram_says_zero():
    assert (LogHistogram().mean_s, LogHistogram().percentile_s(50.0)) == (0.0, 0.0)


def test_a_tally_adds_up():
    """Two requests, 10 s on two replicas: prompts of 639 tokens, of which 128 and 192 were there, 64 and 0 restored."""
    tally = Tally(slo_ttft_s=1.0, kv_bytes_per_token=100)
    for number, (arrival_s, ttft_s, hit, restored, loaded_bytes) in enumerate(
        [(5.0, 0.5, 128, 64, 1600), (6.0, 2.0, 192, 0, 0)]
    ):
        tally.add(
            Served(
                request=ask(number, range(10), output_tokens=7),
                arrival_s=arrival_s,
                first_token_at_s=arrival_s + ttft_s,
                last_token_at_s=arrival_s + ttft_s + 3.0,
                hit_tokens=hit,
                restored_tokens=restored,
                loaded_bytes=loaded_bytes,
                wasted_bytes=40,
            )
        )
    resources = Resources(
        num_replicas=2, given_busy_s=4.0, decode_busy_s=2.0, store_busy_s=5.0, store_bytes=1000, host_bytes=680
    )
    result = tally.result(resources, end_s=15.0)
    assert (result.num_requests, result.simulated_s, result.output_tokens) == (2, 10.0, 14)
    assert (result.ttft_mean_s, result.ttft_p50_s, result.ttft_p99_s, result.ttlt_mean_s) == (1.25, 0.5, 2.0, 4.25)
    assert (result.in_time_share, result.goodput_per_s) == (0.5, 0.1)
    assert (result.compute_busy, result.restore_prefill_busy, result.link_busy) == (0.3, 0.2, 0.25)
    assert (result.hit_tokens, result.loaded_tokens, result.recomputed_tokens) == (320, 16.0, 48.0)
    assert result.new_tokens == 2 * 639 - 320 - 64
    assert (result.store_bytes, result.host_bytes, result.wasted_bytes) == (1000, 680, 80)


def test_a_hybrids_checkpoint_is_not_counted_as_tokens():
    """64 tokens of 100 bytes and a checkpoint of 3,600: loading half of all is loading half of the tokens."""
    tally = Tally(slo_ttft_s=1.0, kv_bytes_per_token=100, checkpoint_bytes=3600)
    for number, loaded_bytes in enumerate((10_000, 5000, 0)):
        tally.add(
            Served(
                request=ask(number, range(10), output_tokens=7),
                arrival_s=1.0,
                first_token_at_s=2.0,
                last_token_at_s=3.0,
                hit_tokens=0,
                restored_tokens=64,
                loaded_bytes=loaded_bytes,
                wasted_bytes=0,
            )
        )
    resources = Resources(
        num_replicas=1, given_busy_s=1.0, decode_busy_s=0.0, store_busy_s=1.0, store_bytes=15_000, host_bytes=0
    )
    result = tally.result(resources, end_s=15.0)
    assert (result.loaded_tokens, result.recomputed_tokens) == pytest.approx((96.0, 96.0))
