"""The rounds of the study, over servers that answer alike: what is asked, in which order, and what goes on record."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cacheflow.bench.records.restore import GuardRecord
from cacheflow.bench.vllm.client import VllmClient
from cacheflow.bench.vllm.costs import PrefixSize, VllmCosts
from cacheflow.bench.vllm.fleet import Fleet
from cacheflow.bench.vllm.policies import MODES
from cacheflow.bench.vllm.study import VllmStudy, VllmStudyOptions, longest_sequence, tokens_needed
from cacheflow.bench.vllm.workload import BenchModel
from cacheflow.model_shape import ModelShape
from support.fake_vllm import FakeVllm, fake_vllm

SHAPE = ModelShape(
    name="fake", num_layers=4, hidden_size=64, num_q_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96,
    vocab_size=1000,
)  # fmt: skip
SIZE = PrefixSize(num_tokens=1024, suffix_tokens=37, chunk_tokens=512)
COSTS = VllmCosts(chunk_s=(1.0, 1.5), suffix_s=0.2, full_s=2.7, fit_error=0.0)


class FakeServer:
    """A server that only notes when it was let run; duck-types ``VllmServer``."""

    def __init__(self, name: str, client: VllmClient, log: list[str]) -> None:
        self.name, self.client, self._log = name, client, log

    def thaw(self) -> None:
        self._log.append(f"{self.name} runs")

    def freeze(self) -> None:
        self._log.append(f"{self.name} stands")

    def cpu_s(self) -> float:
        return 0.0


@pytest.fixture
def client() -> Iterator[VllmClient]:
    with fake_vllm() as made:
        yield made


def _study(**changes: Any) -> VllmStudy:
    values: dict[str, Any] = {
        "size": SIZE, "repeats": 2, "neighbour": False, "dtype": "bfloat16", "device": "cpu",
        "environment": {"vllm": "0"},
    }  # fmt: skip
    options = VllmStudyOptions(**{**values, **changes})
    tokens = [1 + (index * 7919) % 900 for index in range(tokens_needed(SIZE, options.repeats))]
    return VllmStudy(BenchModel(Path("/none"), SHAPE, 4096), tokens, options, costs=COSTS)


def _fleet(client: VllmClient, policies: tuple[str, ...], log: list[str]) -> Fleet:
    servers: dict[str, Any] = {name: FakeServer(name, client, log) for name in policies}
    return Fleet(servers=servers)


def _run(study: VllmStudy, client: VllmClient, policies: tuple[str, ...], log: list[str]) -> list[Any]:
    fleet = _fleet(client, policies, log)
    study.references = [client.complete(study.prompt(repeat), max_tokens=32, logprobs=5) for repeat in range(2)]
    study.save(fleet, on_step=lambda _: None)
    log.clear()
    return list(study.rounds(fleet, link=study.link_at(1.0), on_step=log.append))


def test_policies_take_turns_and_another_is_first_in_each_repeat(client: VllmClient):
    log: list[str] = []
    records = _run(_study(), client, ("vllm", "cake", "cacheflow"), log)
    assert [(record.repeat, record.policy) for record in records] == [
        (0, "vllm"), (0, "cake"), (0, "cacheflow"), (1, "cake"), (1, "cacheflow"), (1, "vllm"),
    ]  # fmt: skip
    assert log[:6] == ["vllm", "vllm runs", "vllm stands", "cake", "cake runs", "cake stands"]


def test_a_record_says_what_was_asked_and_what_came(client: VllmClient):
    record = _run(_study(), client, ("vllm", "vllm_offloading"), [])[1]
    assert record.policy == "vllm_offloading"
    assert record.correct
    assert record.compared_tokens == record.equal_tokens == 32
    assert record.cached_tokens == 1060  # the fake counts all but one
    assert (record.recomputed_cells, record.loaded_cells) == (0, 8)
    assert record.link_bytes_per_s == pytest.approx(1024 * SHAPE.kv_bytes_per_token / 2.5)
    assert record.bound_ttft_s is not None
    assert record.environment["vllm"] == "0"
    assert "copied" in str(record.environment["link"])


def test_a_prefix_that_did_not_come_back_is_noted(client: VllmClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeVllm, "cached_share", 0.5)
    record = _run(_study(), client, ("vllm", "lmcache"), [])[1]
    assert record.correct
    assert "only 530 of 1024 prefix tokens" in record.note


def test_an_answer_that_differs_is_wrong(client: VllmClient):
    study = _study()
    fleet = _fleet(client, ("vllm", "load"), [])
    study.references = [client.complete([900], max_tokens=32, logprobs=5)] * 2
    assert not any(record.correct for record in study.rounds(fleet, link=study.link_at(1.0), on_step=lambda _: None))


def test_the_neighbours_latencies_go_on_record_as_another_setting(client: VllmClient):
    record = _run(_study(neighbour=True), client, ("vllm",), [])[0]
    assert record.itl_max_s >= record.itl_p99_s >= 0.0
    assert record.itl_mean_s is not None
    assert record.perturbation == {"neighbour": 1.0}
    bounded = _run(_study(neighbour=True, itl_slo_ms=60.0), client, ("vllm",), [])[0]
    assert bounded.perturbation == {"neighbour": 1.0, "itl_slo_ms": 60.0}
    assert (bounded.itl_slo_s, record.itl_slo_s) == (0.06, None)
    assert _study(itl_slo_ms=60.0).options.perturbation == {}  # alone there is no latency to keep


def test_what_file_stores_keep_is_saved_once(client: VllmClient):
    study = _study()
    saved: list[str] = []
    for _ in range(2):  # two ratios: new servers, the same folders
        study.save(_fleet(client, ("vllm", "cacheflow", "vllm_offloading"), []), on_step=saved.append)
    assert saved.count("cacheflow") == 2
    assert saved.count("vllm_offloading") == 4
    assert "vllm" not in saved


def test_every_server_restores_once_before_it_is_timed(client: VllmClient):
    log: list[str] = []
    _study().warm_up(_fleet(client, ("vllm", "cake", "lmcache"), log))
    assert [entry for entry in log if entry.endswith("runs")] == ["cake runs", "lmcache runs"]
    assert FakeVllm.seen.count("complete 1025") == FakeVllm.seen.count("complete 1061") == 2


def test_policies_that_one_server_has_are_asked_for_by_request_and_saved_once(client: VllmClient):
    log: list[str] = []
    study, fleet = _study(), _fleet(client, ("vllm",), log)
    server = fleet.servers["vllm"]
    shared = Fleet(servers=dict.fromkeys(MODES, server), modes=MODES)
    study.references = [client.complete(study.prompt(repeat), max_tokens=32, logprobs=5) for repeat in range(2)]
    study.save(shared, repeats=[1], on_step=log.append)
    assert log == ["cacheflow", "vllm runs"]  # it is the only one: it need not stand still
    FakeVllm.modes.clear()
    records = study.round(shared, link=study.link_at(1.0), repeat=0, on_step=lambda policy: None)
    assert FakeVllm.modes == ["off", "off", "load", "load", "auto", "auto", "auto"]  # nudged, asked; explained
    assert [record.policy for record in records] == list(MODES)
    assert all("one server" in str(record.environment["alternation"]) for record in records)
    guards = [record.guard for record in records]
    assert guards == [None, None, GuardRecord(choice="hybrid", reason="both at once is faster")]
    again = study.round(shared, link=study.link_at(1.0), repeat=1, on_step=lambda policy: None)
    assert again[1].guard == guards[2]  # the reason is asked for once a link
    assert FakeVllm.modes.count("auto") == 5


def test_what_memory_stores_keep_is_lost_with_their_server(client: VllmClient):
    study = _study(store="memory")
    saved: list[str] = []
    for _ in range(2):
        study.save(_fleet(client, ("vllm", "cacheflow"), []), on_step=saved.append)
    assert saved.count("cacheflow") == 4


def test_the_text_is_long_enough_for_every_prompt():
    study = _study()
    assert len(study.prompt(1)) == 1061
    assert longest_sequence(SIZE) > 4000  # the neighbour's answer
