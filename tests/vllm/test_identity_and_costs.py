"""What a worker calls its KV, and what it measures, on a real engine."""

import dataclasses

import pytest

from cacheflow.errors import ProfileError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ONE = pytest.mark.parametrize("tiny", ["qwen3-bf16"], indirect=True, scope="session")


@pytest.fixture
def forward(tiny):
    from cacheflow.vllm.partial_forward import PartialForward

    return PartialForward(tiny.handle)


@ONE
def test_the_namespace_is_stable_and_tells_settings_apart(tiny):
    import torch

    from cacheflow.vllm.identity import worker_namespace

    namespace = worker_namespace(tiny.handle, tiny.layout, chunk_tokens=512)
    assert worker_namespace(tiny.handle, tiny.layout, chunk_tokens=512) == namespace
    others = [
        worker_namespace(tiny.handle, tiny.layout, chunk_tokens=256),
        worker_namespace(dataclasses.replace(tiny.handle, compiled=True), tiny.layout, chunk_tokens=512),
    ]
    extra = dict(namespace.extra)
    assert extra["attention"] == "CPU_ATTN"
    assert extra["num_threads"] == str(torch.get_num_threads())
    assert len({namespace.digest, *(each.digest for each in others)}) == 3


@ONE
def test_one_changed_weight_changes_the_fingerprint(tiny, tmp_path):
    """Also of a linear layer, whose parameter vLLM empties on the CPU once it is packed."""
    import torch

    from cacheflow.vllm.identity import worker_namespace

    layer = tiny.handle.inner.layers[1]
    assert layer.mlp.down_proj.weight.numel() == 0
    before = worker_namespace(tiny.handle, tiny.layout, chunk_tokens=512).weights_fingerprint
    linear = layer.mlp.down_proj.cpu_linear
    layer.mlp.down_proj.cpu_linear = lambda x, weight, bias: linear(x, weight, bias) * torch.tensor(1.02, dtype=x.dtype)
    try:
        assert worker_namespace(tiny.handle, tiny.layout, chunk_tokens=512).weights_fingerprint != before
    finally:
        layer.mlp.down_proj.cpu_linear = linear
    assert worker_namespace(tiny.handle, tiny.layout, chunk_tokens=512).weights_fingerprint == before


def test_ranks_and_adapters_have_names_of_their_own():
    pytest.importorskip("torch")
    from cacheflow.vllm.identity import lora_namespace, shared_namespace

    one, two = "a" * 32, "b" * 32
    assert shared_namespace({0: one}) == one
    assert shared_namespace({0: one, 1: two}) == shared_namespace({1: two, 0: one})
    assert shared_namespace({0: one, 1: two}) != shared_namespace({0: two, 1: one})
    adapters = {lora_namespace(one, name=name, path=path) for name in "xy" for path in "pq"}
    assert len(adapters | {one}) == 5
    assert all(len(digest) == 32 for digest in adapters)


@ONE
def test_costs_cover_every_offset_and_come_back_from_a_file(tiny, forward, tmp_path):
    from cacheflow.vllm.calibration import Lengths, calibrate, load_costs, profile_path, save_costs
    from cacheflow.vllm.identity import cost_identity

    identity = cost_identity(tiny.handle, fingerprint="f")
    costs = calibrate(
        forward,
        tiny.layout,
        identity=identity,
        lengths=Lengths(chunk_tokens=256, pass_tokens=1024, max_tokens=2048),
        budget_s=3.0,
    )
    (grid,) = costs.kinds.values()
    assert grid.full_s(1, 0) <= grid.full_s(256, 0)
    assert grid.kv_only_s(256, 1024) < grid.full_s(256, 1024)
    assert grid.full_s(256, 2048) >= grid.full_s(256, 1792)
    assert costs.head_s > 0
    assert costs.engine_pass is not None
    assert costs.engine_pass.pass_tokens == 1024
    assert not tiny.gather(list(range(tiny.layout.num_blocks - 18, tiny.layout.num_blocks))).any()

    path = profile_path(tmp_path, identity, chunk_tokens=256, pass_tokens=1024)
    assert path != profile_path(tmp_path, identity, chunk_tokens=512, pass_tokens=1024)
    assert path != profile_path(tmp_path, identity, chunk_tokens=256, pass_tokens=2048)
    with pytest.raises(ProfileError, match="No such file"):
        load_costs(path, identity)
    save_costs(costs, path)
    loaded = load_costs(path, identity)
    assert loaded.to_dict() == costs.to_dict()
    with pytest.raises(ProfileError, match="fingerprint"):
        load_costs(path, dataclasses.replace(identity, fingerprint="g"))
    path.write_text(path.read_text()[:100])
    with pytest.raises(ProfileError, match=str(path)):
        load_costs(path, identity)


@ONE
def test_a_spent_budget_extends_the_far_end(tiny, forward):
    from cacheflow.vllm.calibration import Lengths, calibrate
    from cacheflow.vllm.identity import cost_identity

    identity = cost_identity(tiny.handle, fingerprint="f")
    costs = calibrate(
        forward,
        tiny.layout,
        identity=identity,
        lengths=Lengths(chunk_tokens=128, pass_tokens=64, max_tokens=2048),
        budget_s=1e-6,
    )
    (grid,) = costs.kinds.values()
    near, far = (grid.full_s(128, offset) for offset in (grid.offsets[1], 2048))
    assert far >= near > 0
    assert costs.engine_pass is None, "passes no longer than a chunk"


@ONE
def test_what_this_engine_is(tiny):
    from cacheflow.vllm.compat import RunnerKind, check_environment, require_vllm, vllm_version

    handle = tiny.handle
    version = vllm_version()
    assert version.known
    require_vllm(version.text)
    assert check_environment(handle.vllm_config, handle.runner.kv_cache_config) == version
    assert handle.runner_kind is RunnerKind.V1
    assert (handle.start_layer, handle.end_layer, handle.num_layers) == (0, 4, 4)
    assert not handle.compiled
    assert handle.is_first_stage
    assert [name.split(".")[2] for name in handle.layer_names] == ["0", "1", "2", "3"]
