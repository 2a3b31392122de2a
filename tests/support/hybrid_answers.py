"""Prompts of engines with recurrent layers, and what must be equal of two answers to one."""

from __future__ import annotations

import numpy as np

CHUNK = 128
PROMPT, NUM_TOKENS = 1100, 8
END = 1024
"""Where the last chunk of such a prompt ends."""
WISHES = {"num_tokens": NUM_TOKENS, "logprobs": 5}


def prompt(seed, count=PROMPT):
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


def assert_equal(one, other, *, alone=True):
    """Equal to the last bit; log-probabilities only of requests that had every step to themselves.

    Beside others a step multiplies matrices with more rows, which some CPUs round in another way.
    """
    assert np.array_equal(one.kv, other.kv)
    assert np.array_equal(one.states, other.states)
    assert one.tokens == other.tokens
    assert not alone or one.logprobs == other.logprobs


def restored(engine, tokens, *, ratio, **wishes):
    engine.balance_link(len(tokens), ratio=ratio)
    return engine.ask(tokens, **{**WISHES, **wishes})


def assert_a_wrong_state_shows(engine, tokens, own, wrong, *, end, step):
    """Negative control: what is compared depends on the state where a restoration ends."""
    name = engine.submit(tokens, params={"cacheflow": "recompute"}, **WISHES)
    engine.run(until=lambda: engine.request(name).num_computed_tokens >= end - step)
    earlier = engine.gather_states(engine.state_blocks(name, end - step))
    engine.run(until=lambda: engine.request(name).num_computed_tokens >= end)
    blocks = engine.state_blocks(name, end)
    right = engine.gather_states(blocks)
    noisy = right ^ np.where(np.random.default_rng(5).random(right.shape) < 0.05, 0x10, 0).astype(np.uint8)
    state = {"none": np.zeros_like(right), "of an earlier chunk": earlier, "a little": noisy}[wrong]
    assert not np.array_equal(state, right)
    engine.states.scatter(0, 1, blocks, state)
    engine.run()
    assert engine.answers[name].logprobs != own.logprobs
