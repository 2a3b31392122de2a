"""Every published format is read as what it says: arrivals, lengths, which prefixes are equal."""

import gzip
import json

import pytest

from cacheflow.workloads.statistics import describe
from cacheflow.workloads.traces import read_trace


def write_jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def shared_blocks(a, b):
    """Leading blocks two requests have in common."""
    same = 0
    for left, right in zip(a.block_ids, b.block_ids, strict=False):
        if left != right:
            break
        same += 1
    return same


MOONCAKE = [
    {"timestamp": 2000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 2000, "input_length": 1536, "output_length": 0, "hash_ids": [0, 1, 3]},
    {"timestamp": 5500, "input_length": 512, "output_length": 7, "hash_ids": [9]},
]


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_mooncake_rows_keep_their_hashes_and_count_from_the_first_arrival(tmp_path, name):
    requests = list(read_trace(write_jsonl(tmp_path / name, MOONCAKE)))
    assert [request.arrival_s for request in requests] == [0.0, 0.0, 3.5]
    assert [request.request_id for request in requests] == [0, 1, 2]
    assert [request.block_ids for request in requests] == [(0, 1, 2), (0, 1, 3), (9,)]
    # A prefill gives one token even where the trace counts none.
    assert [request.output_tokens for request in requests] == [5, 1, 7]
    assert all(request.after is None and not request.session_id for request in requests)


def test_mooncake_in_blocks_of_1024_and_of_128(tmp_path):
    path = write_jsonl(tmp_path / "trace.jsonl", MOONCAKE)
    larger = list(read_trace(path, block_tokens=1024))
    assert [len(request.block_ids) for request in larger] == [2, 2, 1]
    assert shared_blocks(larger[0], larger[1]) == 1
    smaller = list(read_trace(path, block_tokens=128))
    assert [len(request.block_ids) for request in smaller] == [9, 12, 4]
    assert shared_blocks(smaller[0], smaller[1]) == 8
    assert not set(smaller[2].block_ids) & set(smaller[0].block_ids)


def test_limit_stops_before_a_broken_row_is_reached(tmp_path):
    path = write_jsonl(tmp_path / "trace.jsonl", MOONCAKE)
    path.write_text(path.read_text() + "{broken\n")
    assert len(list(read_trace(path, limit=3))) == 3


def claude_call(t, tokens, hashes, **more):
    return {"t": t, "type": "n", "in": tokens, "out": 3, "hash_ids": hashes, **more}


CLAUDE = [
    {
        "id": "one", "block_size": 64, "hash_id_scope": "local",
        "requests": [
            claude_call(0.0, 1030, list(range(1, 17)), api_time=4.0, think_time=0.0),
            claude_call(10.0, 1100, list(range(1, 18)), api_time=2.0, think_time=5.5),
            # Same first 15 blocks; block 16 was written anew.
            claude_call(20.0, 1040, [*range(1, 16), 99], think_time=50.0),
        ],
    },
    {"id": "two", "block_size": 64, "hash_id_scope": "local", "requests": [claude_call(0.0, 1024, list(range(1, 17)))]},
]  # fmt: skip


def test_claudecode_sessions_share_inside_and_not_between(tmp_path):
    requests = list(read_trace(write_jsonl(tmp_path / "t.jsonl", CLAUDE), block_tokens=64))
    first, second, third, other = requests
    assert shared_blocks(first, second) == 16
    assert shared_blocks(first, third) == 15
    # Local hash ids 1, 2… stand for other text in another session.
    assert not set(other.block_ids) & (set(first.block_ids) | set(second.block_ids) | set(third.block_ids))
    # 1030 tokens are 16 whole blocks and 6 tokens of which the file does not say whose they are.
    assert [len(request.block_ids) for request in requests] == [17, 18, 17, 16]


