"""Generation after a restoration equals generation without an eviction."""

import pytest
import torch

from cacheflow.engine.sampling import Sampling, TokenSampler, generate
from cacheflow.errors import ConfigError, PromptError
from support.engine_cases import prefilled, restore

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "windowed"), [("llama", False), ("qwen3_moe", False), ("mistral", True)])
def test_tokens_after_a_restoration_are_the_same(family, windowed, dtype, sampling):
    case = prefilled(family, dtype, windowed=windowed)
    position = len(case.tokens)
    kept = case.runner.new_kv(case.saved.capacity)
    kept.kv_L2THD.copy_(case.saved.kv_L2THD)
    restored, port = restore(case, [3, 2, 2, 0])
    expected, got = (
        generate(case.runner, kv, logits, position=position, max_new_tokens=12, sampler=TokenSampler(sampling))
        for kv, logits in ((kept, case.logits), (restored, port.logits))
    )
    assert got == expected
    assert len(expected) == 12
    assert torch.equal(kept.kv_L2THD[:, :, : position + 11], restored.kv_L2THD[:, :, : position + 11])


def test_decoding_agrees_with_a_prefill_of_the_same_tokens():
    case = prefilled("mistral", "float32", windowed=True)
    n = len(case.tokens)
    kv = case.runner.new_kv(n)
    case.runner.prefill(case.tokens[:-1], (40, n - 1), kv)
    logits = case.runner.decode_step(case.tokens[-1], n - 1, kv)
    torch.testing.assert_close(logits, case.logits, rtol=1e-4, atol=1e-4)


def test_generation_ends_at_a_stop_token_and_at_the_buffer():
    case = prefilled("llama", "float32")
    first = int(case.logits.argmax())
    arguments = {"position": len(case.tokens), "sampler": TokenSampler()}
    kv = case.runner.new_kv(case.saved.capacity)
    kv.kv_L2THD.copy_(case.saved.kv_L2THD)
    stopped = generate(case.runner, kv, case.logits, max_new_tokens=9, stop_tokens=frozenset({first}), **arguments)
    assert stopped == [first]
    with pytest.raises(PromptError, match="outside the KV buffer"):
        generate(case.runner, kv, case.logits, max_new_tokens=40, **arguments)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    sampler = TokenSampler(Sampling(temperature=1.0, top_p=0.7, seed=1))
    chosen = [sampler.choose(logits) for _ in range(400)]
    assert set(chosen) == {0, 1}
    assert 0.5 < chosen.count(0) / 400 < 0.75
    always = TokenSampler(Sampling(temperature=1.0, top_p=0.01, seed=1))
    assert {always.choose(logits) for _ in range(20)} == {0}


def test_equal_seeds_give_equal_tokens():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    draws = [
        [sampler.choose(logits) for _ in range(20)]
        for sampler in (TokenSampler(Sampling(temperature=1.0, seed=seed)) for seed in (3, 3, 4))
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}])
def test_sampling_is_checked(bad):
    with pytest.raises(ConfigError, match="temperature is"):
        Sampling(**bad)
