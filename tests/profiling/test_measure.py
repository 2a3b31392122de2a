"""Timing on a device whose calls return before their work is done."""

import random

import pytest

pytestmark = pytest.mark.torch


def test_every_point_is_run_once_before_it_is_timed():
    from cacheflow.profiling.measure import CostMeter
    from cacheflow.profiling.survey import ChunkPoint
    from support.engine_cases import prefilled
    from support.fake_device import NONE_GOES_ON, FakeDevice, LateRunner

    rng = random.Random(0)
    device = FakeDevice(lambda num_ready: NONE_GOES_ON if rng.random() < 0.9 else rng.randrange(num_ready))
    runner = LateRunner(prefilled("llama", "float32").runner.model, device)
    meter = CostMeter(runner, max_tokens=64)
    points = [ChunkPoint(16, 0), ChunkPoint(16, 48)]
    costs = meter.measure_chunks(points, repeats=3)
    assert set(costs) == set(points)
    layers = 2 * runner.num_layers  # in full, and for keys and values
    num_timed = 1 + 3 * len(points)  # the shortest once as a warm-up
    assert device.asked["compute", "launch"] == layers * (num_timed + len(points))
    assert len(meter.launch_over_wall) == len(meter.events_over_wall) == 2 * num_timed
    assert all(0 < share <= 1 for share in meter.launch_over_wall)
    assert meter.measure_head_s() > 0
