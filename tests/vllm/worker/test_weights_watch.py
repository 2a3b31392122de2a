"""Weights that change: by vLLM's own ways, and by an edit that only a sample can find."""

import gc
import weakref

import pytest

pytest.importorskip("torch")

import torch

from cacheflow.vllm.worker.weights_watch import SAMPLE_BYTES, WeightsWatch, announce_change, watch_weights
from support.fake_device import NONE_GOES_ON, FakeDevice

pytestmark = pytest.mark.torch


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = torch.nn.Linear(100, 70, dtype=dtype)
        self.tied = torch.nn.Linear(100, 70, dtype=dtype)
        self.tied.weight = self.first.weight
        self.norm = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        self.turned = torch.nn.Parameter(torch.randn(64, 32).to(dtype).t())
        self.empty = torch.nn.Parameter(torch.empty(0))
        self.loads = 0

    def load_weights(self, weights):
        """Reads the first, then breaks."""
        self.loads += 1
        self.norm.data.copy_(weights)
        return {"norm"}


class Runner:
    def __init__(self):
        self.model = Model()

    def get_model(self):
        return self.model


EDITS = {
    "scaled": lambda model: model.first.weight.data.mul_(1.5),
    "a bias": lambda model: model.first.bias.data.add_(1e-3),
    "a small one": lambda model: model.norm.data.fill_(0.5),
    "a step": lambda model: [p.data.sub_(1e-3 * torch.sign(torch.randn_like(p))) for p in model.parameters()],
    "not contiguous": lambda model: model.turned.data.neg_(),
    "other memory": lambda model: setattr(model.norm, "data", model.norm.data.clone()),
    "another parameter": lambda model: setattr(model, "norm", torch.nn.Parameter(torch.ones(3))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_found_once(name, dtype):
    model = Model(dtype)
    watch = WeightsWatch(model)
    watch.check()
    assert (watch.version, watch.change) == (0, None)
    EDITS[name](model)
    watch.check()
    watch.check()
    assert watch.version == 1
    assert not watch.change.announced


def test_a_call_of_load_weights_announces_also_where_it_fails():
    model = Model()
    watch = WeightsWatch(model)
    assert model.load_weights(torch.tensor([1.0, 2.0, 3.0])) == {"norm"}
    assert (watch.version, watch.change.how, watch.change.announced) == (1, "load_weights", True)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.load_weights(torch.ones(9))
    assert watch.version == 2
    watch.check()
    assert (watch.version, model.loads) == (2, 2)


def test_a_watch_belongs_to_a_runner_and_goes_with_it():
    runner, other = Runner(), Runner()
    watch = watch_weights(runner)
    assert watch_weights(runner) is watch
    announce_change(runner, "apply_model")
    announce_change(other, "apply_model")
    assert (watch.version, watch_weights(other).version) == (1, 0)
    gone = weakref.ref(watch)
    del runner, watch
    gc.collect()
    assert gone() is None


def test_the_sample_is_small_and_takes_high_and_low_bytes():
    model = Model(torch.bfloat16)
    watch = WeightsWatch(model)
    by_weight = watch._views.values()  # noqa: SLF001 -- how much is read shows nowhere else
    views = [view for views in by_weight for view in views]
    assert all(view.numel() <= SAMPLE_BYTES for view in views)
    for bits in (0x0001, 0x4000):  # the lowest and a high bit of every number
        before = watch.version
        model.first.weight.data.copy_((model.first.weight.data.view(torch.int16) ^ bits).view(torch.bfloat16))
        watch.check()
        assert watch.version == before + 1


@pytest.mark.parametrize("edited", [False, True])
def test_on_a_device_the_check_does_not_wait_for_the_forward(edited):
    """Weights are compared as they were before it, with every edit that was asked for by then."""
    device = FakeDevice(lambda num_ready: NONE_GOES_ON, favours=-1)
    model = Model()
    watch = WeightsWatch(model, device)
    if edited:
        device.compute.launch(lambda: model.first.weight.data.mul_(2.0))
    watch.begin_step()
    device.compute.launch(lambda: None)  # the forward
    watch.check()
    assert watch.version == edited
    assert device.compute.num_queued("launch") == 1, "the forward is still to come"
    assert device.host_waits == 1


def test_a_check_before_the_first_step_sees_what_was_asked_so_far():
    device = FakeDevice(lambda num_ready: NONE_GOES_ON)
    model = Model()
    watch = WeightsWatch(model, device)
    device.compute.launch(lambda: model.norm.data.add_(1.0))
    watch.check()
    assert watch.version == 1


def test_after_a_change_the_same_step_compares_with_the_new_sample():
    device = FakeDevice(lambda num_ready: NONE_GOES_ON, favours=-1)
    model = Model()
    watch = WeightsWatch(model, device)
    device.compute.launch(lambda: model.norm.data.add_(1.0))
    watch.begin_step()
    device.compute.launch(lambda: None)
    watch.check()
    assert watch.version == 1
    watch.check()
    assert device.compute.num_queued("launch") == 0, "the new sample is made after what was asked so far"
    assert watch.version == 1