def test_claudecode_sessions_are_chained_and_follow_one_another(tmp_path):
    requests = list(read_trace(write_jsonl(tmp_path / "t.jsonl", CLAUDE), block_tokens=64))
    assert [request.after for request in requests] == [None, 0, 1, None]
    assert [request.session_id for request in requests] == ["one", "one", "one", "two"]
    # Stated think time 5.5 s; then a stated 50 s that the clock leaves only 8 s for.
    assert [request.delay_s for request in requests] == [0.0, 5.5, 8.0, 0.0]
    assert [request.arrival_s for request in requests] == [0.0, 10.0, 20.0, 20.0]


def test_claudecode_reblocked_to_512_shares_whole_blocks_only(tmp_path):
    first, second, third, _ = read_trace(write_jsonl(tmp_path / "t.jsonl", CLAUDE), block_tokens=512)
    assert [len(first.block_ids), len(second.block_ids), len(third.block_ids)] == [3, 3, 3]
    assert shared_blocks(first, second) == 2
    assert shared_blocks(first, third) == 1


def test_claudecode_hash_ids_of_global_scope_are_shared_between_sessions(tmp_path):
    rows = [{**row, "hash_id_scope": "global"} for row in CLAUDE]
    first, *_, other = read_trace(write_jsonl(tmp_path / "t.jsonl", rows), block_tokens=64)
    assert shared_blocks(first, other) == 16


def test_claudecode_hash_id_behind_another_parent_is_another_prefix(tmp_path):
    calls = [claude_call(0.0, 128, [1, 2]), claude_call(1.0, 128, [3, 2])]
    path = write_jsonl(tmp_path / "t.jsonl", [{"id": "s", "block_size": 64, "requests": calls}])
    first, second = read_trace(path, block_tokens=64)
    assert not set(first.block_ids) & set(second.block_ids)


def test_claudecode_sub_agents_are_turns_of_their_session_by_time(tmp_path):
    nested = {"type": "subagent", "requests": [claude_call(3.0, 64, [7]), claude_call(1.0, 64, [8])]}
    row = {"id": "s", "block_size": 64, "requests": [claude_call(0.0, 64, [1], api_time=2.0), nested]}
    requests = list(read_trace(write_jsonl(tmp_path / "t.jsonl", [row]), block_tokens=64))
    assert [request.arrival_s for request in requests] == [0.0, 1.0, 3.0]
    assert [request.after for request in requests] == [None, 0, 1]
    # The sub-agent was sent while the first turn still ran: no delay, never a negative one.
    assert [request.delay_s for request in requests] == [0.0, 0.0, 2.0]


CLAUDE_ROWS = [
    {"trace": "a", "t": 0.0, "input": 1000, "output": 9, "reused_tokens": 0, "api_time": 1.0, "think_time": 0.0},
    {"trace": "a", "t": 5.0, "input": 1400, "output": 9, "reused_tokens": 960, "api_time": None, "think_time": None},
    {"trace": "a", "t": 9.0, "input": 600, "output": 9, "reused_tokens": 320, "api_time": 1.0, "think_time": 2.0},
    {"trace": "a", "t": 12.0, "input": 1500, "output": 9, "reused_tokens": 1344, "api_time": 1.0, "think_time": 2.0},
    {"trace": "b", "t": 0.0, "input": 640, "output": 9, "reused_tokens": 0, "api_time": 1.0, "think_time": 0.0},
]


def test_claudecode_request_table_reuses_exactly_what_it_states(tmp_path):
    requests = list(read_trace(write_jsonl(tmp_path / "t.jsonl", CLAUDE_ROWS), block_tokens=64))
    assert shared_blocks(requests[0], requests[1]) == 960 // 64
    assert shared_blocks(requests[1], requests[2]) == 320 // 64
    # The previous prompt is shorter than what is reused: it comes from the one before.
    assert shared_blocks(requests[1], requests[3]) == 1344 // 64
    statistics = describe(requests)
    assert statistics.reusable_share == (960 + 320 + 1344) / (1000 + 1400 + 600 + 1500 + 640)
    assert statistics.num_sessions == 2
    assert [request.delay_s for request in requests] == [0.0, 4.0, 2.0, 2.0, 0.0]


