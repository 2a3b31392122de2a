"""Ranks in processes of their own: each brings its own objects of an announced prefix into shared memory."""

import numpy as np
import pytest

from cacheflow.stores.url import file_url
from support.rank_cases import (
    CHUNK,
    LAYERS,
    LOAD,
    MAX_TOKENS,
    NUM_CHUNKS,
    OFF,
    asked,
    equal,
    loaded,
    prompt,
    request,
    saved,
)
from support.store_kinds import shm_url

PATIENCE_S = 450.0

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE_S)]


def test_every_stage_brings_what_it_will_read(tmp_path, rank_host, request_url):
    from support.rank_engine import Ranks, Script, drained, leave_fast_tier, prefetched, read_by_tier
    from support.vllm_models import write_model

    model = str(write_model(tmp_path / "model", "llama", num_hidden_layers=LAYERS))
    options = {"store": [request_url, file_url(tmp_path / "kv")], "policy": "load", "self_test": False}
    script = Script(
        model=model, ranks=Ranks(pipeline=2), chunk_tokens=CHUNK, max_tokens=MAX_TOKENS, num_kv_blocks=40,
        options=options,
    )  # fmt: skip
    asked(script, "own", request(1, OFF))
    saved(script.do("evict"), 1)
    cells = NUM_CHUNKS * LAYERS // 2
    wanted = {0: cells, 1: cells + NUM_CHUNKS}  # with the boundary states of the second stage
    announcing = {"tokens": prompt(2, 40), "num_tokens": 300, "params": {"prefetch": [prompt(1)], "cacheflow": "off"}}
    script.do("call", function=drained).do("call", "left", function=leave_fast_tier)
    script.do("ask", requests=[announcing], kv=False)
    script.do("call", "brought", function=prefetched, args=(wanted,)).do("evict")
    script.do("call", "before", function=read_by_tier)
    loaded(script, "restored", request(1, LOAD))
    script.do("call", "after", function=read_by_tier)
    answers = rank_host.run(script, tmp_path / "ranks", patience_s=PATIENCE_S)
    assert sum(answers["left"]) >= 2 * cells + NUM_CHUNKS
    assert answers["brought"] == [wanted[0], wanted[1]]
    read = np.subtract(answers["after"], answers["before"])
    assert read.tolist() == [[cells, 0], [cells, 0]], "from shared memory, by each stage its own layers"
    equal(answers["restored"], answers["own"])


@pytest.fixture
def request_url(request):
    return shm_url(request)
