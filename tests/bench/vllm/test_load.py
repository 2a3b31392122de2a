from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

from cacheflow.bench.vllm.client import ServerError
from cacheflow.bench.vllm.load import LoadOptions, record_of, restored_tokens, session_prompts
from cacheflow.bench.vllm.report import load_table
from cacheflow.bench.vllm.workload import PROMPT_STRIDE, prompt
from cacheflow.errors import ConfigError

OPTIONS = LoadOptions(
    rate=2.0, bytes_per_s=2e7, kv_bytes_per_token=1000, num_sessions=4, num_turns=3, chars_per_turn=100
)
RESULT = {
    "completed": 11, "mean_ttft_ms": 500.0, "median_ttft_ms": 400.0, "p99_ttft_ms": 900.0, "mean_itl_ms": 20.0,
    "p99_itl_ms": 50.0, "request_throughput": 1.5, "total_token_throughput": 900.0, "total_input_tokens": 4000,
    "restored_tokens": 1000,
}  # fmt: skip


def test_turns_extend_the_turn_before_and_sessions_share_nothing():
    prompts = list(session_prompts(OPTIONS))
    assert len(prompts) == OPTIONS.num_requests
    first, second, third = prompts[:4], prompts[4:8], prompts[8:]
    for one, two, three in zip(first, second, third, strict=True):
        assert two.startswith(one)
        assert three.startswith(two)
        assert len(three) == 300
    assert len(set(first)) == 4


def test_too_many_sessions_are_refused():
    with pytest.raises(ConfigError, match="more than"):
        list(session_prompts(replace(OPTIONS, num_sessions=10**6)))


def test_the_clients_milliseconds_become_seconds():
    record = record_of(RESULT, policy="vllm", model="m", options=OPTIONS)
    assert record.ttft_mean_s == 0.5
    assert record.num_failed == 1
    assert '"rate": 2.0' in record.to_json()


def test_the_sessions_do_not_fit_in_the_kv_cache_together_but_each_request_does():
    options = replace(OPTIONS, num_sessions=16, chars_per_turn=5000)
    session_tokens = 3 * 5000 // 4
    assert options.kv_cache_bytes < 0.6 * 16 * session_tokens * 1000
    for sessions in (1, 2, 16):
        assert replace(options, num_sessions=sessions).kv_cache_bytes >= (options.max_tokens + 128) * 1000
    assert options.max_tokens > session_tokens + options.answer_tokens


def test_what_was_restored_is_read_from_the_servers_counters():
    name = "vllm:prompt_tokens_by_source_total"
    samples = {
        f'{name}{{engine="0",source="local_compute"}}': 500.0,
        f'{name}{{engine="0",source="external_kv_transfer"}}': 1280.0,
    }
    assert restored_tokens(samples) == 1280


def test_the_table_shows_the_tail_the_throughput_and_what_was_restored():
    console = Console(width=150)
    with console.capture() as capture:
        console.print(load_table([record_of(RESULT, policy="cacheflow", model="m", options=OPTIONS)]))
    (row,) = [line for line in capture.get().splitlines() if line.startswith(" cacheflow ")]
    assert row.split()[-2:] == ["25%", "1"]
    assert [word for word in row.split()[1:-2] if word != "ms"] == ["500", "400", "900", "20.0", "50.0", "1.50", "900"]


def test_a_run_without_answers_is_an_error():
    with pytest.raises(ServerError, match="none of 12"):
        record_of({**RESULT, "completed": 0}, policy="vllm", model="m", options=OPTIONS)
    with pytest.raises(ServerError, match="lacks 'mean_itl_ms'"):
        record_of({k: v for k, v in RESULT.items() if k != "mean_itl_ms"}, policy="v", model="m", options=OPTIONS)


def test_prompts_of_a_run_share_no_block():
    tokens = list(range(100_000))
    prompts = [prompt(tokens, index, 4133) for index in range(8)]
    blocks = [{tuple(each[at : at + 128]) for at in range(0, 4096, 128)} for each in prompts]
    assert all(one.isdisjoint(other) for index, one in enumerate(blocks) for other in blocks[index + 1 :])
    assert all(later[0] - earlier[0] == PROMPT_STRIDE for earlier, later in pairwise(prompts))
    with pytest.raises(ConfigError, match="there are 100000"):
        prompt(tokens, 1000, 4133)
