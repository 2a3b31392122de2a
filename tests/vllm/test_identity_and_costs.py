"""What a worker calls its KV, and what it measures, on a real engine."""

import dataclasses

import pytest

from cacheflow.errors import ProfileError
from cacheflow.stores.keys import Shard
from support import v2_runner
from support.scheduler_cases import facts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ONE = pytest.mark.parametrize("tiny", ["qwen3-bf16"], indirect=True, scope="session")


@pytest.fixture
def forward(tiny):
    from cacheflow.vllm.models.partial_forward import PartialForward

    return PartialForward(tiny.handle)


@ONE
def test_the_namespace_is_stable_and_tells_settings_apart(tiny):
    import torch

    from cacheflow.vllm.startup.identity import worker_namespace

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

    from cacheflow.vllm.startup.identity import stage_weights

    layer = tiny.handle.layers.modules[1]
    assert layer.mlp.down_proj.weight.numel() == 0
    before = stage_weights(tiny.handle, tiny.layout)
    assert [number for number, _ in before] == [-1, *range(tiny.layout.num_layers)]
    linear = layer.mlp.down_proj.cpu_linear
    layer.mlp.down_proj.cpu_linear = lambda x, weight, bias: linear(x, weight, bias) * torch.tensor(1.02, dtype=x.dtype)
    try:
        changed = [one[0] for one, other in zip(stage_weights(tiny.handle, tiny.layout), before, strict=True)
                   if one != other]  # fmt: skip
        assert changed == [1]
    finally:
        layer.mlp.down_proj.cpu_linear = linear
    assert stage_weights(tiny.handle, tiny.layout) == before


def test_ranks_and_adapters_have_names_of_their_own():
    pytest.importorskip("torch")
    from cacheflow.vllm.scheduler.kv_identity import adapter_namespace, shared_namespace

    one, two = "a" * 32, "b" * 32
    shards = [Shard(tp_rank=rank, tp_size=2) for rank in range(2)]
    ranks = [facts(namespace=name, shard=shard) for name, shard in zip((one, two), shards, strict=True)]
    assert shared_namespace([facts(namespace=one)]) == one
    assert shared_namespace(ranks) == shared_namespace(ranks[::-1])
    swapped = [facts(namespace=name, shard=shard) for name, shard in zip((two, one), shards, strict=True)]
    assert shared_namespace(ranks) != shared_namespace(swapped)
    adapters = {adapter_namespace(name, digest=digest) for name in (one, two) for digest in "pq"}
    assert len(adapters | {one}) == 5
    assert all(len(digest) == 32 for digest in adapters)


def stages(*layers_of, namespace="a" * 32, weights="wxyz", tp_size=1):
    """Facts of an engine whose pipeline stages hold these layers; of rank 0 of each where there are more."""
    return [
        facts(
            namespace=namespace,
            shard=Shard(tp_rank=tp_rank, tp_size=tp_size, pp_rank=stage, pp_size=len(layers_of)),
            first_layer=layers[0],
            weights=tuple((layer, weights[layer] + str(tp_rank)) for layer in ([-1, *layers] if not stage else layers)),
        )
        for stage, layers in enumerate(layers_of)
        for tp_rank in range(tp_size)
    ]


def test_a_namespace_is_the_same_for_every_split_into_stages_and_another_for_every_other_change():
    pytest.importorskip("torch")
    from cacheflow.vllm.scheduler.kv_identity import shared_namespace

    whole = shared_namespace(stages([0, 1, 2, 3]))
    assert shared_namespace(stages([0, 1], [2, 3])) == whole
    assert shared_namespace(stages([0], [1], [2, 3])[::-1]) == whole
    others = [
        stages([0, 1], [2, 3], namespace="b" * 32),
        stages([0, 1], [2, 3], weights="wxvz"),
        stages([0, 1, 2, 3], tp_size=2),
        stages([0, 1], [2]),
    ]
    assert len({whole, *map(shared_namespace, others)}) == 5


