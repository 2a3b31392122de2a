"""Weights and adapters that change, resets and restarts, in any order: restored KV is never of another state."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from cacheflow.stores.keys import Shard
from cacheflow.vllm.adapters import LoadedAdapters
from cacheflow.vllm.step import NOTHING, ModelNews, SaveWork, StepWork, WeightsChange
from cacheflow.vllm.worker.model_state import ModelState
from cacheflow.vllm.worker.weights_watch import WeightsWatch
from support.changing_engines import ChangingEngine, ListedStore, write_adapter
from support.examples import examples
from support.scheduler_cases import BLOCK, CHUNK, Case, facts, tokens

pytestmark = pytest.mark.torch
PROMPTS = [tokens(4 * CHUNK + 5, seed=1), tokens(3 * CHUNK + 1, seed=2)]
PROMPTS.append(PROMPTS[0][: 2 * CHUNK] + tokens(2 * CHUNK + 7, seed=3))
ENGINE = st.integers(0, 1)


class Setting:
    """Two engines that share a store and a folder with an adapter; one of them recomputes too."""

    def __init__(self, folder: Path):
        self.adapter = folder / "ad"
        write_adapter(self.adapter, "first")
        self.store = ListedStore(capacity_bytes=1 << 28)
        self.engines = [self.start(0), self.start(1)]

    def start(self, index):
        return ChangingEngine(self.store, self.adapter, policy=("load", "cake")[index])

    def close(self):
        for engine in self.engines:
            engine.close()
        self.store.close()

    def ask(self, index, prompt, adapter):
        self.engines[index].ask(prompt, adapter=adapter)

    def step(self, index, count):
        for _ in range(count):
            self.engines[index].step()

    def serve(self, index, prompt, adapter, evict):
        """From arrival to end; afterwards its KV may leave vLLM's cache. Returns how many tokens were restored."""
        engine = self.engines[index]
        before = engine.num_restored
        engine.ask(prompt, adapter=adapter)
        engine.run()
        if evict:
            engine.reset_local()
        return engine.num_restored - before

    def edit(self, index, weights, announced):
        self.engines[index].edit(weights, announced=announced)

    def reset_connector(self, index):
        self.engines[index].reset_connector()

    def reset_local(self, index):
        self.engines[index].reset_local()

    def retrain(self, content):
        """The adapter's files change, and nobody is told."""
        write_adapter(self.adapter, content)

    def load_inplace(self, index, content):
        write_adapter(self.adapter, content)
        self.engines[index].load_adapter()

    def restart(self, index):
        self.engines[index].close()
        self.engines[index] = self.start(index)


CONTENT = st.sampled_from(["first", "second", "a third"])
PROMPT = st.sampled_from(PROMPTS)


