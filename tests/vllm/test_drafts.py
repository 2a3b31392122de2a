"""Speculative decoding with drafts from tokens: what is saved is the KV of accepted tokens, whatever was drafted."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.examples import examples

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def config(tmp_path_factory, _single_process_vllm):
    from support.drafting_scheduler import drafting_config
    from support.vllm_models import write_model

    made = drafting_config(write_model(tmp_path_factory.mktemp("drafts"), "qwen3"), num_drafts=3)

    def drafting():
        """In a function, because hypothesis cannot print vLLM's configurations."""
        return made

    return drafting


def served(config, *, seed, luck, overlap, num_blocks, lengths, resets=()):
    """An engine that has served requests of these lengths, some of which begin alike."""
    from support.drafting_scheduler import drafting_engine, make_request

    engine = drafting_engine(config(), seed=seed, luck=luck, overlap=overlap, num_blocks=num_blocks)
    rng = random.Random(seed)
    common = [rng.randrange(2, 42) for _ in range(40)]
    try:
        for number, (num_prompt, num_output) in enumerate(lengths):
            prompt = [*common[: rng.choice([0, 40])], *(rng.randrange(2, 42) for _ in range(num_prompt))]
            engine.add(make_request(f"r{number}", prompt, num_tokens=num_output))
            for _ in range(rng.randrange(12)):
                engine.step()
            if number in resets:
                engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.run()
    finally:
        engine.scheduler.shutdown()
    return engine


LENGTHS = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 150)), min_size=1, max_size=5)


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32), luck=st.sampled_from([0.0, 0.5, 0.9, 1.0]), num_blocks=st.sampled_from([24, 40, 200]),
    lengths=LENGTHS, resets=st.sets(st.integers(0, 4)),
)  # fmt: skip
def test_what_is_saved_is_the_kv_of_the_final_tokens(config, seed, luck, num_blocks, lengths, resets):
    """VLLM's own scheduler, drafts of random luck, prefixes in common, preemption for lack of blocks and by resets."""
    engine = served(
        config, seed=seed, luck=luck, overlap=1, num_blocks=num_blocks, lengths=lengths, resets=resets
    )  # fmt: skip
    assert engine.wrong() == []


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32), luck=st.sampled_from([0.0, 0.5, 0.9]), overlap=st.integers(2, 3), lengths=LENGTHS
)  # fmt: skip
def test_also_where_steps_overlap(config, seed, luck, overlap, lengths):
    """A step is scheduled before it is known which drafts of the step before it were right."""
    engine = served(config, seed=seed, luck=luck, overlap=overlap, num_blocks=200, lengths=lengths)
    assert engine.wrong() == []


@pytest.mark.parametrize("overlap", [1, 2])
def test_chunks_that_decoding_filled_are_saved_all(config, overlap):
    """The property is not an empty one: with half of the drafts wrong every whole chunk is saved."""
    from support.drafting_scheduler import CHUNK

    engine = served(config, seed=5, luck=0.5, overlap=overlap, num_blocks=200, lengths=[(30, 150), (70, 150)])
    assert engine.num_rejected > 20
    assert engine.num_accepted > 20
    # A last chunk whose end is the last token is never computed whole: nothing follows that token.
    chunks = {tuple(tokens[:end]) for tokens in engine.final.values() for end in range(CHUNK, len(tokens), CHUNK)}
    assert len(engine.saved) == len(chunks)
