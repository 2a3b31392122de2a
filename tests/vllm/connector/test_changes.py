"""Weights changed in place, resets and adapters in a real engine: the right tokens, and nothing of another state."""

import logging

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 128
NUM_TOKENS = 4 * CHUNK + 20


def tokens(seed):
    from support.connector_engine import random_tokens

    return random_tokens(NUM_TOKENS, seed=seed)


@pytest.fixture(scope="module")
def serving(llama):
    options = {"store": "memory", "policy": "load", "throttle_bytes_per_s": 1e9}
    llama.restart(options)
    return llama


@pytest.fixture
def engine(serving):
    """With the weights it was loaded with, known to both halves by their fingerprint, as after a start."""
    model = serving.model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    serving.configure()
    yield serving
    for name, weight in model.named_parameters():
        weight.data.copy_(before[name])


def edit(model):
    """What an announced change and one without notice both do; a function, since vLLM passes it to its workers."""
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.mul_(1.5)


def change_announced(engine):
    engine.llm.apply_model(edit)


def change_without_notice(engine):
    edit(engine.model)


def restored(answer):
    return sum(record["end"] - record["start"] for record in answer.records if record["outcome"] == "done")


def reset(engine):
    return engine.scheduler.reset_prefix_cache(reset_connector=True)


def test_a_reset_of_the_connector_forgets_what_was_saved_and_saves_anew(engine):
    prompt = tokens(1)
    own = engine.saved(prompt)
    assert restored(engine.ask(prompt)) == 4 * CHUNK
    engine.evict()
    assert reset(engine)
    answers = []
    for _ in range(2):
        answers.append(engine.ask(prompt))
        engine.evict()
    assert [restored(answer) for answer in answers] == [0, 4 * CHUNK]
    assert all(answer.tokens == own.tokens for answer in answers)


def test_what_was_saved_before_a_reset_stays_for_others(engine):
    prompt = tokens(2)
    engine.saved(prompt)
    assert reset(engine)
    assert restored(engine.ask(prompt)) == 0
    engine.configure()  # another process with the same weights, on the same store
    assert restored(engine.ask(prompt)) == 4 * CHUNK


@pytest.mark.parametrize("policy", ["load", "cake"])
def test_a_reset_in_the_middle_of_a_restoration_and_of_a_prefill(engine, policy):
    engine.configure(policy=policy)
    restoring, prefilled = (tokens(seed) for seed in {"load": (3, 4), "cake": (13, 14)}[policy])
    own = [engine.own(prompt).tokens for prompt in (restoring, prefilled)]
    engine.saved(restoring)
    engine.set_rate(2e5)
    names = [engine.submit(prompt) for prompt in (restoring, prefilled)]
    engine.run(until=lambda: engine.side.has_work)
    engine.step()
    assert not reset(engine), "vLLM itself cannot reset while KV blocks are in use"
    engine.run()
    engine.set_rate(1e9)
    answers = [engine.answers[name] for name in names]
    assert [answer.tokens for answer in answers] == own
    assert [restored(answer) for answer in answers] == [0, 0]
    assert answers[0].record["outcome"] == "failed"
    assert "reset" in answers[0].record["error"]
    engine.evict()
    assert restored(engine.ask(prefilled)) == 0, "its KV is of two generations"


@pytest.mark.parametrize("change", [change_announced, change_without_notice])
@pytest.mark.parametrize("when", ["before a reset", "without a reset"])
def test_no_kv_of_the_old_weights_is_restored_after_a_change(engine, change, when):
    prompt = tokens(5)
    old = engine.saved(prompt).tokens
    change(engine)
    engine.evict()
    if when == "before a reset":
        assert reset(engine)
    answer = engine.ask(prompt)
    assert restored(answer) == 0
    new = engine.own(prompt).tokens
    assert answer.tokens == new != old
    engine.evict()
    again = engine.ask(prompt)
    stopped = change is change_without_notice and when == "without a reset"
    assert restored(again) in (0, 4 * CHUNK)
    assert again.tokens == new
    assert ("changed without notice" in again.params.get("cacheflow_reason", "")) == stopped


@pytest.mark.parametrize("change", [change_announced, change_without_notice])
def test_no_kv_of_the_new_weights_is_saved_for_engines_with_the_old(engine, change):
    """Also not by the very step in which the change shows."""
    prompt = tokens(6 if change is change_announced else 16)
    old = engine.own(prompt).tokens
    change(engine)
    assert engine.ask(prompt).tokens != old
    engine.evict()
    for layer in engine.model.model.layers:
        layer.input_layernorm.weight.data.div_(1.5)
    engine.configure()  # another process with the original weights, on the same store
    fresh = engine.ask(prompt)
    assert (restored(fresh), fresh.tokens) == (0, old)


@pytest.mark.parametrize("change", [change_announced, change_without_notice])
def test_a_restoration_under_way_when_the_weights_change_is_computed(engine, change):
    prompt = tokens(7 if change is change_announced else 17)
    old = engine.saved(prompt).tokens
    engine.set_rate(2e5)
    name = engine.submit(prompt)
    engine.run(until=lambda: engine.side.has_work)
    engine.step()
    change(engine)
    engine.set_rate(1e9)
    engine.run()
    new = engine.own(prompt).tokens
    assert engine.answers[name].tokens == new != old


def test_a_change_without_notice_is_one_line_in_the_log_and_a_reset_goes_on(engine, caplog):
    prompts = [tokens(seed) for seed in (8, 9)]
    engine.saved(prompts[0])
    change_without_notice(engine)
    with caplog.at_level(logging.WARNING, "cacheflow"):
        for prompt in prompts * 2:
            engine.ask(prompt)
            engine.evict()
        lines = [record.getMessage() for record in caplog.records if "without notice" in record.getMessage()]
    assert len(lines) == 1
    assert "reset_external=true" in lines[0]
    assert reset(engine)
    new = engine.ask(prompts[0])
    engine.evict()
    again = engine.ask(prompts[0])
    assert (restored(new), restored(again)) == (0, 4 * CHUNK)
    assert again.tokens == new.tokens


def test_vllms_own_cache_of_the_old_weights_is_not_saved_under_the_new_name(engine):
    """It goes on serving it until it is reset, which is its own affair; what we restore afterwards is not."""
    prompt = tokens(10)
    engine.ask(prompt)  # stays in vLLM's cache
    change_announced(engine)
    for _ in range(2):
        engine.ask(prompt)
    engine.evict()
    answer = engine.ask(prompt)
    new = engine.own(prompt).tokens
    assert (restored(answer), answer.tokens) == (0, new)
