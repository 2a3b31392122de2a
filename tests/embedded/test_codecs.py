"""Sessions over stores with a codec: lossless is exact, lossy is near and kept apart from exact engines."""

import pytest
import torch

from cacheflow.stores.keys import ObjectKind, key_of
from cacheflow.stores.opening import open_store
from cacheflow.stores.record import decode_header
from cacheflow.stores.url import file_url
from support.damage import record_of
from support.embedded_cases import (
    answer,
    assert_nothing_runs,
    assert_same,
    make_engine,
    never_evicted,
    sampling_of,
    tiny,
    turns,
)
from support.kv_like import CODEC, codec_of

CAPACITY = 64 << 20
POLICIES = ("load", "cacheflow", "cake", "layerwise_load")


@pytest.fixture
def model():
    return tiny("llama", "bfloat16")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lossless_codec_is_exact(model, policy):
    codec_of("zstd")
    with open_store("memory?codec=zstd", capacity_bytes=CAPACITY) as store:
        session = make_engine(model, store, policy=policy).session()
        for turn, tokens in enumerate(turns()):
            session.evict()
            assert_same(answer(session, tokens, sampling=sampling_of(turn)), never_evicted(model)[turn])
    assert_nothing_runs()


def relative_error(kv, exact):
    return float((kv.float() - exact.float()).abs().max() / exact.float().abs().max())


@pytest.mark.parametrize(("name", "most"), [("int8", 0.01), ("fp8", 0.07)])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_lossy_codec_restores_what_is_near(model, policy, name, most):
    with open_store(f"memory?codec={name}", capacity_bytes=CAPACITY) as store:
        session = make_engine(model, store, policy=policy).session()
        answer(session, turns()[0])
        session.evict()
        played, exact = answer(session, turns()[1], sampling=sampling_of(1)), never_evicted(model)[1]
    assert played.chunk_ends == exact.chunk_ends
    restored = played.reply.restored_tokens
    assert restored == 118
    error = relative_error(played.kv[:, :, :restored], exact.kv[:, :, :restored])
    assert error <= most
    if policy == "load":
        assert error > 0  # it did go through the codec
        assert played.reply.report.loaded_cells > 0
    assert_nothing_runs()


def test_an_exact_engine_and_lossy_ones_do_not_read_each_other(model, tmp_path):
    """One folder, three engines, each saves the same turn and restores its own alone."""
    url = file_url(tmp_path / "kv")
    urls = {"": url, "int8": f"{url}?codec=int8", "fp8": f"{url}?codec=fp8"}
    names = set()
    for name, each in urls.items():
        with open_store(each, capacity_bytes=CAPACITY) as store:
            engine = make_engine(model, store, policy="load")
            assert dict(engine.namespace.extra).get("codec", "") == name
            names.add(engine.namespace.digest)
            session = engine.session()
            first = answer(session, turns()[0])
            # Nothing of the engines before it is found: it would be under another codec.
            assert (first.reply.saved.num_existing, first.reply.restored_tokens) == (0, 0)
            session.evict()
            played = answer(session, turns()[1], sampling=sampling_of(1))
            assert played.reply.report.loaded_cells > 0
            if not name:
                assert_same(played, never_evicted(model)[1])
    assert len(names) == 3
    with open_store(url, capacity_bytes=CAPACITY) as store:
        session = make_engine(model, store, policy="load").session(history=[*turns()[0], *first.reply.tokens])
        played = answer(session, turns()[1], sampling=sampling_of(1))
        assert played.reply.report.loaded_cells > 0
        assert_same(played, never_evicted(model)[1])


def test_a_lossless_codec_shares_with_engines_without_one(model, tmp_path):
    codec_of("zstd")
    url = file_url(tmp_path / "kv")
    for number, each in enumerate((f"{url}?codec=zstd", url, f"{url}?codec=zstd")):
        with open_store(each, capacity_bytes=CAPACITY) as store:
            played = answer(make_engine(model, store, policy="load").session(), turns()[0])
            assert_same(played, never_evicted(model)[0])
            assert (played.reply.restored_tokens > 0) == (number > 0)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_running_states_of_a_hybrid_stay_exact(name, tmp_path):
    url = f"{file_url(tmp_path / 'kv')}?codec={name}"
    with open_store(url, capacity_bytes=CAPACITY) as store:
        session = make_engine(tiny("qwen3_5_text", "bfloat16"), store, chunk_tokens=64, policy="load").session()
        answer(session, turns()[0])
        keys = [key_of(each.name) for each in store.scan({})]
        codecs = {key.kind: decode_header(memoryview(record_of(store, key))).codec for key in keys}
    assert codecs[ObjectKind.KV] == CODEC[name].number
    assert codecs[ObjectKind.STATE] == 0


def test_tokens_of_an_engine_that_restores_through_int8(model):
    """The logits of the next token move by little."""
    logits = {}
    for name in ("", "?codec=int8"):
        with open_store(f"memory{name}", capacity_bytes=CAPACITY) as store:
            session = make_engine(model, store, policy="load").session()
            answer(session, turns()[0])
            session.evict()
            logits[name] = answer(session, turns()[1]).reply.logits.float()
    exact, lossy = logits.values()
    assert not torch.equal(exact, lossy)
    assert torch.nn.functional.cosine_similarity(exact, lossy, dim=0) > 0.99
