"""Tiny models are fastest on one thread, and many times so beside other work: threads that wait for each other spin."""

import pytest

from support.embedded_cases import one_torch_thread


@pytest.fixture(autouse=True)
def torch_threads():
    """Number of threads torch would use by itself; the tests here run on one."""
    with one_torch_thread() as usual:
        yield usual
