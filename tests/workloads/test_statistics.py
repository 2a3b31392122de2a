"""The statistics of a trace small enough to count by hand."""

import pytest

from cacheflow.errors import TraceError
from cacheflow.workloads.request import TraceRequest
from cacheflow.workloads.statistics import describe


def request(request_id, tokens, block_ids, **more):
    return TraceRequest(
        request_id=request_id, arrival_s=3.0 + request_id, input_tokens=tokens, output_tokens=10 * request_id + 10,
        block_ids=block_ids, block_tokens=100, **more,
    )  # fmt: skip


def test_reuse_is_the_leading_run_seen_before_and_no_more_than_the_prompt():
    statistics = describe([
        request(0, 250, (1, 2, 3)),
        request(1, 400, (1, 2, 8, 9), session_id="s"),
        # The same prompt again: all 250 tokens, not three blocks of 100.
        request(2, 250, (1, 2, 3)),
        # Known blocks behind an unknown one do not count.
        request(3, 300, (7, 2, 8), after=1, session_id="s"),
    ])  # fmt: skip
    assert statistics.count == 4
    assert statistics.num_sessions == 3
    assert statistics.duration_s == 3.0
    assert statistics.input_tokens.p50 == 275
    assert statistics.input_tokens.mean == 300
    assert statistics.output_tokens.p50 == 25
    assert statistics.reusable_tokens.mean == (0 + 200 + 250 + 0) / 4
    assert statistics.reusable_tokens.p99 == pytest.approx(248.5)
    assert statistics.reusable_share == 450 / 1200


def test_nothing_cannot_be_described():
    with pytest.raises(TraceError, match="no requests"):
        describe([])
