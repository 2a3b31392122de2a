"""What tests of the benchmark commands share."""

from __future__ import annotations

import pytest


@pytest.fixture
def torch_threads():
    """One torch thread, so that tests do not wait for each other's."""
    from support.embedded_cases import one_torch_thread

    with one_torch_thread() as usual:
        yield usual


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny Llama on disk."""
    from support.embedded_cases import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def no_work(monkeypatch):
    """No model is opened from here on."""
    from cacheflow.bench import setup

    monkeypatch.setattr(setup, "open_model", lambda *args, **options: pytest.fail("a model was opened"))
