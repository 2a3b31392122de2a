"""A vLLM engine over a store with a codec: lossless restores every bit, lossy nearly, and apart from exact engines."""

import numpy as np
import pytest

from cacheflow.stores.record import HEADER_BYTES
from cacheflow.stores.url import file_url
from support.kv_like import codec_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 128
LAYERS = 4
NUM_CHUNKS = 4
NUM_TOKENS = NUM_CHUNKS * CHUNK + 21


def floats(kv):
    """KV bytes ``[L, blocks, P]`` of float32 caches as numbers."""
    return np.ascontiguousarray(kv).view(np.float32)


def test_engines_with_and_without_codecs_on_one_folder(llama, tmp_path):
    """Each in turn; exact ones share, lossy ones have a namespace of their own."""
    from support.connector_engine import random_tokens

    codec_of("zstd")
    prompt, url = random_tokens(NUM_TOKENS, seed=1), file_url(tmp_path / "kv")
    engine, found, namespaces, sizes = llama, {}, {}, {}
    for name in ("", "zstd", "int8", "fp8"):
        options = {"store": f"{url}?codec={name}" if name else url, "policy": "load", "throttle_bytes_per_s": 1e9}
        engine.restart(options)
        # An exact engine finds what the one before it saved; a lossy one nothing, and saves its own.
        own = engine.ask(prompt) if name == "zstd" else engine.saved(prompt)
        assert bool(own.records) == (name == "zstd")
        engine.evict()
        again = engine.ask(prompt)
        assert again.record["outcome"] == "done"
        assert again.record["loaded_cells"] > 0
        found[name], namespaces[name] = again, engine.side.identity.namespace(None)
        sizes[name] = engine.worker.facts.link.bytes_per_s / 1e9
        stats = engine.store.stats()
        assert stats.num_objects > 0
    exact = found[""]
    assert found["zstd"].tokens == exact.tokens
    assert np.array_equal(found["zstd"].kv, exact.kv)
    for name, most in (("int8", 0.01), ("fp8", 0.07)):
        error = np.abs(floats(found[name].kv) - floats(exact.kv)).max() / np.abs(floats(exact.kv)).max()
        assert 0 < error <= most
    assert namespaces[""] == namespaces["zstd"]
    assert len(set(namespaces.values())) == 3
    # The throttle is a link for what is stored: the plan knows that four bytes travel as one.
    assert sizes[""] == 1.0
    assert sizes["int8"] == pytest.approx(4.0, rel=0.1)
    records = [each for each in (tmp_path / "kv").glob("objects/*/*/*") if "_kv_" in each.name]
    lossy = [each.stat().st_size - HEADER_BYTES for each in records if each.name.startswith(namespaces["int8"])]
    raw = [each.stat().st_size - HEADER_BYTES for each in records if each.name.startswith(namespaces[""])]
    assert len(lossy) == len(raw) > 0
    assert sum(lossy) < 0.3 * sum(raw)
