"""What is written is what is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ConfigError, TraceError
from cacheflow.workloads.request import TraceRequest, num_blocks
from cacheflow.workloads.traces import read_trace, write_trace

FINITE = st.floats(0, 1e9, allow_nan=False)


@st.composite
def traces(draw):
    block_tokens = draw(st.sampled_from((1, 16, 512)))
    arrivals = sorted(draw(st.lists(FINITE, min_size=1, max_size=8)))
    requests = []
    for request_id, arrival_s in enumerate(arrivals):
        tokens = draw(st.integers(1, 5 * block_tokens))
        count = num_blocks(tokens, block_tokens)
        after = draw(st.none() | st.integers(0, request_id - 1)) if request_id else None
        requests.append(
            TraceRequest(
                request_id=request_id,
                arrival_s=arrival_s,
                input_tokens=tokens,
                output_tokens=draw(st.integers(1, 10**6)),
                block_ids=tuple(draw(st.lists(st.integers(0, 2**63 - 1), min_size=count, max_size=count, unique=True))),
                block_tokens=block_tokens,
                session_id=draw(st.text(max_size=8)),
                after=after,
                delay_s=draw(FINITE),
            )
        )
    return requests


@given(requests=traces(), name=st.sampled_from(("trace.jsonl", "trace.jsonl.gz")))
def test_a_written_trace_reads_back_equal(tmp_path_factory, requests, name):
    path = tmp_path_factory.mktemp("saved") / name
    assert write_trace(path, iter(requests)) == len(requests)
    assert list(read_trace(path, block_tokens=requests[0].block_tokens)) == requests


def request(request_id, arrival_s, block_ids):
    return TraceRequest(
        request_id=request_id, arrival_s=arrival_s, input_tokens=16 * len(block_ids) - 3, output_tokens=1,
        block_ids=block_ids, block_tokens=16,
    )  # fmt: skip


def test_it_reads_back_in_other_blocks(tmp_path):
    path = tmp_path / "t.jsonl"
    write_trace(path, [request(0, 0.0, (1, 2, 3)), request(1, 1.0, (1, 2, 4, 5))])
    first, second = read_trace(path, block_tokens=32)
    assert (first.block_ids, second.block_ids) == ((2, 3), (2, 5))
    assert (first.block_tokens, first.input_tokens) == (32, 45)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.jsonl or \.jsonl\.gz"):
        write_trace(tmp_path / "trace.csv", [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"request_id": 5}, "request_id is 5; expected 1"),
        ({"arrival_s": 1.0}, "arrival_s 1.0 comes after 2.0"),
        ({"block_ids": [1]}, "line 2: request 1: 1 block_ids for 29 input tokens; expected 2"),
        ({"output_tokens": 0}, "line 2: output_tokens is 0; expected an integer, 1 or more"),
        ({"after": 1}, "line 2: request 1: after is 1"),
        ({"colour": "red"}, "line 2: unknown field colour"),
        ({"session_id": 3}, "line 2: session_id is 3; expected text"),
    ],
)
def test_a_file_changed_by_hand_is_refused_with_its_line(tmp_path, change, said):
    path = tmp_path / "t.jsonl"
    write_trace(path, [request(0, 2.0, (1, 2)), request(1, 2.0, (1, 3))])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps({**json.loads(second), **change})}\n")
    with pytest.raises(TraceError) as raised:
        list(read_trace(path, block_tokens=16))
    assert said in str(raised.value)
    assert str(raised.value).count("line 2") == 1
