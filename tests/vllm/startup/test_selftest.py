"""The self-test passes on every family and notices what would be served wrongly."""

import dataclasses

import numpy as np
import pytest

from cacheflow.errors import ConfigError, SelfTestError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ONE = pytest.mark.parametrize("tiny", ["qwen3-bf16"], indirect=True, scope="session")


def new_forward(tiny, **changes):
    from cacheflow.vllm.models.partial_forward import PartialForward

    return PartialForward(dataclasses.replace(tiny.handle, **changes))


def last_blocks(tiny, count):
    return tiny.gather(list(range(tiny.layout.num_blocks - count, tiny.layout.num_blocks)))


def test_it_passes_and_leaves_zeros(tiny):
    from cacheflow.vllm.startup.selftest import self_test

    report = self_test(tiny.layout, new_forward(tiny), chunk_tokens=512)
    assert report.passed
    assert report.recompute_equal
    assert report.num_chunks == 3
    assert not last_blocks(tiny, 2 * report.num_tokens // tiny.size).any()


@ONE
def test_copies_alone_are_tested_where_nothing_is_recomputed(tiny):
    from cacheflow.vllm.startup.selftest import self_test

    report = self_test(tiny.layout, None, chunk_tokens=512)
    assert report.copy_equal
    assert report.recompute_equal is None
    assert not last_blocks(tiny, 2).any()


@ONE
def test_a_family_called_wrongly_is_refused(tiny):
    """Keys without their norm: the kind of mistake a new family would bring."""
    from cacheflow.vllm.models.families import FAMILIES

    from cacheflow.vllm.startup.selftest import self_test

    wrong = new_forward(tiny, family=FAMILIES["LlamaForCausalLM"])
    assert wrong.writes_alone
    with pytest.raises(SelfTestError, match="recomputed equal False") as raised:
        self_test(tiny.layout, wrong, chunk_tokens=512)
    assert "load_only" not in str(raised.value)  # it would test the same once more
    assert not last_blocks(tiny, 6).any()


@ONE
def test_positions_off_by_one_are_refused(tiny):
    from cacheflow.vllm.startup.selftest import self_test

    forward = new_forward(tiny)
    run = forward.run

    def shifted(piece, activations, **arguments):
        return run(dataclasses.replace(piece, positions=piece.positions + 1), activations, **arguments)

    forward.run = shifted
    with pytest.raises(SelfTestError, match="recomputed equal False"):
        self_test(tiny.layout, forward, chunk_tokens=512)


@ONE
def test_scatter_into_the_wrong_block_is_refused(tiny):
    from cacheflow.vllm.startup.selftest import self_test

    class Off:
        def __getattr__(self, name):
            return getattr(tiny.layout, name)

        def scatter(self, lo, hi, block_ids, payload, **arguments):
            shifted = [*block_ids[1:], block_ids[0]] if len(np.unique(payload)) > 1 else block_ids
            tiny.layout.scatter(lo, hi, shifted, payload, **arguments)

    with pytest.raises(SelfTestError, match="copied equal False"):
        self_test(Off(), new_forward(tiny), chunk_tokens=512)


@ONE
def test_a_small_kv_cache_is_named(tiny):
    from cacheflow.vllm.startup.probe import scratch_blocks

    too_many = tiny.layout.num_blocks * tiny.size
    with pytest.raises(ConfigError, match=f"{too_many} tokens need"), scratch_blocks(tiny.layout, too_many):
        pass


@pytest.mark.parametrize("tiny", ["llama-bf16-compiled"], indirect=True, scope="session")
def test_a_compiled_engine_is_restored_in_whole_passes(tiny):
    from cacheflow.plan.grid import Tile
    from cacheflow.restore.work import RestoreTarget
    from cacheflow.vllm.startup.selftest import self_test
    from cacheflow.vllm.worker.recompute import VllmComputePort

    assert tiny.handle.compiled
    forward = new_forward(tiny)
    assert not forward.writes_alone
    assert self_test(tiny.layout, forward, chunk_tokens=512).passed
    tokens = tiny.tokens(256 + 9)
    kv = tiny.prefill(tokens, chunk_tokens=128)
    block_ids = tiny.poisoned(2)
    target = RestoreTarget(
        restore_id=1, request_id="r", start=0, object_start=0, chunk_ends=(128, 256), tokens=tuple(tokens[:256]),
        block_ids=tuple(block_ids), namespace="n", chain_hashes=("h",) * 2, layers_per_block=tiny.layout.num_layers,
    )  # fmt: skip
    with pytest.raises(ValueError, match="whole passes"):
        VllmComputePort(forward, dataclasses.replace(target, layers_per_block=1))
    port = VllmComputePort(forward, target)
    for chunk in range(2):
        port.recompute(Tile(chunk, chunk + 1, 0, 1), kv_only_top=False)
    port.finish()
    assert tiny.differing(kv, block_ids) == 0
