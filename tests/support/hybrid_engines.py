"""Engines of models with recurrent layers, what they are asked, and what their answers are held to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.faulty_store import faulty_store, inject
from support.patience import no_late_reads
from support.v2_runner import WANTED

CONNECTOR = "CacheFlowHybridConnector"
CHUNK, NUM_BLOCKS = 128, 96
ROWS, PROMPT, END = (2, 588, 512) if WANTED else (3, 1100, 1024)
"""Of tests that both runners run, the last chunk of a prompt ending at ``END``; less where kernels are interpreted."""
MIXED = (2, 2, 1, 0) if WANTED else (3, 3, 2, 2, 1, 0, 0, 0)
"""A staircase with chunks that are recomputed whole, shared, and loaded whole."""
DEEP = {"num_hidden_layers": 4 * ROWS, "decoder_sparse_step": 4 * ROWS}
"""So many rows; experts in the last layer alone, without which vLLM does not start the model."""
WISHES = {"num_tokens": 8, "logprobs": 5}
OPTIONS = {"self_test": True, "throttle_bytes_per_s": 1e8, "policy": "cake"}
TIE, UNLIKELY_SHARE = 4.0, 1 / 16
"""See ``is_likely``."""
STAND_INS = str(Path(__file__).parents[1] / "data" / "stand_ins")
"""For modules that vLLM's models import and never use here: torchvision."""


@contextmanager
def stand_ins() -> Iterator[None]:
    """What models want at start and never use here: torchvision, and a processor of images.

    vLLM looks at models in a process of its own.
    """
    from vllm.renderers import TokenizeParams

    info = SimpleNamespace(
        default_tok_params=TokenizeParams(max_total_tokens=1 << 20),
        skip_prompt_length_check=False, ctx=SimpleNamespace(model_config=SimpleNamespace(max_model_len=0)),
        supported_mm_limits={"image": None, "video": 1}, allowed_mm_limits={"image": 0, "video": 0},
        get_mm_max_tokens_per_item=lambda **_: {},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        processor = SimpleNamespace(info=info)
        patch.setattr("vllm.multimodal.registry.MultiModalRegistry.create_processor", lambda *_, **__: processor)
        patch.syspath_prepend(STAND_INS)
        patch.setenv("PYTHONPATH", os.pathsep.join([STAND_INS, *sys.path]))
        yield


@contextmanager
def hybrid_engine(
    folder: Path, *, chunk: int = CHUNK, options: dict | None = None, seed: int = 0, **changes: Any
) -> Iterator[Any]:
    """An engine with random weights and a store that can be made to fail; ``changes`` to vLLM's arguments."""
    from cacheflow.vllm.compat import runner_kind
    from support.connector_engine import serving_engine
    from support.random_weights import random_weights

    arguments = {"load_format": "dummy", "num_gpu_blocks_override": NUM_BLOCKS, "connector": CONNECTOR, **changes}
    options = OPTIONS | (options or {})
    with pytest.MonkeyPatch.context() as patch, random_weights(seed=seed):
        if "store" not in options:
            patch.setattr("cacheflow.vllm.startup.open_store.open_store", faulty_store)
        with serving_engine(folder, dtype="bfloat16", chunk_tokens=chunk, options=options, **arguments) as engine:
            assert runner_kind(engine.runner).value == ("v2" if WANTED else "v1")
            yield engine


@contextmanager
def asynchronous() -> Iterator[None]:
    """Engines that begin meanwhile schedule a step ahead of what was sampled, as on GPUs: on CPUs vLLM would not."""
    from vllm.platforms.cpu import CpuPlatform

    configure = CpuPlatform.check_and_update_config

    def configured(vllm_config: Any) -> None:
        configure(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(configured))
        yield


@contextmanager
def nothing_lost(engine: Any) -> Iterator[Any]:
    """The engine with nothing cached, no faults and no late reads; afterwards no block of it is lost."""
    engine.evict()
    free_blocks = engine.free_blocks
    with no_late_reads():
        yield engine
    inject(engine)
    engine.run()
    engine.evict()
    assert engine.free_blocks == free_blocks


def prompt(seed: int, count: int = PROMPT) -> list[int]:
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


def assert_equal(one: Any, other: Any) -> None:
    """Equal to the last bit, of requests that had every step to themselves."""
    assert_same_cache(one, other)
    assert one.tokens == other.tokens
    assert one.logprobs == other.logprobs


def assert_equal_beside_others(engine: Any, tokens: Sequence[int], one: Any, other: Any) -> None:
    """The prompt's cache to the last bit, and a reply that vLLM by itself might have given beside others."""
    assert_same_cache(one, other)
    assert is_likely(engine, tokens, one.tokens)


def is_likely(engine: Any, tokens: Sequence[int], reply: Sequence[int]) -> bool:
    """Whether vLLM might have replied this by itself, beside others and after any steps that brought it there.

    Steps of other sizes round in other ways, on some CPUs more than on others, and these models' experts turn a last
    bit into a token that is less likely by up to 20, where vLLM computes prompt and reply as one prompt: that was a
    single token in a reply, of 10,000 seven by more than 8. Of a reply from an earlier chunk's state every second is.
    """
    return num_unlikely(engine, tokens, reply) <= 1 + UNLIKELY_SHARE * len(reply)


def num_unlikely(engine: Any, tokens: Sequence[int], reply: Sequence[int]) -> int:
    """Tokens of a reply that vLLM itself finds less likely than a tie, prompt and reply computed as one prompt."""
    return sum(gap > TIE for gap in engine.log_gaps(tokens, reply))


def assert_same_cache(one: Any, other: Any) -> None:
    assert np.array_equal(one.kv, other.kv)
    assert one.states is not None
    assert np.array_equal(one.states, other.states)


def restored(engine: Any, tokens: Sequence[int], *, ratio: float, **wishes: Any) -> Any:
    """Asked where loading takes ``ratio`` times what recomputing does."""
    engine.balance_link(len(tokens), ratio=ratio)
    return engine.ask(tokens, **{**WISHES, **wishes})


def assert_a_wrong_state_shows(
    engine: Any, tokens: Sequence[int], own: Any, wrong: str, *, end: int, step: int
) -> None:
    """Negative control: what is compared depends on the state where a restoration ends."""
    name = engine.submit(tokens, params={"cacheflow": "recompute"}, **{**WISHES, "num_tokens": 32})
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
    answer = engine.answers[name]
    assert answer.logprobs[: len(own.logprobs)] != own.logprobs
    assert not is_likely(engine, tokens, answer.tokens)
