"""The self-test notices what would be served wrongly; that it passes on every family ``test_recompute.py`` has."""

import dataclasses
import re

import pytest

from cacheflow.errors import ConfigError, SelfTestError, UnsupportedModelError
from support import kv_bytes

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ONE = pytest.mark.parametrize("tiny", ["qwen3-bf16"], indirect=True, scope="session")


def new_forward(tiny, **changes):
    from cacheflow.vllm.models.partial_forward import PartialForward

    return PartialForward(dataclasses.replace(tiny.handle, **changes))


@pytest.fixture(autouse=True)
def _nothing_left_by_other_tests(request):
    """The engine is shared: where the self-test works others may have been."""
    if "tiny" in request.fixturenames:
        layout = request.getfixturevalue("tiny").layout
        kv_bytes.fill(layout, list(range(layout.num_blocks)), 0)


def last_blocks(tiny, count):
    return tiny.gather(list(range(tiny.layout.num_blocks - count, tiny.layout.num_blocks)))


@ONE
def test_copies_alone_are_tested_where_nothing_is_recomputed(tiny):
    from cacheflow.vllm.startup.selftest import self_test

    report = self_test(tiny.layout, None, chunk_tokens=512)
    assert report.copy_equal
    assert report.num_cuts == 0
    assert not last_blocks(tiny, 2).any()


@ONE
def test_a_layer_that_looks_past_the_one_below_it_is_found_and_named(tiny):
    """What a model may do between its layers, and no stand-in can know: here layer 3 adds what layer 1 was given."""
    from cacheflow.vllm.startup.selftest import self_test

    layers, given = tiny.handle.layers.modules, []
    before = [layers[at].register_forward_pre_hook(hook) for at, hook in (
        (1, lambda _, args: given.append(args[1].clone())),
        (3, lambda _, args: (args[0], args[1] + (given.pop() if given else 0), *args[2:])),
    )]  # fmt: skip
    try:
        report = self_test(tiny.layout, new_forward(tiny), chunk_tokens=512)
    finally:
        for hook in before:
            hook.remove()
    assert report.difference is not None
    assert report.difference.layer == tiny.handle.layer_names[3]
    assert re.search(r"layers\.3\..* differs by up to \d.* of its bytes", str(report.difference))
    assert not last_blocks(tiny, 9).any()


@ONE
def test_keys_that_are_written_too_soon_are_found(tiny):
    """Of a layer that does more for its keys after the call at which keys and values alone are stopped."""
    from cacheflow.vllm.startup.selftest import self_test

    forward = new_forward(tiny)
    run = forward.run

    def wrong(segment, carry, *, layers, kv_only_top=False):
        out = run(segment, carry, layers=layers, kv_only_top=kv_only_top)
        if kv_only_top and layers == (2, 3):
            block = int(segment.slots[0]) // tiny.size
            kv = tiny.gather([block])
            kv[2, 0, 0] ^= 1
            tiny.place(kv, [block], layers=(2, 3), blocks=(0, 1))
        return out

    forward.run = wrong
    difference = self_test(tiny.layout, forward, chunk_tokens=512).difference
    assert difference.layer == tiny.handle.layer_names[2]
    assert difference.where == "when its keys and values are computed alone"


@ONE
def test_positions_off_by_one_are_found(tiny):
    from cacheflow.vllm.startup.selftest import self_test

    forward = new_forward(tiny)
    run = forward.run

    def shifted(segment, carry, **arguments):
        return run(dataclasses.replace(segment, positions=segment.positions + 1), carry, **arguments)

    forward.run = shifted
    difference = self_test(tiny.layout, forward, chunk_tokens=512).difference
    assert difference.layer == tiny.handle.layer_names[0]


@ONE
@pytest.mark.parametrize(("changed", "said"), [({"lookback": 1}, "lookback"), ({"inputs_embeds": 1}, "embeddings")])
def test_a_model_that_is_called_with_more_than_tokens_is_named(tiny, changed, said, monkeypatch):
    from cacheflow.vllm.startup.selftest import self_test

    model, forward = tiny.handle.model, tiny.handle.model.forward

    def calling(_, args, kwargs):
        return args, {**kwargs, **changed}

    def without(**kwargs):
        return forward(**{name: value for name, value in kwargs.items() if name not in changed})

    monkeypatch.setattr(model, "forward", without)
    hook = model.register_forward_pre_hook(calling, prepend=True, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match=said):
        self_test(tiny.layout, new_forward(tiny), chunk_tokens=512)
    hook.remove()
    monkeypatch.undo()
    assert self_test(tiny.layout, new_forward(tiny), chunk_tokens=512).difference is None, "nothing is left of it"


@ONE
def test_placing_into_the_wrong_block_is_refused(tiny):
    from cacheflow.vllm.startup.selftest import self_test

    class Off:
        def __getattr__(self, name):
            return getattr(tiny.layout, name)

        def place(self, lo, hi, block_ids, payload, **arguments):
            return tiny.layout.place(lo, hi, [*block_ids[1:], block_ids[0]], payload, **arguments)

    with pytest.raises(SelfTestError, match="copied out and back differ"):
        self_test(Off(), new_forward(tiny), chunk_tokens=512)


@ONE
def test_a_small_kv_cache_is_named(tiny):
    from cacheflow.vllm.startup.probe import scratch_blocks

    too_many = tiny.layout.num_blocks * tiny.size
    with pytest.raises(ConfigError, match=f"{too_many} tokens need"), scratch_blocks(tiny.layout, too_many):
        pass
