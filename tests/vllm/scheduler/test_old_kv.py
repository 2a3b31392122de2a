"""KV of weights or adapter's files before, which another cache gives back: it is never saved under the new name.

The scheduler side and what watches weights and adapters in a worker, without an engine; steps may be on their way.
"""

from types import SimpleNamespace

import pytest
import torch

from cacheflow.vllm.adapters import Adapter, LoadedAdapters
from cacheflow.vllm.worker.model_state import ModelState
from cacheflow.vllm.worker.weights_watch import WeightsWatch
from support.changing_engines import write_adapter
from support.scheduler_cases import BLOCK, CHUNK, Case, ScheduledRequest, facts, tokens

pytestmark = pytest.mark.torch

PROMPT = tokens(4 * CHUNK + 5)
END = len(PROMPT)


class Engine:
    """One worker, whose KV may come to be in vLLM's own cache and in another connector."""

    def __init__(self, folder, **changes):
        self.case, self.folder = Case(facts_by_rank=(facts(**changes),)), folder
        self.side = self.case.side
        self.model = torch.nn.Linear(3, 3)
        self.watch = WeightsWatch(self.model)
        self.manager = SimpleNamespace(_load_adapter=lambda request: "loaded")
        loaded = LoadedAdapters(SimpleNamespace(lora_manager=self.manager))
        self.state = ModelState(rank=0, block_size=BLOCK, weights=self.watch, adapters=loaded)

    def change_weights(self):
        with torch.no_grad():
            self.model.weight.add_(1.0)
        self.watch.announce("reload_weights")

    def load(self, number=1):
        request = SimpleNamespace(lora_name="ad", lora_int_id=number, lora_path=str(self.folder))
        self.manager._load_adapter(request)  # noqa: SLF001 -- vLLM calls it

    def adapter(self, number=1):
        return Adapter(name="ad", number=number, path=str(self.folder))

    def ask(self, name, *, local=0, loaded=0, num_preemptions=0, adapter=None):
        """A request begins, with so many tokens of vLLM's own cache or by another connector."""
        if name not in self.side.requests:
            self.case.arrive(name, PROMPT, adapter=adapter)
        assert self.case.matched(name, local, num_preemptions=num_preemptions) == 0
        self.side.passed_over(name, num_loaded=loaded)

    def send(self, *scheduled):
        """A step goes to the worker: of each request where it ends, and with how many tokens."""
        each = [ScheduledRequest(name, end, count) for name, end, count in scheduled]
        return self.case.step(*each, busy=sum(count for _, _, count in scheduled))

    def carry_out(self, work):
        """The worker's part; returns the chunks that are saved, and the news."""
        self.state.begin_step(work)
        saved = [save.chunk for save in self.state.may_save(work)]
        return saved, self.state.take_news()

    def step(self, *scheduled):
        saved, news = self.carry_out(self.send(*scheduled))
        self.side.take_news({} if news.idle else {0: news})
        return saved

    def reset(self):
        """VLLM's own cache and all connectors, as vLLM does where no request keeps blocks."""
        self.side.local_cache_was_reset()
        self.side.reset()


@pytest.fixture
def engine(tmp_path):
    return Engine(tmp_path / "ad")


@pytest.mark.parametrize("order", ["change, reset", "reset, change", "change, hear, reset"])
def test_connectors_that_are_reset_while_a_request_keeps_its_blocks_may_get_them_again(engine, order):
    engine.ask("running")
    engine.step(("running", END, END))
    for what in order.split(", "):
        if what == "change":
            engine.change_weights()
        elif what == "hear":
            engine.step(("running", END, 1))
        else:
            engine.side.reset()  # vLLM refuses to reset its own cache, and resets the connectors all the same
    engine.step(("running", END, 1))
    engine.side.finished("running")
    engine.ask("next", loaded=2 * CHUNK)
    assert engine.step(("next", END, END)) == []


