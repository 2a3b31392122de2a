from __future__ import annotations

from pathlib import Path

import pytest

from cacheflow.errors import CostRangeError, ProfileError
from cacheflow.model_shape import ModelShape
from cacheflow.shapes.published import published_gpus, read_published

SHAPE = ModelShape(
    name="tiny-2", num_layers=2, hidden_size=64, num_q_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=128,
    vocab_size=1000,
)  # fmt: skip
STEM = "llmservingsim_CARD_someone_tiny-2_bf16_tp1"
PREFILL = {(16, 0): 10, (16, 100): 14, (16, 400): 26, (64, 0): 20, (64, 400): 84}
DECODE = {(1, 100): 3, (1, 400): 6, (8, 100): 10, (8, 400): 31}
PARTS = {"layernorm": 1, "qkv_proj": 8, "rotary_emb": 2, "o_proj": 5, "gate_up_proj": 16, "act_fn": 3, "down_proj": 7}


def write(
    folder: Path, *, parts=PARTS, extra: str = "", header: str = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
):
    rows = [f"{chunk},{offset},0,0,{us}" for (chunk, offset), us in PREFILL.items()]
    rows += [f"0,0,{num},{context},{us}" for (num, context), us in DECODE.items()]
    rows += ["64,400,8,100,9999"]  # a mixed step: of no use
    (folder / f"{STEM}_attention.csv").write_text("\n".join([header, *rows, extra]) + "\n")
    dense = [
        f"{name},{tokens},{us * (1 if tokens == 1 else tokens / 16)}"
        for name, us in parts.items()
        for tokens in (1, 16, 64)
    ]
    dense += ["final_layernorm,1,2", "final_layernorm,64,4"]
    (folder / f"{STEM}_dense.csv").write_text("\n".join(["layer,tokens,time_us", *dense]) + "\n")


LAYER_US = 2 * 1 + 8 + 2 + 5 + 16 + 3 + 7
"""Two norms, everything else once, for up to 16 tokens."""


def test_a_layer_is_its_attention_at_the_offset_and_every_dense_part(tmp_path: Path):
    write(tmp_path)
    costs = read_published(tmp_path, gpu="card", shape=SHAPE)
    full = costs.table.kinds["full"]
    assert full.full_s(16, 0) == pytest.approx((10 + LAYER_US) * 1e-6)
    assert full.full_s(64, 400) == pytest.approx((84 + 4 * LAYER_US) * 1e-6)
    # Not measured at this offset: between its own neighbours at 0 and 400.
    assert full.full_s(64, 100) == pytest.approx((36 + 4 * LAYER_US) * 1e-6)
    # A norm, half of the projection (one kv head of 1 + 1 + 2), the rotary embedding.
    assert full.kv_only_s(16, 0) == pytest.approx((1 + 4 + 2) * 1e-6)
    assert costs.source == "published:card/tiny-2"
    assert costs.table.layer_kinds == ("full", "full")
    assert published_gpus(tmp_path) == ("CARD",)


def test_the_head_is_read_at_the_rate_of_the_widest_projection(tmp_path: Path):
    write(tmp_path)
    gate_up_bytes, head_bytes = 2 * 128 * 64 * 2, 1000 * 64 * 2
    expected_s = 2e-6 + head_bytes / (gate_up_bytes / 16e-6)
    assert read_published(tmp_path, gpu="CARD", shape=SHAPE).table.head_s == pytest.approx(expected_s)


def test_a_decode_step_is_interpolated_in_batch_and_context(tmp_path: Path):
    write(tmp_path)
    costs = read_published(tmp_path, gpu="CARD", shape=SHAPE)
    head_s = costs.table.head_s
    assert costs.decode.step_s(8, 8 * 400) == pytest.approx(2 * (31 + LAYER_US) * 1e-6 + head_s)
    assert costs.decode.step_s(8, 8 * 250) == pytest.approx(2 * (20.5 + LAYER_US) * 1e-6 + head_s)
    assert costs.decode.step_s(1, 10) == pytest.approx(2 * (3 + LAYER_US) * 1e-6 + head_s)
    assert costs.decode.step_s(0, 0) == 0.0


def test_outside_of_what_was_measured_is_refused_or_flagged(tmp_path: Path):
    write(tmp_path)
    strict = read_published(tmp_path, gpu="CARD", shape=SHAPE)
    with pytest.raises(CostRangeError, match=r"offset 800 is outside the measured 0\.\.400"):
        strict.table.kinds["full"].full_s(64, 800)
    for num, context in ((9, 100), (8, 500)):
        with pytest.raises(CostRangeError, match="outside the measured 8 requests of 400"):
            strict.decode.step_s(num, num * context)
    flagged = read_published(tmp_path, gpu="CARD", shape=SHAPE, extrapolate=True)
    assert flagged.source.endswith("+extrapolated")
    # 64 us more for 400 tokens more.
    assert flagged.table.kinds["full"].full_s(64, 800) == pytest.approx((148 + 4 * LAYER_US) * 1e-6)
    assert flagged.decode.step_s(8, 8 * 700) == pytest.approx(2 * (52 + LAYER_US) * 1e-6 + flagged.table.head_s)
    with pytest.raises(CostRangeError, match="chunk_tokens 65"):
        flagged.table.kinds["full"].full_s(65, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parts": {name: us for name, us in PARTS.items() if name != "down_proj"}}, "lacks down_proj"),
        ({"extra": "64,x,0,0,5"}, "line 12: '64,x,0,0,5' is no measurement"),
        ({"extra": "0,0,8,700,nan"}, "line 12: '0,0,8,700,nan' is no measurement"),
        ({"extra": "64,500,0,0,inf"}, "line 12: '64,500,0,0,inf' is no measurement"),
        ({"extra": "64,500,0,0,0"}, "line 12: '64,500,0,0,0' is no measurement"),
        ({"extra": f"64,{10**400},0,0,5"}, "line 12: .* is no measurement"),
        ({"parts": PARTS | {"gate_up_proj": float("inf")}}, "'gate_up_proj,1,inf' is no measurement"),
        ({"header": "chunk,time"}, "the first line must be prefill_chunk"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, changes, reason):
    write(tmp_path, **changes)
    with pytest.raises(ProfileError, match=reason):
        read_published(tmp_path, gpu="CARD", shape=SHAPE)


def test_what_is_not_there_is_named_with_what_is(tmp_path: Path):
    write(tmp_path)
    with pytest.raises(ProfileError, match=f"0 measurements of tiny-2 on OTHER.*{STEM}_attention.csv"):
        read_published(tmp_path, gpu="OTHER", shape=SHAPE)
    (tmp_path / f"{STEM}_dense.csv").unlink()
    with pytest.raises(ProfileError, match=r"dense.csv cannot be read"):
        read_published(tmp_path, gpu="CARD", shape=SHAPE)
