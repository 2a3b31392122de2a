"""Partial forwards against what vLLM's own prefill leaves in the KV cache: equal in every bit, into poisoned blocks."""

import numpy as np
import pytest

from cacheflow.plan.grid import Tile
from cacheflow.restore.work import RestoreTarget
from support import kv_bytes
from support.v2_runner import first_runner

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_CHUNKS = 3


@pytest.fixture(scope="module")
def forward(tiny):
    from cacheflow.vllm.models.partial_forward import PartialForward

    return PartialForward(tiny.handle)


@pytest.fixture(scope="module")
def prefilled(tiny):
    """Tokens and the engine's KV of a prompt of three chunks and a bit, by chunk size; each is prefilled once."""
    known = {}

    def of(chunk_tokens):
        if chunk_tokens not in known:
            tokens = tiny.tokens(NUM_CHUNKS * chunk_tokens + 37)
            kv = tiny.prefill(tokens, chunk_tokens=chunk_tokens)
            known[chunk_tokens] = tokens, kv[:, : NUM_CHUNKS * chunk_tokens // tiny.size]
        return known[chunk_tokens]

    return of


def new_target(tiny, tokens, chunk_tokens, block_ids, *, start=0, layers_per_block=1):
    ends = tuple(range(chunk_tokens, NUM_CHUNKS * chunk_tokens + 1, chunk_tokens))
    return RestoreTarget(
        restore_id=1, request_id="r", start=start, object_start=0, chunk_ends=ends,
        tokens=tuple(tokens[start : ends[-1]]), block_ids=tuple(block_ids), namespace="n" * 32,
        chain_hashes=("h",) * NUM_CHUNKS, layers_per_block=layers_per_block,
    )  # fmt: skip


@pytest.fixture
def setting(tiny, forward, prefilled):
    """A port into poisoned blocks, for one chunk size."""
    from cacheflow.vllm.worker.recompute import VllmComputePort

    def make(chunk_tokens, **arguments):
        tokens, kv = prefilled(chunk_tokens)
        block_ids = tiny.poisoned(kv.shape[1])
        port = VllmComputePort(forward, new_target(tiny, tokens, chunk_tokens, block_ids, **arguments))
        return port, kv, block_ids

    return make


def load(tiny, kv, block_ids, chunk_tokens, chunk, layer_lo):
    per_chunk = chunk_tokens // tiny.size
    blocks = (chunk * per_chunk, (chunk + 1) * per_chunk)
    tiny.place(kv, block_ids, layers=(layer_lo, kv.shape[0]), blocks=blocks)


@pytest.mark.parametrize("chunk_tokens", [128, 256, 512])
def test_token_wise(tiny, setting, chunk_tokens):
    port, kv, block_ids = setting(chunk_tokens)
    assert tiny.differing(kv, block_ids) > 0.5
    for chunk in range(NUM_CHUNKS):
        port.recompute(Tile(chunk, chunk + 1, 0, kv.shape[0]), kv_only_top=False)
    port.finish()
    assert tiny.differing(kv, block_ids) == 0


@pytest.mark.parametrize("kv_only_top", [False, True])
def test_layer_wise(tiny, setting, kv_only_top):
    port, kv, block_ids = setting(256)
    height = 2
    for chunk in range(NUM_CHUNKS):
        load(tiny, kv, block_ids, 256, chunk, height)
    for layer in range(height):
        for chunk in range(NUM_CHUNKS):
            port.recompute(Tile(chunk, chunk + 1, layer, layer + 1), kv_only_top=kv_only_top and layer == height - 1)
    port.finish()
    assert tiny.differing(kv, block_ids) == 0


@pytest.mark.parametrize("heights", [(4, 3, 1), (4, 4, 2), (3, 1, 1)])
def test_staircase_interleaved(tiny, setting, heights):
    """Chunks climb in turns, each to its height; what is above is loaded after the chunk below it was computed."""
    port, kv, block_ids = setting(128)
    layer = 0
    while layer < max(heights):
        for chunk, height in enumerate(heights):
            if layer < height:
                tile = Tile(chunk, chunk + 1, layer, layer + 1)
                port.recompute(tile, kv_only_top=layer == height - 1)
        layer += 1
    for chunk, height in enumerate(heights):
        if height < kv.shape[0]:
            load(tiny, kv, block_ids, 128, chunk, height)
    port.finish()
    assert tiny.differing(kv, block_ids) == 0


def test_on_a_device_the_host_waits_once_a_segment_and_not_for_its_tiles(tiny, prefilled):
    """Before a builder's buffers are filled anew: their copies for the segment before, in flight or not."""
    from cacheflow.tensors.copy_lane import CopyLane
    from cacheflow.vllm.models.partial_forward import PartialForward
    from cacheflow.vllm.worker.recompute import VllmComputePort
    from support.fake_device import FakeDevice

    device = FakeDevice(lambda num_ready: 0)
    forward = PartialForward(tiny.handle, CopyLane(device))
    tokens, kv = prefilled(128)
    block_ids = tiny.poisoned(kv.shape[1])
    port = VllmComputePort(forward, new_target(tiny, tokens, 128, block_ids))
    for chunk in range(NUM_CHUNKS):
        for layer in range(kv.shape[0]):
            port.recompute(Tile(chunk, chunk + 1, layer, layer + 1), kv_only_top=False)
        assert device.host_waits == chunk
    port.finish()
    assert device.host_waits == NUM_CHUNKS - 1
    assert device.asked["compute", "record"] == NUM_CHUNKS, "one event a segment, after its numbers were copied out"
    assert device.asked["compute", "wait_for"] == 0, "nothing was placed"
    assert port.record() is not None
    assert tiny.differing(kv, block_ids) == 0


def test_blocks_of_several_layers(tiny, setting):
    port, kv, block_ids = setting(128, layers_per_block=3)
    for chunk in range(NUM_CHUNKS):
        port.recompute(Tile(chunk, chunk + 1, 0, 1), kv_only_top=False)
        port.recompute(Tile(chunk, chunk + 1, 1, 2), kv_only_top=False)
    port.finish()
    assert tiny.differing(kv, block_ids) == 0


def test_restart_computes_a_chunk_again(tiny, setting):
    port, kv, block_ids = setting(128)
    port.recompute(Tile(0, 1, 0, 2), kv_only_top=True)
    with pytest.raises(ValueError, match="spent"):
        port.recompute(Tile(0, 1, 2, 4), kv_only_top=False)
    with pytest.raises(ValueError, match="does not continue chunk 1"):
        port.recompute(Tile(1, 2, 1, 2), kv_only_top=False)
    port.restart(0)
    for chunk in range(NUM_CHUNKS):
        port.recompute(Tile(chunk, chunk + 1, 0, 4), kv_only_top=False)
    port.finish()
    assert tiny.differing(kv, block_ids) == 0


def test_a_chunk_that_is_partly_there_is_continued(tiny, setting):
    """The first block came from the prefix cache: another grid of chunks than the prefill's, so close, not equal."""
    port, kv, block_ids = setting(256, start=128)
    tiny.place(kv, block_ids, layers=(0, kv.shape[0]), blocks=(0, 1))
    for chunk in range(NUM_CHUNKS):
        port.recompute(Tile(chunk, chunk + 1, 0, 4), kv_only_top=False)
    port.finish()
    own, restored = as_numbers(tiny, kv), as_numbers(tiny, tiny.gather(block_ids))
    assert np.array_equal(own[:, 0], restored[:, 0])
    assert np.linalg.norm(own - restored) / np.linalg.norm(own) < 0.05


def as_numbers(tiny, kv):
    import torch

    return torch.from_numpy(kv.copy()).view(tiny.layout.dtype).double().numpy()


def test_wrong_keys_of_an_earlier_chunk_show(tiny, setting):
    """Negative control: attention is not so uniform that five per cent of wrong bytes would go unnoticed."""
    port, kv, block_ids = setting(128)
    port.recompute(Tile(0, 1, 0, 4), kv_only_top=False)
    wrong = kv[:, :1].copy()
    random = np.random.default_rng(5)
    wrong[random.random(wrong.shape) < 0.05] ^= 0x10
    tiny.place(wrong, block_ids, layers=(0, 4), blocks=(0, 1))
    port.recompute(Tile(1, 2, 0, 4), kv_only_top=False)
    port.finish()
    assert tiny.differing(kv[:, 1:2], block_ids[1:2]) > 0.1


def test_a_chunk_that_was_not_restored_shows(tiny, setting):
    port, kv, block_ids = setting(128)
    port.recompute(Tile(1, 2, 0, 4), kv_only_top=False)
    port.finish()
    assert tiny.differing(kv[:, 1:2], block_ids[1:2]) > 0.1


def test_the_surrounding_forward_context_comes_back(tiny, setting):
    from vllm.forward_context import get_forward_context, set_forward_context

    port, kv, _ = setting(128)
    with set_forward_context(None, tiny.handle.vllm_config):
        before = get_forward_context()
        port.recompute(Tile(0, 1, 0, kv.shape[0]), kv_only_top=False)
        assert get_forward_context() is before
    port.finish()


def test_serving_goes_on_after_a_restoration(tiny, setting, prefilled):
    """The runner's own metadata builders and buffers are untouched."""
    port, _, _ = setting(128)
    port.recompute(Tile(0, 1, 0, 4), kv_only_top=False)
    port.finish()
    tokens, kv = prefilled(256)
    again = tiny.prefill(tokens, chunk_tokens=256)
    assert np.array_equal(again[:, : kv.shape[1]], kv)


@first_runner
def test_the_self_test_passes_and_leaves_zeros(tiny, forward):
    """Here because of the engines: each takes far longer to start than all that is asked of it."""
    from cacheflow.vllm.startup.selftest import self_test

    kv_bytes.fill(tiny.layout, list(range(tiny.layout.num_blocks)), 0)
    report = self_test(tiny.layout, forward, chunk_tokens=512)
    assert report.difference is None
    assert (report.num_chunks, report.num_cuts) == (3, tiny.layout.num_layers - 1)
    assert "cut at 3 layers, keys and values alone in each" in str(report)
    last_blocks = range(tiny.layout.num_blocks - 3 * report.num_tokens // tiny.size, tiny.layout.num_blocks)
    assert not tiny.gather(list(last_blocks)).any()
