"""Bytes of KV blocks, whatever their layout; no vLLM needed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.vllm.models.model_access import layer_number
from cacheflow.vllm.worker.layout import BlockLayout, LayerView, blocks_first

pytestmark = pytest.mark.torch

NUM_BLOCKS, BLOCK_SIZE, HEADS, WIDTH, LAYERS = 7, 4, 2, 6, 3
LOGICAL = (NUM_BLOCKS, HEADS, BLOCK_SIZE, WIDTH)


def config(num_blocks=NUM_BLOCKS, *, layout="LBHNC", groups=1):
    names = [f"model.layers.{index}.self_attn.attn" for index in range(LAYERS)]
    spec = SimpleNamespace(block_size=BLOCK_SIZE)
    group = SimpleNamespace(layer_names=names[::-1], kv_cache_spec=spec)
    return SimpleNamespace(num_blocks=num_blocks, kv_cache_layout=layout, kv_cache_groups=[group] * groups)


def stored(physical, dtype=torch.bfloat16):
    """A ``[B, H, N, C]`` view whose memory has the named order of dimensions."""
    order = ["BHNC".index(letter) for letter in physical]
    memory = torch.empty([LOGICAL[dim] for dim in order], dtype=torch.float32)
    memory.copy_(torch.randn(memory.shape, generator=torch.Generator().manual_seed(len(physical))))
    return memory.to(dtype).permute([order.index(dim) for dim in range(4)])


def caches(make=lambda: stored("BHNC")):
    return {f"model.layers.{index}.self_attn.attn": make() + index for index in range(LAYERS)}


def as_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("physical", ["BHNC", "BNHC", "HBNC"])
def test_gather_has_the_logical_order_and_scatter_is_its_inverse(physical, dtype):
    own = {name: stored(physical, dtype).add_(index) for index, name in enumerate(caches())}
    layout = BlockLayout.from_kv_caches(own, config())
    assert layout.layer_names == tuple(sorted(own))
    block_ids = [5, 0, 3]
    out = np.empty(layout.num_bytes(1, 3, 3), dtype=np.uint8)
    layout.gather(1, 3, block_ids, out)
    tensors = [own[name] for name in layout.layer_names]
    assert np.array_equal(out, as_bytes(torch.stack([each[block_ids] for each in tensors[1:3]])))

    before = [each.clone() for each in tensors]
    layout.scatter(1, 3, [6, 4, 2], out)
    for index, (old, new) in enumerate(zip(before, tensors, strict=True)):
        expected = old.clone()
        if index:
            expected[[6, 4, 2]] = old[block_ids]
        assert torch.equal(new, expected)


def test_skipped_blocks_are_neither_written_nor_looked_at():
    own = caches()
    layout = BlockLayout.from_kv_caches(own, config())
    payload = np.arange(layout.num_bytes(0, 1, 3), dtype=np.uint64).astype(np.uint8)
    before = own[layout.layer_names[0]].clone()
    layout.scatter(0, 1, [-1, 10**6, 4], payload, skip_blocks=2)
    after = own[layout.layer_names[0]]
    assert np.array_equal(as_bytes(after[4]), payload[2 * layout.block_bytes_L[0] :])
    assert torch.equal(after[[0, 1, 2, 3, 5, 6]], before[[0, 1, 2, 3, 5, 6]])


@given(data=st.data())
def test_what_was_gathered_comes_back(data):
    layout = BlockLayout.from_kv_caches(caches(), config())
    lo = data.draw(st.integers(0, LAYERS - 1))
    hi = data.draw(st.integers(lo + 1, LAYERS))
    block_ids = data.draw(st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, unique=True))
    payload = np.random.default_rng(1).integers(0, 256, layout.num_bytes(lo, hi, len(block_ids)), dtype=np.uint8)
    layout.scatter(lo, hi, block_ids, payload)
    out = np.zeros_like(payload)
    layout.gather(lo, hi, block_ids, out)
    assert np.array_equal(out, payload)


def mixed_views(heads, *, widths=None, dtype=torch.bfloat16, device="cpu"):
    """Layers of so many heads each; every second one has its heads behind its tokens in memory."""
    views = []
    for index, (count, width) in enumerate(zip(heads, widths or [WIDTH] * len(heads), strict=True)):
        cache = torch.randn((NUM_BLOCKS, BLOCK_SIZE, count, width), generator=torch.Generator().manual_seed(index))
        cache = (100 * cache).abs().to(dtype).to(device)
        cache = cache.transpose(1, 2) if index % 2 else cache.transpose(1, 2).contiguous()
        views.append(LayerView(f"model.layers.{index}", cache))
    return views


def naive(views, ids):
    """The payload, block by block."""
    return np.concatenate([as_bytes(view.blocks_NI[block].cpu()) for view in views for block in ids])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@given(data=st.data())
def test_layers_of_several_shapes_are_copied_as_a_naive_loop_would(data, device):
    heads = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=6))
    widths = [data.draw(st.sampled_from([3, 6])) for _ in heads]
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]))
    views = mixed_views(heads, widths=widths, dtype=dtype, device=device)
    layout = BlockLayout(views, block_size=BLOCK_SIZE, layout_name="LBHNC")
    lo = data.draw(st.integers(0, len(heads) - 1))
    hi = data.draw(st.integers(lo + 1, len(heads)))
    ids = data.draw(st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=NUM_BLOCKS - 1, unique=True))

    sizes = zip(heads, widths, strict=True)
    assert list(layout.block_bytes_L) == [count * width * BLOCK_SIZE * dtype.itemsize for count, width in sizes]
    out = np.zeros(layout.num_bytes(lo, hi, len(ids)), dtype=np.uint8)
    layout.gather(lo, hi, ids, out)
    assert np.array_equal(out, naive(views[lo:hi], ids))
    assert np.array_equal(np.concatenate([each.reshape(-1) for each in layout.by_layer(out, lo, hi, len(ids))]), out)

    before = [view.blocks_NI.clone() for view in views]
    payload = np.random.default_rng(len(ids)).integers(0, 256, out.size, dtype=np.uint8)
    skip = data.draw(st.integers(0, len(ids) - 1))
    layout.scatter(lo, hi, ids, payload, skip_blocks=skip)
    by_layer = layout.by_layer(payload, lo, hi, len(ids))
    for index, (old, view) in enumerate(zip(before, views, strict=True)):
        expected = {block: as_bytes(old[block].cpu()) for block in range(NUM_BLOCKS)}
        if lo <= index < hi:
            expected |= {block: by_layer[index - lo][at] for at, block in enumerate(ids) if at >= skip}
        for block, own in expected.items():
            assert np.array_equal(as_bytes(view.blocks_NI[block].cpu()), own)

    target = next(block for block in range(NUM_BLOCKS) if block not in ids)
    layout.copy(ids[:1], [target])
    assert np.array_equal(naive(views, [target]), naive(views, ids[:1]))


def test_the_largest_object_is_that_of_the_widest_layers():
    layout = BlockLayout(mixed_views([1, 1, 4, 2, 2]), block_size=BLOCK_SIZE, layout_name="LBHNC")
    head = WIDTH * 2 * BLOCK_SIZE
    assert layout.num_bytes(0, 5, 3) == 10 * 3 * head
    assert layout.largest_object_bytes(chunk_tokens=2 * BLOCK_SIZE, layers_per_block=1) == 4 * 2 * head
    assert layout.largest_object_bytes(chunk_tokens=2 * BLOCK_SIZE, layers_per_block=2) == 6 * 2 * head
    assert layout.largest_object_bytes(chunk_tokens=2 * BLOCK_SIZE, layers_per_block=9) == 10 * 2 * head


def test_kernel_blocks_smaller_than_blocks_are_joined():
    whole = torch.arange(NUM_BLOCKS * 2 * 5 * 3, dtype=torch.float32).view(NUM_BLOCKS * 2, 5, 3)
    joined = blocks_first(whole, NUM_BLOCKS, name="x")
    assert joined.shape == (NUM_BLOCKS, 2, 5, 3)
    assert joined.data_ptr() == whole.data_ptr()
    with pytest.raises(ConfigError, match="do not lie side by side"):
        blocks_first(torch.zeros(NUM_BLOCKS * 2, 5, 6)[..., :3], NUM_BLOCKS, name="x")


def test_the_block_dimension_is_found_wherever_it_is():
    assert blocks_first(torch.zeros(2, NUM_BLOCKS, 4, 3), NUM_BLOCKS, name="x").shape == (NUM_BLOCKS, 2, 4, 3)


@pytest.mark.parametrize(
    ("shape", "layout", "reason"),
    [((5, 3, 2), "", "no dimension"), ((7, 7, 2), "", "more than one"), ((7, 2, 7), "NHD", "more than one")],
)
def test_shapes_that_could_mean_anything_are_refused(shape, layout, reason):
    with pytest.raises(ConfigError, match=reason) as raised:
        blocks_first(torch.zeros(shape), NUM_BLOCKS, name="model.layers.0", layout_name=layout)
    assert str(shape) in str(raised.value)
    assert "model.layers.0" in str(raised.value)


def test_vllm_names_its_first_dimension():
    square = torch.zeros(7, 2, 7, 3)
    assert blocks_first(square, 7, name="x", layout_name="LBHNC").shape == (7, 2, 7, 3)


@pytest.mark.parametrize("other", [stored("BHNC", torch.float32), stored("BHNC", torch.bfloat16)[1:]])
def test_layers_of_another_dtype_or_number_of_blocks_are_refused(other):
    views = [LayerView("model.layers.0", stored("BHNC")), LayerView("model.layers.1", other)]
    with pytest.raises(ConfigError, match=r"KV caches differ: model.layers.0 is shape .*, model.layers.1 is shape"):
        BlockLayout(views, block_size=BLOCK_SIZE, layout_name="LBHNC")


def test_several_groups_and_what_is_no_tensor_are_refused():
    with pytest.raises(ConfigError, match="2 KV cache groups"):
        BlockLayout.from_kv_caches(caches(), config(groups=2))
    with pytest.raises(ConfigError, match="no KV cache was registered for"):
        BlockLayout.from_kv_caches({}, config())
    with pytest.raises(ConfigError, match="type list"):
        blocks_first([torch.zeros(2)], NUM_BLOCKS, name="mamba")


def test_identity_tells_layouts_apart_and_not_cache_sizes():
    identity = BlockLayout.from_kv_caches(caches(), config()).identity()
    assert identity == "LBHNC:71f629cfd230b794", "what is in the stores of users would be saved anew"
    more = {name: torch.cat([cache, cache]) for name, cache in caches().items()}
    assert BlockLayout.from_kv_caches(more, config(2 * NUM_BLOCKS)).identity() == identity
    assert BlockLayout.from_kv_caches(caches(), config(layout="LBNHC")).identity() != identity
    floats = {name: cache.float() for name, cache in caches().items()}
    assert BlockLayout.from_kv_caches(floats, config()).identity() != identity


def test_all_stages_have_one_identity_also_where_their_layers_differ():
    views = mixed_views([2, 1, 2])
    whole = BlockLayout(views, block_size=BLOCK_SIZE, layout_name="LBHNC")
    for cut in (1, 2):
        parts = [BlockLayout(part, block_size=BLOCK_SIZE, layout_name="LBHNC") for part in (views[:cut], views[cut:])]
        shapes = [part.shapes for part in parts]
        assert {part.identity(shapes) for part in parts} == {whole.identity()}
    assert whole.identity() != BlockLayout(views[:1], block_size=BLOCK_SIZE, layout_name="LBHNC").identity()
    assert whole.identity() != BlockLayout(mixed_views([2, 3]), block_size=BLOCK_SIZE, layout_name="LBHNC").identity()


@pytest.mark.parametrize("arguments", [(0, 4, [1]), (2, 2, [1]), (0, 1, []), (0, 1, [7]), (0, 1, [-1]), (0, 1, [1, 2])])
def test_calls_that_do_not_fit_are_bugs(arguments):
    layout = BlockLayout.from_kv_caches(caches(), config())
    with pytest.raises(ValueError, match=r"layers|block ids|payload"):
        layout.gather(*arguments, np.empty(layout.block_bytes_L[0], dtype=np.uint8))


def test_layers_sort_by_number():
    names = [f"model.layers.{index}.attn" for index in (10, 9, 0)]
    assert sorted(names, key=layer_number) == names[::-1]


@pytest.mark.parametrize("physical", ["BHNC", "BNHC"])
def test_a_record_says_where_tokens_lie(physical):
    layout = BlockLayout.from_kv_caches(caches(lambda: stored(physical)), config())
    shape, dtype, token_axes = layout.form(0, 2, 5)
    assert (shape, dtype, token_axes) == ((2, 5, HEADS, BLOCK_SIZE, WIDTH), "bfloat16", (1, 3))
    assert np.prod(shape) * 2 == layout.num_bytes(0, 2, 5)


def test_a_record_says_where_tokens_lie_in_kernel_blocks():
    split = {name: each.reshape(2 * NUM_BLOCKS, HEADS, BLOCK_SIZE // 2, WIDTH) for name, each in caches().items()}
    layout = BlockLayout.from_kv_caches(split, config())
    assert layout.form(1, 2, 3) == ((1, 3, 2, HEADS, BLOCK_SIZE // 2, WIDTH), "bfloat16", (1, 2, 4))


def test_where_it_is_not_known_how_tokens_lie_a_record_says_nothing():
    unnamed = BlockLayout.from_kv_caches(caches(), config(layout=""))
    assert unnamed.form(0, 1, 3) == ((1, 3, HEADS, BLOCK_SIZE, WIDTH), "bfloat16", ())
    views = [LayerView(f"layer {heads}", torch.zeros(NUM_BLOCKS, heads, BLOCK_SIZE, WIDTH)) for heads in (1, 2)]
    mixed = BlockLayout(views, block_size=BLOCK_SIZE, layout_name="LBHNC")
    assert mixed.form(0, 2, 3) == ((mixed.num_bytes(0, 2, 3),), "uint8", ())
    assert mixed.form(1, 2, 3) == ((1, 3, 2, BLOCK_SIZE, WIDTH), "float32", (1, 3))
