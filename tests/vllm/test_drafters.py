"""Drafters with layers of their own (EAGLE, EAGLE-3, MTP): their KV comes back too, and as many drafts are accepted."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from support.v2_runner import WANTED

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK, NUM_CHUNKS, NUM_DRAFTS = 128, 6, 3
PROMPT, OUTPUT = CHUNK * NUM_CHUNKS + 76, 120
VOCABULARY = 6
"""So few tokens that a drafter of random weights is right now and then."""
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 192,
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A drafter on a target.

    ``target`` is a configuration of ``data/models`` or empty for ``LLAMA``, ``drafter`` changes ``LLAMA`` or is None
    where the target's own configuration describes it. ``knows_next``: its drafter knows the token after a pass.
    """

    method: str
    target: str = ""
    drafter: dict | None = None
    dtype: str = "float32"
    engine: dict = field(default_factory=dict)
    knows_next: bool = False


# Unless told otherwise V1 gives a drafter the prompt's last token as the one after every pass.
CASES = {
    "eagle": Case("eagle", drafter={"num_hidden_layers": 1}, knows_next=True),
    "eagle_of_other_heads": Case("eagle", drafter={"num_hidden_layers": 1, "num_key_value_heads": 4}, knows_next=True),
    "eagle3": Case("eagle3", drafter={"num_hidden_layers": 1, "draft_vocab_size": VOCABULARY}, dtype="bfloat16"),
    "mtp": Case("mtp", target="glm4_moe", dtype="bfloat16"),
    "mtp_latent": Case("mtp", target="deepseek_v3", engine={"num_gpu_blocks_override": 512}),
}


@pytest.fixture(scope="module", params=["eagle", "eagle3"] if WANTED else list(CASES))
def engine(request, tmp_path_factory, _single_process_vllm):
    from support.connector_engine import serving_engine
    from support.random_weights import model_folder, random_weights
    from support.vllm_models import attention_of

    case, folder = CASES[request.param], tmp_path_factory.mktemp("drafters")
    speculative = {
        "method": case.method, "num_speculative_tokens": NUM_DRAFTS, "disable_padded_drafter_batch": case.knows_next
    }  # fmt: skip
    if case.target:
        target = model_folder(folder / "target", case.target, vocab_size=VOCABULARY)
        speculative |= attention_of(target)
    else:
        target = write(folder / "target", LLAMA)
    if case.drafter is not None:
        speculative["model"] = str(write(folder / "drafter", LLAMA | case.drafter))
    options = {
        "self_test": True,
        "unsupported_models": "refuse",
        "throttle_bytes_per_s": 1e8,
        "policy": "cake",
    }
    arguments = {"load_format": "dummy", "speculative_config": speculative} | case.engine
    with (
        random_weights(),
        serving_engine(target, dtype=case.dtype, chunk_tokens=CHUNK, options=options, **arguments) as serving,
    ):
        serving.core.scheduler.scheduler_config.enable_chunked_prefill = True
        serving.core.scheduler.max_num_scheduled_tokens = CHUNK
        serving.case = case
        yield serving


def write(folder, config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def drafts(engine):
    """What was drafted since it was last asked, and how many were accepted each time."""
    drafted, accepted = [], []
    executor, scheduler = engine.core.model_executor, engine.scheduler
    take, make = executor.take_draft_token_ids, scheduler.make_spec_decoding_stats

    def noting_drafts():
        ids = take()
        if ids is not None:
            drafted.extend(ids.draft_token_ids)
        return ids

    def noting_accepted(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs):
        accepted.append(num_accepted_tokens)
        return make(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

    def taken():
        found = list(drafted), list(accepted)
        drafted.clear()
        accepted.clear()
        return found

    executor.take_draft_token_ids, scheduler.make_spec_decoding_stats = noting_drafts, noting_accepted
    yield taken
    executor.take_draft_token_ids, scheduler.make_spec_decoding_stats = take, make


def prompt(seed):
    return np.random.default_rng(seed).integers(2, VOCABULARY, PROMPT).tolist()


def assert_equal_but_for_ends(engine, ours, own):
    """Equal, but for the last position of a chunk in the drafter's row where the engine's drafter was misinformed."""
    assert np.array_equal(ours[:-1], own[:-1])
    token_bytes = engine.layout.block_bytes_L[-1] // engine.layout.block_size
    misinformed = 0 if WANTED or engine.case.knows_next else NUM_CHUNKS
    assert (ours[-1] != own[-1]).sum() <= misinformed * token_bytes


def assert_same_drafts(ours, own):
    """The same drafts, and as many accepted each time; the engine's own prefill drafted after each of its passes, too.

    V2 keeps what it drafts to itself.
    """
    (drafted, accepted), (first, first_accepted) = ours, own
    assert drafted
    assert drafted == first[-len(drafted) :]
    assert accepted == first_accepted


def test_both_ways_at_once(engine, drafts):
    tokens = prompt(1)
    own = engine.saved(tokens, num_tokens=OUTPUT)
    first = drafts()
    for ratio in (1.0, 4.0):
        engine.balance_link(PROMPT, ratio=ratio)
        again = engine.ask(tokens, num_tokens=OUTPUT)
        assert again.record["loaded_cells"] > 0
        assert again.record["recomputed_cells"] > 0
        assert_equal_but_for_ends(engine, again.kv, own.kv)
        assert again.tokens == own.tokens
        if engine.case.knows_next:
            assert_same_drafts(drafts(), first)
        engine.evict()
        drafts()


def test_by_loading_alone_as_many_drafts_are_accepted(engine, drafts):
    tokens = prompt(4)
    own = engine.saved(tokens, num_tokens=OUTPUT)
    first = drafts()
    again = engine.ask(tokens, num_tokens=OUTPUT, params={"cacheflow": "load"})
    assert again.record["recomputed_cells"] == 0
    assert np.array_equal(again.kv, own.kv)
    assert again.tokens == own.tokens
    assert_same_drafts(drafts(), first)


def test_without_the_drafters_kv_other_drafts_are_accepted(engine, drafts):
    """Negative control: tokens stay, whatever the drafter sees; how many of its drafts are accepted does not."""
    tokens = prompt(4)
    own = engine.saved(tokens, num_tokens=OUTPUT)
    first = drafts()
    name = engine.submit(tokens, num_tokens=OUTPUT, params={"cacheflow": "load"})
    engine.run(until=lambda: bool(engine.answers[name].tokens))
    blocks = engine.block_ids(name)[: PROMPT // engine.layout.block_size]
    layout, top = engine.layout, engine.layout.num_layers
    generator, count = torch.Generator().manual_seed(3), layout.num_bytes(top - 1, top, len(blocks))
    numbers = (30 * torch.randn(count // layout.dtype.itemsize, generator=generator)).to(layout.dtype)
    layout.scatter(top - 1, top, blocks, numbers.view(torch.uint8).numpy())
    engine.run()
    assert engine.answers[name].tokens == own.tokens
    with pytest.raises(AssertionError):
        assert_same_drafts(drafts(), first)
