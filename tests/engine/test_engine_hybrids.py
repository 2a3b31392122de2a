"""Models with recurrent layers: restored keys, values, states and tokens are the recomputed ones, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.engine.families import require_chunk_tokens
from cacheflow.engine.kv_buffer import ChunkCache
from cacheflow.engine.pinned_link import PinnedLinkPort, PinnedPrefix
from cacheflow.engine.random_models import random_weights, tiny_model
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.running_states import RunningStates
from cacheflow.engine.saver import PrefixSaver
from cacheflow.engine.selftest import own_forward, relative_error, self_test
from cacheflow.engine.transfer_port import StoreTransferPort, state_key
from cacheflow.errors import ConfigError, SelfTestError, UnsupportedModelError
from cacheflow.hybrid_shape import HybridShape
from cacheflow.plan.grid import Cell, Grid, Tile
from cacheflow.shapes.hardware import find_model
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.keys import ObjectKind, chain_hashes
from cacheflow.stores.memory import MemoryStore
from cacheflow.types import LoadOutcome
from support.examples import examples
from support.hybrid_cases import CHUNK_ENDS, FAMILY, NUM_ROWS, HybridCase, hybrid_case, restore_hybrid
from support.store_objects import NAMESPACE as SAVED

pytestmark = pytest.mark.torch

NAMESPACE = SAVED.digest

DTYPES = ["float32", "bfloat16"]
SPLITS = {
    "token split": [3, 3, 0, 0],
    "staircase": [3, 2, 1, 0],
    "shared chunk": [3, 3, 2, 0],
    "by layers": [2, 2, 2, 2],
    "all recomputed": [3, 3, 3, 3],
    "all loaded": [0, 0, 0, 0],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_is_bit_equal_and_decodes_the_same_tokens(split: str, dtype: str):
    case = hybrid_case(dtype)
    kv, port = restore_hybrid(case, SPLITS[split])
    assert case.is_exact(kv, port)
    never_evicted = case.new_kv()
    never_evicted.copy_from(case.saved, len(case.tokens))
    assert case.decoded(kv) == case.decoded(never_evicted)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=examples(6))
@given(levels=st.lists(st.integers(0, NUM_ROWS), min_size=4, max_size=4), kv_only_top=st.booleans())
def test_every_staircase_is_bit_equal(dtype: str, levels: list[int], kv_only_top: bool):
    case = hybrid_case(dtype)
    assert case.is_exact(*restore_hybrid(case, sorted(levels, reverse=True), kv_only_top=kv_only_top))


@pytest.mark.parametrize("levels", [[2, 2, 2, 2], [2, 1, 1, 0], [1, 0, 0, 0]])
def test_blocks_of_several_rows(levels: list[int]):
    case = hybrid_case(rows_per_block=2)
    assert case.is_exact(*restore_hybrid(case, levels))


@pytest.mark.parametrize(
    ("chunk_ends", "suffix_ends"), [((64,), (65,)), ((64, 128, 130), (131,)), ((), (64, 70)), ((2,), (3, 4))]
)
def test_partial_short_and_missing_chunks(chunk_ends, suffix_ends):
    case = hybrid_case(chunk_ends=chunk_ends, suffix_ends=suffix_ends)
    assert case.is_exact(*restore_hybrid(case, [3 if chunk == 0 else 1 for chunk in range(len(chunk_ends))]))


def test_row_by_row_equals_chunk_by_chunk():
    case = hybrid_case()
    kv = case.new_kv()
    port = case.new_port(kv)
    for block in range(case.num_blocks):
        for chunk in range(case.grid.num_chunks):
            port.recompute(Tile(chunk, chunk + 1, block, block + 1), kv_only_top=block == case.num_blocks - 1)
        port.run_suffix(block, block + 1)
    port.finish()
    port.keep_states()
    assert case.is_exact(kv, port)


def test_lost_keys_and_values_are_recomputed_from_the_front_over_what_is_there():
    case = hybrid_case()
    kv = case.new_kv()
    port = case.new_port(kv)
    for chunk in range(4):
        for block in range(3):
            if (chunk, block) != (2, 1):
                case.load(kv, chunk, block)
    for chunk in range(3):
        port.recompute(Tile(chunk, chunk + 1, 0, 2), kv_only_top=True)
    case.finish(kv, port)
    assert case.is_exact(kv, port)


def test_without_a_checkpoint_its_row_and_all_below_are_recomputed_to_the_end():
    case = hybrid_case()
    kv = case.new_kv()
    port = case.new_port(kv)
    for chunk in range(4):
        port.recompute(Tile(chunk, chunk + 1, 0, 2), kv_only_top=True)
        case.load(kv, chunk, 2)
    case.finish(kv, port)
    assert case.is_exact(kv, port)


def test_a_prefix_that_ends_sooner_starts_from_the_earlier_checkpoint():
    whole, shorter = hybrid_case(), hybrid_case(chunk_ends=CHUNK_ENDS[:2], suffix_ends=(256, 320, 384, 397))
    kv = shorter.new_kv()
    port = shorter.new_port(kv)
    kv.copy_from(whole.saved, 192)
    assert kv.checkpoint is not None
    kv.checkpoint.copy_from(whole.states[192])
    shorter.finish(kv, port)
    assert whole.is_exact(kv, port)


def controls(case: HybridCase) -> dict[str, RunningStates]:
    """Checkpoints that are wrong, each in one way."""
    right = case.states[case.grid.num_tokens]
    nothing, no_conv, noisy = right.clone(), right.clone(), right.clone()
    nothing.conv_RCW.zero_()
    nothing.delta_RHKV.zero_()
    no_conv.conv_RCW.zero_()
    noise = torch.randn(noisy.delta_RHKV.shape, generator=torch.Generator().manual_seed(1))
    noisy.delta_RHKV.mul_(1.0 + 0.05 * noise)
    return {"none": nothing, "earlier": case.states[256], "without convolution": no_conv, "5 % noise": noisy}


@pytest.mark.parametrize("control", ["none", "earlier", "without convolution", "5 % noise"])
def test_a_wrong_checkpoint_shows(control: str):
    case = hybrid_case("float32")
    wrong, right = case.new_kv(), case.new_kv()
    logits = []
    for kv in (wrong, right):
        port = case.new_port(kv)
        for chunk in range(4):
            for block in range(3):
                case.load(kv, chunk, block)
        if kv is wrong:
            assert kv.checkpoint is not None
            kv.checkpoint.copy_from(controls(case)[control])
        case.finish(kv, port)
        assert case.is_exact(kv, port) == (kv is right)
        logits.append(port.logits)
    # Far more than rounding, up to where the tokens differ.
    assert relative_error(*logits) > (1e-3 if control == "5 % noise" else 1e-2)
    if control in ("none", "earlier"):
        assert case.decoded(wrong) != case.decoded(right)


def test_a_missing_checkpoint_is_nan_everywhere():
    case = hybrid_case()
    kv = case.new_kv()
    port = case.new_port(kv)
    kv.kv_L2THD[:, :, : case.grid.num_tokens].copy_(case.saved.kv_L2THD[:, :, : case.grid.num_tokens])
    case.finish(kv, port)
    assert port.logits is not None
    assert port.logits.isnan().all()


def test_a_state_that_is_not_that_of_the_chunks_before_is_refused():
    case = hybrid_case()
    kv = case.new_kv()
    port = case.new_port(kv)
    case.load(kv, 0, 0)
    with pytest.raises(ValueError, match="the state of block 0 is at chunk 0"):
        port.recompute(Tile(1, 2, 0, 1), kv_only_top=True)
    fresh = case.new_port(kv)
    fresh.recompute(Tile(0, 1, 0, 2), kv_only_top=False)
    fresh.recompute(Tile(1, 2, 0, 1), kv_only_top=False)
    with pytest.raises(ValueError, match="the state of block 2 is at chunk 0"):
        fresh.recompute(Tile(1, 2, 1, 3), kv_only_top=True)
    grid = Grid(chunk_ends=(128,), num_blocks=3, start=64)
    with pytest.raises(ConfigError, match="restored from token 64"):
        type(port)(case.runner, grid=grid, tokens=case.tokens[:128], kv=kv, layers_per_block=4)


def saved_in_store(case: HybridCase, store: MemoryStore) -> list[bytes]:
    """Save the prefix with its checkpoint; the chain hashes of its chunks."""
    grid = Grid(chunk_ends=case.grid.chunk_ends, num_blocks=case.num_blocks)
    geometry = type(case.geometry)(grid=grid, shape=case.geometry.shape, layers_per_block=4)
    chain = list(chain_hashes(case.tokens, grid.chunk_ends))
    kv = case.new_kv()
    kv.copy_from(case.saved, grid.num_tokens)
    assert kv.checkpoint is not None
    kv.checkpoint.copy_from(case.states[grid.num_tokens])
    saver = PrefixSaver(store, geometry=geometry, namespace=NAMESPACE, chain_hashes=chain)
    saver.save_prefix(kv)
    kv.poison()  # what was submitted is the store's
    report = saver.wait()
    assert report.complete
    assert report.num_written == grid.num_chunks * grid.num_blocks + grid.num_blocks
    return chain


def test_states_go_to_the_store_and_come_back_with_the_last_chunk():
    case = hybrid_case()
    with MemoryStore(capacity_bytes=1 << 24) as store:
        chain = saved_in_store(case, store)
        kv = case.new_kv()
        port = StoreTransferPort(store, geometry=case.geometry, namespace=NAMESPACE, chain_hashes=chain, kv=kv)
        for chunk in range(4):
            for block in range(3):
                ticket = port.start(Cell(chunk, block), deadline_s=30.0)
                assert ticket.num_bytes == case.geometry.num_bytes(Cell(chunk, block))
                assert port.wait(ticket, timeout_s=30.0) is LoadOutcome.OK
                port.place(ticket)
        compute = case.new_port(kv)
        case.finish(kv, compute)
        assert case.is_exact(kv, compute)
        key = state_key(NAMESPACE, chain[-1].hex(), case.geometry, 1)
        assert (key.kind, key.layer_lo, key.layer_hi) == (ObjectKind.STATE, 4, 8)
        assert store.delete([key]) == 1
        lost = port.start(Cell(3, 1), deadline_s=30.0)
        assert port.wait(lost, timeout_s=30.0) is LoadOutcome.MISS
        port.cancel(lost)


def test_states_are_not_saved_without_their_keys_and_values():
    case = hybrid_case()
    chain = list(chain_hashes(case.tokens, case.grid.chunk_ends))
    keys = [state_key(NAMESPACE, chain[-1].hex(), case.geometry, block) for block in range(3)]
    kv = case.new_kv()
    kv.copy_from(case.saved, case.grid.num_tokens)
    one_fails = FaultPlan(rules=(FaultRule(fault=Fault.PUT_ERROR, every=5, limit=1),))
    with FaultyStore(MemoryStore(capacity_bytes=1 << 24), one_fails) as store:
        for saves, there in ((0, False), (1, True)):
            saver = PrefixSaver(store, geometry=case.geometry, namespace=NAMESPACE, chain_hashes=chain)
            saver.save_prefix(kv)
            assert saver.wait().num_failed == 1 - saves
            assert store.contains(keys) == (there,) * 3


def test_a_pinned_prefix_brings_states_too():
    case = hybrid_case()
    source = case.new_kv()
    source.copy_from(case.saved, case.grid.num_tokens)
    assert source.checkpoint is not None
    source.checkpoint.copy_from(case.states[case.grid.num_tokens])
    link = PinnedLinkPort(PinnedPrefix.save(source, case.geometry), kv=(kv := case.new_kv()))
    for chunk in range(4):
        for block in range(3):
            ticket = link.start(Cell(chunk, block), deadline_s=30.0)
            assert link.wait(ticket, timeout_s=30.0) is LoadOutcome.OK
            link.place(ticket)
    port = case.new_port(kv)
    case.finish(kv, port)
    assert case.is_exact(kv, port)


def test_payloads_hold_the_bytes_of_some_layers_in_sequence():
    case = hybrid_case("bfloat16")
    states, shape = case.states[320], case.geometry.shape
    assert isinstance(shape, HybridShape)
    payload = states.payload((4, 8))
    assert payload.size == shape.row_state_bytes
    first = payload[: shape.state_bytes]
    conv_bytes = states.conv(4).numel() * 2
    assert torch.equal(torch.from_numpy(first[:conv_bytes]).view(torch.bfloat16), states.conv(4).reshape(-1))
    assert torch.equal(torch.from_numpy(first[conv_bytes:].copy()).view(torch.float32), states.delta(4).reshape(-1))
    other = case.runner.new_states()
    assert other is not None
    other.write_payload(payload, (4, 8))
    assert torch.equal(other.delta(5), states.delta(5))
    assert other.delta(1).isnan().all()
    assert not other.equals(states)


def test_chunks_of_64_tokens_and_their_multiples_leave_the_states_of_one_pass():
    model = tiny_model(FAMILY, dtype="bfloat16")  # float32 products round with the number of rows besides
    runner, tokens = LayerRunner(model), torch.randint(320, (512,), generator=torch.Generator().manual_seed(5)).tolist()
    states = {}
    for size in (64, 128, 512, 96):
        kv = runner.new_kv(512)
        ends = [*range(size, 512, size), 512]
        runner.prefill(tokens, ends, kv)
        assert kv.checkpoint is not None
        states[size] = kv.checkpoint
    # The three layers below the first attention layer: what follows rounds with the attention's own chunks.
    for size in (64, 128):
        assert torch.equal(states[size].delta_RHKV[:3], states[512].delta_RHKV[:3])
    assert not torch.equal(states[96].delta_RHKV[0], states[512].delta_RHKV[0])
    require_chunk_tokens(model.shape, 128)
    with pytest.raises(ConfigError, match="chunk_tokens is 96, must be a multiple of 64"):
        require_chunk_tokens(model.shape, 96)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_test_passes_and_refuses_a_model_it_does_not_reproduce(dtype: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(FAMILY, dtype=dtype)
    report = self_test(model)
    assert report.passed
    assert report.kv_error < (1e-4 if dtype == "float32" else 6e-2)
    monkeypatch.setattr(ChunkCache, "get_recurrent_state", lambda self, layer_idx, state_idx=0: None)
    with pytest.raises(SelfTestError, match="not reproduced"):
        self_test(model)


def test_random_weights_remember_hundreds_of_tokens():
    shape = find_model("Qwen3.5-9B")
    small = type(shape)(
        name="small", num_layers=8, hidden_size=64, num_q_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96,
        vocab_size=320, layers_per_attention=4, num_state_k_heads=2, num_state_v_heads=4, state_k_dim=16,
        state_v_dim=16, conv_kernel=4, dtype="float32",
    )  # fmt: skip
    model = random_weights(small, device="cpu", dtype="float32", max_tokens=1024)
    assert model.shape == small
    rates = [weight.exp() for name, weight in model.module.named_parameters() if name.endswith("A_log")]
    assert len(rates) == 6
    assert all(float(rate.min()) > 0.0019 and float(rate.max()) < 0.051 for rate in rates)
    own = own_forward(model, [1, 2, 3])
    assert own.logits.isfinite().all()
    with pytest.raises(UnsupportedModelError, match="recurrent layers and experts"):
        random_weights(find_model("Qwen3.6-35B-A3B"), device="cpu")


def test_a_hybrid_is_refused_on_a_gpu():
    from cacheflow.engine.families import check_supported

    config = tiny_model(FAMILY).module.config
    with pytest.raises(UnsupportedModelError, match="device cuda is not supported; allowed: cpu"):
        check_supported(config, device="cuda", dtype=torch.bfloat16)