@v2_runner.first_runner  # costs are those of a model's layers, which the runners share
@ONE
def test_costs_cover_every_offset_and_come_back_from_a_file(tiny, forward, tmp_path):
    from cacheflow.vllm.startup.calibration import Lengths, calibrate
    from cacheflow.vllm.startup.cost_profile import load_costs, profile_path, save_costs
    from cacheflow.vllm.startup.identity import cost_identity

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
    assert grid.kv_only_s(256, 1024) <= grid.full_s(256, 1024)
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


@v2_runner.first_runner  # costs are those of a model's layers, which the runners share
@ONE
def test_a_spent_budget_extends_the_far_end(tiny, forward):
    from cacheflow.vllm.startup.calibration import Lengths, calibrate
    from cacheflow.vllm.startup.identity import cost_identity

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


@v2_runner.first_runner  # costs are those of a model's layers, which the runners share
@ONE
def test_on_a_device_layers_are_timed_in_one_call_and_by_its_clock(tiny, monkeypatch):
    """A wait for each point's ends and for each segment's numbers, none for a layer."""
    from cacheflow.tensors.copy_lane import CopyLane
    from cacheflow.vllm.models.partial_forward import PartialForward
    from cacheflow.vllm.startup.calibration import Lengths, calibrate
    from cacheflow.vllm.startup.identity import cost_identity
    from support.fake_device import FakeDevice

    device = FakeDevice(lambda num_ready: 0)  # everything at once; what a model runs takes it no time
    forward = PartialForward(tiny.handle, CopyLane(device))
    run, segment, calls, num_segments = forward.run, forward.segment, [], 0

    def noted_run(segment, carry, *, layers, kv_only_top=False):
        calls.append((layers, kv_only_top))
        device.compute.launch(lambda: None)  # but so a second a call
        return run(segment, carry, layers=layers, kv_only_top=kv_only_top)

    def noted_segment(*args, **kwargs):
        nonlocal num_segments
        num_segments += 1
        return segment(*args, **kwargs)

    monkeypatch.setattr(forward, "run", noted_run)
    monkeypatch.setattr(forward, "segment", noted_segment)
    costs = calibrate(
        forward,
        tiny.layout,
        identity=cost_identity(tiny.handle, fingerprint="f"),
        lengths=Lengths(chunk_tokens=128, pass_tokens=64, max_tokens=2048),
        budget_s=1e-6,
    )
    (grid,) = costs.kinds.values()
    num_layers, (first, _) = tiny.handle.num_layers, calls[0]
    assert first == (0, 1)  # makes the carry
    assert {layers for layers, kv_only in calls if not kv_only} == {(0, 1), (0, num_layers)}
    assert {layers for layers, kv_only in calls if kv_only} == {(row, row + 1) for row in range(num_layers)}
    assert grid.full_s(128, 0) == 1.0 / num_layers, "a launch for all layers, on the device's own clock"
    assert grid.kv_only_s(128, 0) == grid.full_s(128, 0), "never more than the whole"
    measured = sum((layers, kv_only) == ((0, num_layers), False) for layers, kv_only in calls)
    measured += sum(layers == (num_layers - 1, num_layers) for layers, kv_only in calls if kv_only)
    head = 4  # its repeats, without a segment
    assert device.host_waits == 2 * (measured + head) + num_segments - 1


@ONE
def test_what_this_engine_is(tiny):
    from cacheflow.vllm.compat import RunnerKind, check_version, require_vllm, vllm_version
    from cacheflow.vllm.models.refusals import load_refusals

    handle = tiny.handle
    version = vllm_version()
    assert version.known
    require_vllm(version.text)
    check_version()
    assert load_refusals(handle.vllm_config, handle.runner.kv_cache_config) == []
    assert handle.runner_kind is (RunnerKind.V2 if v2_runner.WANTED else RunnerKind.V1)
    assert (handle.start_layer, handle.num_layers) == (0, 4)
    assert not handle.compiled
    assert handle.is_first_stage
    assert [name.split(".")[2] for name in handle.layer_names] == ["0", "1", "2", "3"]
