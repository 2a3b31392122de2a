"""The client against a small HTTP server that streams what vLLM streams."""

from collections.abc import Iterator
from typing import Any

import pytest

from cacheflow.bench.vllm.ask import Neighbour, ask, compare, save_prefix
from cacheflow.bench.vllm.client import Completion, ServerError, VllmClient
from cacheflow.errors import ConfigError
from support.fake_vllm import FakeVllm, fake_vllm


@pytest.fixture
def client() -> Iterator[VllmClient]:
    with fake_vllm() as made:
        yield made


def answer(tokens: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Completion:
    values: dict[str, Any] = {
        "tokens": tokens, "arrivals_s": tuple(0.5 + 0.1 * k for k in range(len(tokens))), "sent_s": 10.0,
        "first_logprobs": {"a": -0.5, "b": -1.0}, "cached_tokens": 0,
    }  # fmt: skip
    return Completion(**{**values, **changes})


def test_tokens_times_and_hits_are_read_from_the_stream(client: VllmClient):
    got = client.complete([5, 6], max_tokens=4, logprobs=2)
    assert got.tokens == (7, 8, 9, 10)
    assert got.cached_tokens == 1
    assert got.first_logprobs == {"a": -0.5, "b": -1.0}
    assert list(got.arrivals_s) == sorted(got.arrivals_s)
    assert 0 < got.ttft_s == got.arrivals_s[0]


def test_a_request_can_be_ended_early(client: VllmClient):
    assert client.complete([5], max_tokens=10**6, go_on=lambda n: n < 20).num_tokens == 20


def test_an_error_of_the_server_is_passed_on(client: VllmClient):
    with pytest.raises(ServerError, match="400"):
        client.complete([13], max_tokens=1)
    with pytest.raises(ConfigError, match="needs a prompt"):
        client.complete([], max_tokens=1)


def test_a_server_that_is_gone_is_an_error_of_ours():
    with pytest.raises(ServerError, match="failed"):
        VllmClient(1, timeout_s=1.0).complete([1], max_tokens=1)
    assert not VllmClient(1, timeout_s=1.0).healthy()


def test_eviction_is_tried_again_while_blocks_are_held(client: VllmClient):
    FakeVllm.held = True
    client.evict()
    assert FakeVllm.seen == ["evict", "evict"]


def test_an_eviction_that_never_succeeds_is_an_error(client: VllmClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(VllmClient, "_post", lambda *_: {"success": False})
    with pytest.raises(ServerError, match="still held"):
        client.evict(within_s=0.0)


def test_saving_and_asking_evict_and_nudge(client: VllmClient):
    save_prefix(client, [1] * 100)
    assert FakeVllm.seen == ["evict", "complete 100", "complete 16", "evict", "evict"]
    FakeVllm.seen.clear()
    asked = ask(client, [1] * 90, num_tokens=3)
    assert FakeVllm.seen == ["complete 16", "evict", "evict", "complete 90"]
    assert asked.neighbour_itls_s == ()


def test_a_neighbour_decodes_while_another_is_asked(client: VllmClient):
    asked = ask(client, [1] * 90, num_tokens=3, neighbour=Neighbour(client, [2] * 64, max_tokens=10**6))
    assert asked.answer.tokens == (2, 3, 4)
    assert asked.neighbour_itls_s
    assert FakeVllm.seen.index("complete 64") < FakeVllm.seen.index("complete 90")


def test_a_neighbour_that_fails_is_an_error(client: VllmClient):
    with pytest.raises(ServerError, match="neighbour failed"):
        ask(client, [1] * 90, num_tokens=3, neighbour=Neighbour(client, [13] * 64, max_tokens=100))


def test_metrics_are_read_by_name(client: VllmClient):
    assert client.metrics() == {'vllm:x_total{engine="0"}': 3.0}


def test_what_every_request_of_a_client_asks_of_the_connector(client: VllmClient):
    asking = client.asking({"cacheflow": "load"})
    asking.complete([5], max_tokens=1)
    asking.complete([5], max_tokens=1, params={"cacheflow": "off"})
    client.complete([5], max_tokens=1)
    assert FakeVllm.modes == ["load", "off", None]
    assert client.asking({"cacheflow": "auto"}).explain([5])["cacheflow"][0]["choice"] == "hybrid"
    assert FakeVllm.modes[-1] == "auto"


def test_latencies_between_tokens_are_those_that_overlap_a_window():
    itls = answer((1, 2, 3, 4)).itls_s(start_s=10.65, end_s=10.75)
    assert itls == pytest.approx([0.1, 0.1])  # 10.6 to 10.7 and 10.7 to 10.8


def test_equal_tokens_are_correct():
    compared = compare(answer(), answer(), beside_neighbour=False)
    assert compared.correct
    assert compared.equal_tokens == 3
    assert compared.logprob_distance == 0.0
    assert compared.note == ""


def test_other_tokens_are_wrong_alone_and_a_tie_only_beside_a_neighbour():
    other = answer((1, 9, 3), first_logprobs={"a": -0.54, "b": -1.0})
    alone = compare(other, answer(), beside_neighbour=False)
    assert not alone.correct
    assert alone.equal_tokens == 1
    assert compare(other, answer(), beside_neighbour=True).correct
    far = answer((1, 9, 3), first_logprobs={"a": -2.0})
    assert not compare(far, answer(), beside_neighbour=True).correct
    assert not compare(answer((9, 2, 3), first_logprobs={}), answer(), beside_neighbour=True).correct


def test_a_shorter_answer_is_not_equal():
    assert not compare(answer((1, 2)), answer(), beside_neighbour=False).correct
