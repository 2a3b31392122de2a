"""Staging buffers are handed out again, never twice at once."""

import pytest

from cacheflow.tensors.staging import StagingPool

pytestmark = pytest.mark.torch


def test_buffers_in_flight_differ_and_come_back():
    pool = StagingPool(64)
    first, second = pool.take(), pool.take()
    assert first is not second
    first.array[:] = 7
    assert first.tensor.sum() == 7 * 64
    pool.give(first)
    assert pool.take() is first