def test_lmcache_agent_texts_become_blocks_and_are_put_in_order_of_time(tmp_path):
    base = "".join(chr(97 + index % 26) for index in range(600))
    rows = [
        {"timestamp": 5_000_000, "input": base, "output": "12345", "session_id": "x"},
        {"timestamp": 9_000_000, "input": base[:512] + "!" * 100, "output": "", "session_id": "x"},
        {"timestamp": 8_000_000, "input": base, "output": "z", "session_id": "y"},
        {"timestamp": 8_500_000, "input": "", "output": "z", "session_id": "y"},
        {"timestamp": 6_000_000, "input": base[:400], "output": "z", "session_id": "y"},
    ]
    requests = list(read_trace(write_jsonl(tmp_path / "t.jsonl", rows), block_tokens=64))
    assert [request.arrival_s for request in requests] == [0.0, 1.0, 3.0, 4.0]
    assert [request.input_tokens for request in requests] == [150, 100, 150, 153]
    assert [request.output_tokens for request in requests] == [2, 1, 1, 1]
    assert [request.session_id for request in requests] == ["x", "y", "y", "x"]
    assert [request.after for request in requests] == [None, None, 1, 0]
    # Equal text is an equal prefix, in whichever session.
    assert requests[0].block_ids == requests[2].block_ids
    # 64 tokens are 256 characters: two blocks agree, the third differs.
    assert shared_blocks(requests[0], requests[3]) == 2
    assert shared_blocks(requests[0], requests[1]) == 1


def test_azure_rows_arrive_as_stated_and_share_nothing(tmp_path):
    path = tmp_path / "azure.csv.gz"
    path.write_bytes(gzip.compress(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,1030,0\r\n"
    ))  # fmt: skip
    first, second = read_trace(path)
    assert (first.arrival_s, first.input_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-6)
    assert (len(second.block_ids), second.output_tokens) == (3, 1)
    assert not set(first.block_ids) & set(second.block_ids)


def test_azure_times_may_name_a_zone(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.009930+00:00,2399,6\n"
    )
    assert [request.arrival_s for request in read_trace(path)] == [0.0, 1.0]


def test_etalon_rows_have_lengths_and_no_times(tmp_path):
    path = tmp_path / "etalon.csv"
    path.write_text(
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n1047,1368,2415,0.7\n74.0,918,992,0.08\n"
    )
    requests = list(read_trace(path))
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in requests] == [(0.0, 1047, 1368), (0.0, 74, 918)]


def tracelab_round(session, number, times, total, prefix):
    kinds = ("tool_result" if number else "user_message", "text", "tool_call")
    events = [
        {"event_type": kind, "timestamp": f"2026-06-01T05:40:{second:02d}.500Z"}
        for kind, second in zip(kinds, times, strict=True)
    ]
    return {
        "session_id": session, "round_index": number, "input_tokens_total": total, "prefix_tokens": prefix,
        "output_tokens": 20, "timing_events": events,
    }  # fmt: skip


def test_tracelab_rounds_run_from_their_last_input_to_their_last_event(tmp_path):
    rows = [
        tracelab_round("s", 0, (10, 12, 15), 2000, 1500),
        tracelab_round("s", 1, (18, 19, 20), 2500, 1990),
        tracelab_round("r", 0, (1, 2, 3), 700, 0),
    ]
    first, second, other = read_trace(write_jsonl(tmp_path / "t.jsonl", rows))
    assert (second.arrival_s, second.delay_s, second.after) == (8.0, 3.0, 0)
    assert shared_blocks(first, second) == 1990 // 512
    # The session before ended at 10 s; nothing is known of the time between.
    assert (other.arrival_s, other.after) == (10.0, None)


def test_a_file_is_read_no_further_than_it_is_asked_for(tmp_path):
    """Streaming: the rows behind the one asked for are not even parsed."""
    path = write_jsonl(tmp_path / "t.jsonl", CLAUDE)
    path.write_text(path.read_text() + "{broken\n")
    requests = read_trace(path, block_tokens=64)
    assert [next(requests).request_id for _ in range(4)] == [0, 1, 2, 3]