def test_a_step_that_was_on_its_way_when_all_was_reset_may_bring_old_kv_to_another_connector(engine):
    engine.ask("first")
    sent = engine.send(("first", END, END))
    engine.reset()
    _, news = engine.carry_out(sent)
    assert news.idle
    engine.change_weights()
    engine.ask("first", num_preemptions=1)
    engine.step(("first", END, END))
    engine.side.finished("first")
    engine.ask("next", loaded=2 * CHUNK)
    assert engine.step(("next", END, END)) == []


def test_once_the_change_was_heard_of_a_reset_of_all_makes_what_others_load_new(engine):
    engine.change_weights()
    engine.step()
    engine.reset()
    engine.ask("next", loaded=2 * CHUNK)
    assert engine.step(("next", END, END)) == [0, 1, 2, 3]


@pytest.mark.parametrize("is_heard", [False, True])
def test_a_request_that_goes_on_with_an_adapter_s_files_before_under_another_number_spoils_its_name(engine, is_heard):
    write_adapter(engine.folder, "first")
    engine.load(1)
    engine.ask("old", adapter=engine.adapter(1))
    engine.step(("old", 2 * CHUNK, 2 * CHUNK))
    write_adapter(engine.folder, "second")
    engine.load(2)  # unloaded and loaded again: vLLM counts on
    if is_heard:
        engine.case.arrive("new", PROMPT, adapter=engine.adapter(2))
        engine.step()
    engine.side.local_cache_was_reset()  # and preempts what runs
    engine.ask("old", num_preemptions=1, adapter=engine.adapter(1))
    engine.step(("old", END, END))
    engine.side.finished("old")
    engine.ask("next", local=2 * CHUNK, adapter=engine.adapter(2))
    assert engine.step(("next", END, END)) == []
    engine.side.finished("next")
    engine.ask("last", adapter=engine.adapter(2))
    assert engine.step(("last", END, END)) == [0, 1, 2, 3], "nothing of it came from a cache"


def test_what_began_with_an_adapter_s_files_before_is_not_saved_once_the_new_ones_are_loaded(engine):
    write_adapter(engine.folder, "first")
    engine.load()
    engine.step()
    write_adapter(engine.folder, "second")
    engine.ask("long", adapter=engine.adapter())
    assert engine.step(("long", 2 * CHUNK, 2 * CHUNK)) == [], "computed with the first files"
    engine.load()
    assert engine.step(("long", END, END - 2 * CHUNK)) == []


@pytest.mark.parametrize("leaks", [True, False])
def test_the_base_model_beside_an_adapter_where_vllms_kernels_mix_them_up(tmp_path, leaks, caplog):
    engine = Engine(tmp_path / "ad", adapters_leak=leaks)
    write_adapter(engine.folder, "one")
    engine.ask("adapted", adapter=engine.adapter())
    engine.load()
    assert engine.step(("adapted", 2 * CHUNK, 2 * CHUNK)) == [0, 1]
    engine.ask("base")
    both = engine.step(("adapted", END, END - 2 * CHUNK), ("base", CHUNK, CHUNK))
    assert sorted(both) == ([2, 3] if leaks else [0, 2, 3]), "an adapter's KV is its own"
    assert engine.step(("base", END, END - CHUNK)) == ([] if leaks else [1, 2, 3]), "it builds on the first chunk"
    engine.side.finished("base")
    engine.ask("found", local=CHUNK)
    assert (engine.step(("found", END, END - CHUNK)) == []) or not leaks, "in vLLM's own cache"
    engine.case.arrive("alone", PROMPT[::-1])
    engine.ask("alone")
    assert engine.step(("alone", END, END)) == [0, 1, 2, 3]
    engine.side.local_cache_was_reset()
    engine.ask("again", local=CHUNK)
    assert engine.step(("again", END, END - CHUNK)) == [0, 1, 2, 3]
    assert caplog.text.count("give it that adapter") == leaks
