"""Hybrids whose weights change, and whose connector is reset: no running state of before is restored."""

import numpy as np
import pytest

from support.fixed_staircase import planned
from support.hybrid_engines import WISHES, assert_equal, hybrid_engine, nothing_lost, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROWS, END = 2, 1024


@pytest.fixture(scope="module")
def started(tmp_path_factory, _single_process_vllm):
    from support.random_weights import model_folder

    folder = model_folder(tmp_path_factory.mktemp("changes") / "qwen3_next", "qwen3_next")
    with hybrid_engine(folder) as engine:
        yield engine


@pytest.fixture
def engine(started):
    """With the weights it was loaded with, known to both halves by their fingerprint, as after a start."""
    before = {name: weight.detach().clone() for name, weight in started.model.named_parameters()}
    started.configure()
    with nothing_lost(started):
        yield started
    for name, weight in started.model.named_parameters():
        weight.data.copy_(before[name])


def edit(model):
    """Of recurrent layers alone: a function, since vLLM passes it to its workers."""
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.A_log.data.add_(1.0)
            layer.linear_attn.dt_bias.data.add_(1.0)


def edit_announced(engine):
    engine.llm.apply_model(edit)


def edit_without_notice(engine):
    edit(engine.model)


def restored_by_plan(engine, tokens, own):
    with planned(engine, 2, 2, 2, 1, 1, 0, 0, 0) as staircase:
        again = engine.ask(tokens, **WISHES)
    assert (again.record["end"], again.record["cells"]) == (END, staircase.cells(ROWS))
    assert_equal(again, own)


def reset(engine):
    return engine.scheduler.reset_prefix_cache(reset_connector=True)


def test_a_reset_of_the_connector_forgets_states_too(engine):
    tokens = prompt(11)
    own = engine.saved(tokens, **WISHES)
    assert reset(engine)
    first = engine.ask(tokens, **WISHES)
    assert first.records == []
    assert_equal(first, own)
    engine.evict()
    restored_by_plan(engine, tokens, own)


@pytest.mark.parametrize("change", [edit_announced, edit_without_notice])
def test_no_state_of_other_weights_is_restored(engine, change):
    """Weights of recurrent layers alone, which keys and values of the first row do not show."""
    tokens = prompt(12 if change is edit_announced else 13)
    old = engine.saved(tokens, **WISHES)
    change(engine)
    answer = engine.ask(tokens, **WISHES)
    assert [record["outcome"] for record in answer.records] in ([], ["failed"])
    new = engine.own(tokens, **WISHES)
    assert_equal(answer, new)
    assert not np.array_equal(new.states, old.states)
    assert reset(engine)
    engine.saved(tokens, **WISHES)
    restored_by_plan(engine, tokens, new)


def test_states_under_way_when_weights_change_are_not_saved(engine):
    """Those that decoding has left, copied before the change and due to be written when the request ends."""
    begun = prompt(14, 1000)
    name = engine.submit(begun, num_tokens=100)
    engine.run(until=lambda: engine.request(name).num_computed_tokens > END)
    edit_announced(engine)
    engine.run()
    turn = begun + engine.answers[name].tokens + prompt(15, 100)
    engine.evict()
    answer = engine.ask(turn, **WISHES)
    assert answer.records == []
    assert_equal(answer, engine.own(turn, **WISHES))