class World(RuleBasedStateMachine):
    """Any order of all that can happen."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.setting = Setting(Path(self.folder.name))

    def teardown(self):
        self.setting.close()
        self.folder.cleanup()

    @rule(index=ENGINE, prompt=PROMPT, adapter=st.booleans())
    def ask(self, index, prompt, adapter):
        self.setting.ask(index, prompt, adapter)

    @rule(index=ENGINE, prompt=PROMPT, adapter=st.booleans(), evict=st.booleans())
    def serve(self, index, prompt, adapter, evict):
        self.setting.serve(index, prompt, adapter, evict)

    @rule(index=ENGINE, count=st.integers(1, 4))
    def step(self, index, count):
        self.setting.step(index, count)

    @rule(index=ENGINE, weights=st.sampled_from([1.0, 2.0, 3.0]), announced=st.booleans())
    def edit(self, index, weights, announced):
        self.setting.edit(index, weights, announced)

    @rule(index=ENGINE)
    def reset_connector(self, index):
        self.setting.reset_connector(index)

    @rule(index=ENGINE)
    def reset_local(self, index):
        self.setting.reset_local(index)

    @rule(content=CONTENT)
    def retrain(self, content):
        self.setting.retrain(content)

    @rule(index=ENGINE, content=CONTENT)
    def load_inplace(self, index, content):
        self.setting.load_inplace(index, content)

    @rule(index=ENGINE)
    def restart(self, index):
        self.setting.restart(index)


World.TestCase.settings = settings(
    max_examples=examples(100), stateful_step_count=30, suppress_health_check=list(HealthCheck)
)
TestWorld = World.TestCase


P = PROMPTS[0]
BASE, ADAPTED = False, True
KEEP, EVICT = False, True
SCRIPTS = {
    "announced while it is prefilled": [("ask", 0, P, BASE), ("step", 0, 2), ("edit", 0, 2.0, True), ("step", 0, 4),
        ("serve", 1, P, BASE, EVICT), ("serve", 1, P, BASE, EVICT)],
    "announced while it is restored": [("serve", 1, P, BASE, EVICT), ("ask", 0, P, BASE), ("step", 0, 2),
        ("edit", 0, 2.0, True), ("step", 0, 9)],
    "announced, and vLLM's own cache still holds the old": [("serve", 0, P, BASE, KEEP), ("edit", 0, 2.0, True),
        ("serve", 0, P, BASE, KEEP), ("serve", 0, P, BASE, EVICT), ("serve", 0, P, BASE, EVICT)],
    "announced after the first step since vLLM's own cache was emptied": [("reset_local", 0),
        ("ask", 0, P, BASE), ("step", 0, 1), ("edit", 0, 2.0, True), ("step", 0, 9),
        ("serve", 0, PROMPTS[2], BASE, EVICT), ("serve", 0, PROMPTS[2], BASE, EVICT)],
    "announced, then the other engine as before": [("edit", 0, 2.0, True), ("serve", 0, P, BASE, EVICT),
        ("serve", 0, P, BASE, EVICT), ("serve", 1, P, BASE, EVICT)],
    "without notice, before a prefill": [("edit", 0, 2.0, False), ("serve", 0, P, BASE, EVICT),
        ("serve", 1, P, BASE, EVICT)],
    "without notice, before a restoration": [("serve", 1, P, BASE, EVICT), ("edit", 0, 2.0, False),
        ("serve", 0, P, BASE, EVICT), ("serve", 0, P, BASE, EVICT)],
    "without notice, while it is restored": [("serve", 1, P, BASE, EVICT), ("ask", 0, P, BASE), ("step", 0, 2),
        ("edit", 0, 2.0, False), ("step", 0, 9), ("serve", 1, P, BASE, EVICT)],
    "without notice, then a reset": [("serve", 0, P, BASE, EVICT), ("edit", 0, 2.0, False),
        ("serve", 0, P, BASE, EVICT), ("reset_connector", 0), ("serve", 0, P, BASE, EVICT),
        ("serve", 0, P, BASE, EVICT)],
    "there and back": [("serve", 0, P, BASE, EVICT), ("edit", 0, 2.0, True), ("serve", 0, P, BASE, EVICT),
        ("edit", 0, 1.0, True), ("serve", 0, P, BASE, EVICT), ("serve", 1, P, BASE, EVICT)],
    "a reset while it is restored": [("serve", 1, P, BASE, EVICT), ("ask", 0, P, BASE), ("step", 0, 2),
        ("reset_connector", 0), ("step", 0, 9)],
    "a reset while it is restored behind what vLLM has": [("serve", 1, P, BASE, EVICT),
        ("serve", 0, PROMPTS[2], BASE, KEEP), ("ask", 0, P, BASE), ("step", 0, 1),
        ("reset_connector", 0), ("step", 0, 9)],
    "a reset while it is prefilled": [("ask", 0, P, BASE), ("step", 0, 2), ("reset_connector", 0), ("step", 0, 4),
        ("reset_local", 0), ("serve", 0, P, BASE, EVICT)],
    "a reset while it waits": [("serve", 1, P, BASE, EVICT), ("ask", 0, P, BASE), ("reset_connector", 0),
        ("step", 0, 9)],
    "retrained, loaded in place": [("serve", 0, P, ADAPTED, EVICT), ("load_inplace", 0, "second"),
        ("serve", 0, P, ADAPTED, EVICT), ("serve", 0, P, ADAPTED, EVICT)],
    "retrained, and vLLM's own cache still holds the old": [("serve", 0, P, ADAPTED, KEEP),
        ("load_inplace", 0, "second"), ("serve", 0, P, ADAPTED, KEEP), ("serve", 0, P, ADAPTED, EVICT),
        ("serve", 0, P, ADAPTED, EVICT)],
    "retrained, one engine not told": [("retrain", "second"), ("serve", 0, P, ADAPTED, EVICT), ("restart", 1),
        ("serve", 1, P, ADAPTED, EVICT), ("serve", 0, P, ADAPTED, EVICT)],
    "retrained while it is restored": [("serve", 1, P, ADAPTED, EVICT), ("ask", 0, P, ADAPTED), ("step", 0, 2),
        ("load_inplace", 0, "second"), ("step", 0, 9)],
    "retrained and back while it is prefilled": [("ask", 0, P, ADAPTED), ("step", 0, 1), ("load_inplace", 0, "second"),
        ("step", 0, 1), ("load_inplace", 0, "first"), ("step", 0, 4), ("serve", 1, P, ADAPTED, EVICT),
        ("serve", 1, P, ADAPTED, EVICT)],
    "retrained and asked, then reset, then loaded in place": [("serve", 0, P, ADAPTED, EVICT), ("retrain", "second"),
        ("serve", 0, P, ADAPTED, EVICT), ("serve", 0, PROMPTS[2], ADAPTED, KEEP), ("load_inplace", 0, "second"),
        ("serve", 0, P, ADAPTED, EVICT), ("serve", 0, P, ADAPTED, EVICT)],
    "retrained, then a restart": [("serve", 0, P, ADAPTED, EVICT), ("retrain", "second"), ("restart", 0),
        ("serve", 0, P, ADAPTED, EVICT)],
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_change_that_somebody_has_met(name, tmp_path):
    """One for each way to go wrong: each fails when its guard is taken away."""
    setting = Setting(tmp_path)
    for action, *arguments in SCRIPTS[name]:
        getattr(setting, action)(*arguments)
    setting.close()


def test_what_has_not_changed_is_restored_by_another_engine_and_after_a_restart(tmp_path):
    """The property above would hold for an engine that never restores."""
    write_adapter(tmp_path / "ad", "first")
    store = ListedStore(capacity_bytes=1 << 28)
    for adapter in (False, True):
        for expected in (0, 4 * CHUNK, 4 * CHUNK):
            engine = ChangingEngine(store, tmp_path / "ad")
            engine.ask(PROMPTS[0], adapter=adapter)
            engine.run()
            engine.close()
            assert engine.num_restored == expected
    store.close()


def test_once_vllms_own_cache_was_reset_what_builds_on_it_is_saved_again(tmp_path):
    setting = Setting(tmp_path)
    setting.edit(0, 2.0, True)
    setting.serve(0, P, BASE, EVICT)
    assert setting.serve(0, PROMPTS[2], BASE, KEEP) == 0
    setting.serve(0, P, BASE, EVICT)
    restored = setting.serve(0, P, BASE, EVICT)
    setting.close()
    assert restored == 4 * CHUNK


@pytest.mark.parametrize("order", ["change, reset", "reset, change"])
def test_a_cache_that_was_reset_before_the_first_step_with_other_weights_holds_nothing_old(tmp_path, order, caplog):
    """The change is heard of after that step; what builds on these caches is saved as ever."""
    setting = Setting(tmp_path)
    setting.serve(0, P, BASE, KEEP)
    for what in order.split(", "):
        if what == "reset":
            setting.reset_local(0)
            setting.reset_connector(0)
        else:
            setting.edit(0, 2.0, True)
    setting.serve(0, P, BASE, KEEP)
    assert "weights were changed" in caplog.text
    assert "Reset vLLM's prefix cache too" not in caplog.text
    identity = setting.engines[0].side.identity
    assert not identity.may_be_old(None, num_local=CHUNK, num_loaded=0)
    setting.serve(0, PROMPTS[2], BASE, EVICT)  # vLLM has two chunks of it
    restored = setting.serve(0, PROMPTS[2], BASE, EVICT)
    setting.close()
    assert restored == 4 * CHUNK


def test_a_cache_that_was_reset_before_the_first_step_with_an_adapters_new_files_holds_nothing_old(tmp_path):
    setting = Setting(tmp_path)
    setting.serve(0, P, ADAPTED, KEEP)
    setting.load_inplace(0, "second")
    setting.reset_local(0)
    setting.serve(0, P, ADAPTED, KEEP)
    setting.serve(0, PROMPTS[2], ADAPTED, EVICT)  # vLLM has two chunks of it
    restored = setting.serve(0, PROMPTS[2], ADAPTED, EVICT)
    setting.close()
    assert restored == 4 * CHUNK


@pytest.mark.parametrize("empty", ["nothing", "vLLM's own cache", "other connectors"])
def test_only_vllms_own_cache_where_it_was_reset_holds_nothing_old(tmp_path, empty):
    setting = Setting(tmp_path)
    setting.serve(0, P, BASE, KEEP)
    if empty == "vLLM's own cache":
        setting.reset_local(0)
    elif empty == "other connectors":
        setting.reset_connector(0)
    setting.edit(0, 2.0, True)
    setting.serve(0, P, BASE, KEEP)
    identity = setting.engines[0].side.identity
    setting.close()
    assert identity.may_be_old(None, num_local=CHUNK, num_loaded=0) == (empty != "vLLM's own cache")
    assert identity.may_be_old(None, num_local=0, num_loaded=CHUNK)


def test_with_two_steps_on_their_way_nobody_knows_which_of_them_reports_a_change(tmp_path):
    setting = Setting(tmp_path)
    side = setting.engines[0].side
    side.local_cache_was_reset()
    for _ in range(2):
        side.step([], lambda _: [], num_scheduled_tokens=0)
    change = WeightsChange(version=1, how="test", announced=True, before_forward=True)
    side.take_news({0: ModelNews(weights=change)})
    setting.close()
    assert side.identity.may_be_old(None, num_local=CHUNK, num_loaded=0)


def test_one_rank_that_heard_of_a_change_in_the_middle_of_a_forward_is_enough(tmp_path):
    setting = Setting(tmp_path)
    side = setting.engines[0].side
    side.local_cache_was_reset()
    side.step([], lambda _: [], num_scheduled_tokens=0)
    changes = [WeightsChange(version=1, how="test", announced=True, before_forward=each) for each in (True, False)]
    side.take_news({rank: ModelNews(weights=change) for rank, change in enumerate(changes)})
    setting.close()
    assert side.identity.may_be_old(None, num_local=CHUNK, num_loaded=0)


def test_a_worker_says_whether_a_change_was_announced_before_the_forward():
    model = torch.nn.Linear(3, 3)
    watch = WeightsWatch(model)
    adapters = LoadedAdapters(SimpleNamespace(lora_manager=None))
    state = ModelState(rank=0, block_size=BLOCK, weights=watch, adapters=adapters)
    watch.announce("before")
    state.begin_step(NOTHING)
    assert state.take_news().weights.before_forward
    state.begin_step(NOTHING)
    watch.announce("in the middle")
    assert not state.take_news().weights.before_forward
    watch.announce("before")
    state.begin_step(NOTHING)
    watch.announce("in the middle")
    assert not state.take_news().weights.before_forward
    with torch.no_grad():
        model.weight.fill_(7.0)
    state.begin_step(NOTHING)
    state.may_save(StepWork(saves=(SaveWork(namespace="", chain_hash="", block_ids=()),)))
    assert not state.take_news().weights.before_forward, "nobody knows when it happened"


def test_after_a_reset_an_engine_restores_what_it_saves_itself(tmp_path):
    write_adapter(tmp_path / "ad", "first")
    store = ListedStore(capacity_bytes=1 << 28)
    engine = ChangingEngine(store, tmp_path / "ad")
    restored = []
    for change in (lambda: None, engine.reset_connector, lambda: engine.edit(2.0, announced=True), lambda: None):
        change()
        for _ in range(2):
            assert engine.reset_local()
            before = engine.num_restored
            engine.ask(PROMPTS[0], adapter=False)
            engine.run()
            restored.append(engine.num_restored - before)
    engine.close()
    store.close()
    assert restored == [0, 4 * CHUNK] * 3 + [4 * CHUNK] * 2


def test_one_rank_whose_weights_change_is_enough():
    """A worker that is told its own count takes part again; the others never had another."""
    shards = [Shard(tp_rank=rank, tp_size=2) for rank in range(2)]
    case = Case(facts_by_rank=tuple(facts(shard=shard, namespace=f"{rank:032x}") for rank, shard in enumerate(shards)))
    prompt = case.saved_prompt(4 * CHUNK + 1, 4)
    case.arrive("a", prompt)
    case.begin("a")
    case.step()
    change = WeightsChange(version=1, how="test", announced=False)
    case.side.take_news({1: ModelNews(weights=change)})
    orders = case.step()
    assert all(each.cancel for each in orders.of_stage(0))
    assert orders.failed_blocks[0] == tuple(range(100, 100 + 4 * CHUNK // BLOCK))
    assert (orders.weights_versions, orders.generation) == ({1: 1}, 1)
    case.arrive("b", prompt)
    assert case.matched("b") == 0
    assert "without notice" in case.side.finished("b")["cacheflow_reason"]
    case.side.reset()
    assert case.step().generation == 2
