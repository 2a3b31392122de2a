"""What an engine saves in passes longer than the chunks of a save."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ProfileError
from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.costs import CostIdentity, CostTable, prefill_s
from cacheflow.plan.engine_pass import EnginePass

OWN = EnginePass(pass_tokens=2048, chunk_tokens=512, saved_s=0.01)


def table(engine_pass: EnginePass | None) -> CostTable:
    """Two layers of one second a thousand tokens and one more a thousand tokens of the past."""
    chunks, offsets = (1, 512), (0, 8192)
    full_QP = np.array([[q * 1e-3 + p * 1e-6 for p in offsets] for q in chunks])
    identity = CostIdentity(
        model="m", fingerprint="f", num_layers=2, device_type="cpu", device="d", dtype="float32", num_threads=1,
        attention="sdpa",
    )  # fmt: skip
    return CostTable(
        identity=identity,
        layer_kinds=("full", "full"),
        kinds={"full": CostGrid(chunk_tokens=chunks, offsets=offsets, full_QP=full_QP, kv_only_QP=full_QP / 2)},
        head_s=0.0,
        engine_pass=engine_pass,
    )


@pytest.mark.parametrize(
    ("num_tokens", "boundaries"), [(0, 0), (1, 0), (512, 0), (513, 1), (2048, 3), (2049, 3), (4096, 6), (5000, 7)]
)
def test_each_chunk_boundary_inside_a_pass_is_saved(num_tokens, boundaries):
    assert OWN.saves_s(num_tokens) == pytest.approx(boundaries * 0.01)


@given(st.integers(1, 8000), st.integers(1, 192))
def test_passes_are_never_slower_than_chunks(num_tokens, start_block):
    start = start_block * 16
    end = min(8192, start + num_tokens)
    chunks_s = prefill_s(table(EnginePass(pass_tokens=2048, chunk_tokens=512, saved_s=0.0)), start=start, end=end)
    own_s = prefill_s(table(OWN), start=start, end=end)
    assert own_s is not None
    assert chunks_s is not None
    assert own_s == pytest.approx(max(0.0, chunks_s - OWN.saves_s(end - start)))


def test_the_prefill_of_a_prompt_is_priced_chunk_by_chunk():
    chunks_s = 2 * sum(0.512 + offset * 1e-6 for offset in (0, 512, 1024, 1536))
    assert prefill_s(table(OWN), start=0, end=2048) == pytest.approx(chunks_s - 0.03)
    assert prefill_s(table(OWN), start=100, end=100) == 0.0
    assert prefill_s(table(None), start=0, end=2048) is None


def test_a_table_keeps_its_passes_in_json():
    for own in (OWN, None):
        assert CostTable.from_dict(table(own).to_dict()).engine_pass == own
    old = table(None).to_dict()
    del old["engine_pass"]
    assert CostTable.from_dict(old).engine_pass is None, "a profile written before there were passes"


@pytest.mark.parametrize(
    "values",
    [
        {"pass_tokens": 100, "chunk_tokens": 512, "saved_s": 0.0},
        {"pass_tokens": 512, "chunk_tokens": 0, "saved_s": 0.0},
        {"pass_tokens": 1024, "chunk_tokens": 512, "saved_s": -1.0},
        {"pass_tokens": 1024, "chunk_tokens": 512, "saved_s": math.inf},
        {"pass_tokens": 1024, "chunk_tokens": 512},
        {"pass_tokens": "many", "chunk_tokens": 512, "saved_s": 0.0},
    ],
)
def test_nonsense_is_refused(values):
    with pytest.raises(ProfileError, match="engine pass"):
        EnginePass.from_dict(values)


@pytest.mark.parametrize(
    ("block_size", "max_tokens", "longest"),
    [(16, 8192, 2048), (160, 8192, 1920), (1056, 8192, 1056), (4096, 8192, 512), (16, 1024, 1008), (16, 1025, 1024)],
)
def test_the_longest_chunk_is_of_whole_blocks_and_fits_a_prompt(block_size, max_tokens, longest):
    assert OWN.longest_chunk(block_size, max_tokens=max_tokens) == longest
