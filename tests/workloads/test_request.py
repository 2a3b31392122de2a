"""A request that contradicts itself cannot exist."""

import dataclasses
import math

import pytest

from cacheflow.errors import ConfigError, TraceError
from cacheflow.workloads.request import TraceRequest, num_blocks

GOOD = TraceRequest(
    request_id=4, arrival_s=1.0, input_tokens=1030, output_tokens=1, block_ids=(8, 2, 5), block_tokens=512, after=3
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"request_id": -1}, "request_id is -1"),
        ({"arrival_s": -0.5}, "arrival_s is -0.5; expected a finite number, 0 or more"),
        ({"arrival_s": math.nan}, "arrival_s is nan"),
        ({"delay_s": math.inf}, "delay_s is inf"),
        ({"input_tokens": 0}, "input_tokens is 0; expected a finite number, 1 or more"),
        ({"output_tokens": 0}, "output_tokens is 0"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"block_ids": (8, 2)}, "2 block_ids for 1030 input tokens; expected 3 of 512 tokens"),
        ({"block_ids": (8, 2, 5, 6)}, "4 block_ids for 1030 input tokens; expected 3"),
        ({"block_ids": (8, -2, 5)}, "block id -2"),
        ({"block_ids": (8, 2, 8)}, "block_ids repeat"),
        ({"after": 4}, "after is 4; expected the id of an earlier request"),
        ({"after": -1}, "after is -1"),
    ],
)
def test_contradictions_are_refused(change, said):
    with pytest.raises(TraceError, match=said):
        dataclasses.replace(GOOD, **change)


def test_a_trace_error_is_a_configuration_error():
    assert issubclass(TraceError, ConfigError)


def test_blocks_are_counted_up():
    assert [num_blocks(tokens, 512) for tokens in (1, 511, 512, 513, 1024)] == [1, 1, 1, 2, 2]
