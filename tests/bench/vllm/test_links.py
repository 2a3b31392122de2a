"""Links with one server each, over servers that answer alike: the clock, what is left out, what is taken up again."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cacheflow.bench.records.suites import read_records
from cacheflow.bench.records.vllm import VllmRecord
from cacheflow.bench.suite import SuiteRun
from cacheflow.bench.vllm import fleet
from cacheflow.bench.vllm.client import VllmClient
from cacheflow.bench.vllm.costs import PrefixSize, VllmCosts
from cacheflow.bench.vllm.fleet import Fleet
from cacheflow.bench.vllm.links import START_S, LinkRounds
from cacheflow.bench.vllm.policies import MODES
from cacheflow.bench.vllm.report import vllm_tables
from cacheflow.bench.vllm.study import VllmStudy, VllmStudyOptions, tokens_needed
from cacheflow.bench.vllm.workload import BenchModel
from cacheflow.model_shape import ModelShape
from support.fake_vllm import fake_vllm
from support.manual_clock import ManualClock

SHAPE = ModelShape(
    name="fake", num_layers=4, hidden_size=64, num_q_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96,
    vocab_size=1000,
)  # fmt: skip
SIZE = PrefixSize(num_tokens=1024, suffix_tokens=37, chunk_tokens=512)
COSTS = VllmCosts(chunk_s=(1.0, 1.5), suffix_s=0.2, full_s=2.7, fit_error=0.0)
FAST, SLOW = 5e9, 1.25e9
ROUND_S = 30.0


class FakeServer:
    """Duck-types ``VllmServer``; being let run takes a third of a round of three policies."""

    def __init__(self, client: VllmClient, clock: ManualClock) -> None:
        self.name, self.client, self._clock = "fake", client, clock

    def thaw(self) -> None:
        self._clock.sleep(ROUND_S / 3)

    def freeze(self) -> None:
        pytest.fail("an only server need not stand still")

    def cpu_s(self) -> float:
        return 0.0


class Bench:
    """Commands over one results file, each with a clock that the servers move."""

    def __init__(self, client: VllmClient, folder: Path) -> None:
        self.client, self.results = client, folder / "results.jsonl"
        self.started: list[float] = []
        self.shown = ""

    def run(self, links: tuple[float, ...], *, time_limit_s: float | None = None, start_s: float = 60.0) -> bool:
        clock, said = ManualClock(), io.StringIO()
        study = self._study()

        @contextmanager
        def open_server(bytes_per_s: float) -> Iterator[Fleet]:
            self.started.append(bytes_per_s)
            clock.sleep(start_s)
            server: Any = FakeServer(self.client, clock)
            yield Fleet(servers=dict.fromkeys(MODES, server), modes=MODES)

        self.started.clear()
        suite = SuiteRun(self.results, self.records(), Console(file=said, width=200), time_limit_s)
        done = LinkRounds(study, list(MODES), suite, time_limit_s=time_limit_s, clock=clock).run(links, open_server)
        self.shown = said.getvalue()
        return done

    def records(self) -> list[VllmRecord]:
        return read_records(self.results, VllmRecord) if self.results.exists() else []

    def ran(self) -> list[tuple[float | None, int, str]]:
        return [(record.link_bytes_per_s, record.repeat, record.policy) for record in self.records()]

    def _study(self) -> VllmStudy:
        options = VllmStudyOptions(
            size=SIZE, repeats=2, neighbour=False, dtype="bfloat16", device="gpu", environment={"eager": 1},
            store="memory",
        )  # fmt: skip
        tokens = [1 + (index * 7919) % 900 for index in range(tokens_needed(SIZE, 2))]
        study = VllmStudy(BenchModel(Path("/none"), SHAPE, 4096), tokens, options, costs=COSTS)
        study.references = [self.client.complete(study.prompt(each), max_tokens=32, logprobs=5) for each in range(2)]
        return study


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(fleet, "REST_WINDOW_S", 0.001)  # nothing works after its last answer
    with fake_vllm() as client:
        yield Bench(client, tmp_path)


def test_each_link_has_a_server_and_every_policy_its_turns(bench: Bench):
    assert bench.run((FAST, SLOW))
    assert bench.started == [FAST, SLOW]
    assert sorted(bench.ran()) == sorted(
        (link, repeat, policy) for link in (FAST, SLOW) for repeat in range(2) for policy in MODES
    )
    assert all(record.correct for record in bench.records())
    assert {record.policy: record.guard is not None for record in bench.records()} == {
        "vllm": False, "load": False, "cacheflow": True
    }  # fmt: skip
    ratios = {record.link_bytes_per_s: record.load_compute_ratio for record in bench.records()}
    assert ratios[SLOW] == pytest.approx(4 * ratios[FAST], rel=0.1)


def test_what_is_on_record_is_not_run_again_and_needs_no_server(bench: Bench):
    assert bench.run((FAST,))
    assert bench.run((FAST, SLOW))
    assert bench.started == [SLOW]
    assert len(bench.ran()) == len(set(bench.ran())) == 12


def test_a_round_that_was_cut_off_is_run_again_under_the_same_ratio(bench: Bench):
    assert bench.run((FAST,))
    lines = bench.results.read_text().splitlines(keepends=True)
    bench.results.write_text("".join(lines[:4]))  # the first repeat, and a policy of the second
    assert bench.run((FAST,))
    assert bench.started == [FAST]
    assert {(record.repeat, record.policy) for record in bench.records()} == {
        (repeat, policy) for repeat in range(2) for policy in MODES
    }
    assert len({record.load_compute_ratio for record in bench.records()}) == 1


def test_a_server_that_would_not_be_up_in_time_is_not_started(bench: Bench):
    assert not bench.run((FAST, SLOW), time_limit_s=START_S - 1)
    assert bench.started == []
    assert "40 Gbit/s is left out from here on: a server with one repeat takes about 93 s, 89 s are left" in bench.shown
    assert "10 Gbit/s is left out from here on" in bench.shown


def test_a_second_link_is_held_against_what_the_first_server_took(bench: Bench):
    # The first takes 150 s to start, 40 s to warm up and save, two rounds of 30 s: of 350 s too little is left.
    assert not bench.run((FAST, SLOW), time_limit_s=350.0, start_s=150.0)
    assert bench.started == [FAST]
    assert len(bench.ran()) == 6
    assert "10 Gbit/s is left out from here on: a server with one repeat" in bench.shown
    assert bench.run((FAST, SLOW), time_limit_s=350.0, start_s=150.0)
    assert bench.started == [SLOW]


def test_a_repeat_that_would_end_too_late_is_left_out_and_taken_up(bench: Bench):
    assert not bench.run((FAST,), time_limit_s=155.0)
    assert [repeat for _, repeat, _ in bench.ran()] == [0, 0, 0]
    assert "40 Gbit/s is left out from here on: repeat 2 takes about 30 s" in bench.shown
    assert bench.run((FAST,), time_limit_s=155.0)
    assert {repeat for _, repeat, _ in bench.ran()} == {0, 1}


def test_the_table_says_what_the_guard_chose_over_each_link(bench: Bench):
    bench.run((FAST, SLOW))
    said = io.StringIO()
    Console(file=said, width=200).print(vllm_tables(bench.records()))
    assert "cacheflow at 5000.0 MB/s: the guard chose hybrid (both at once is faster)" in said.getvalue()
    assert "cacheflow at 1250.0 MB/s: the guard chose hybrid (both at once is faster)" in said.getvalue()
