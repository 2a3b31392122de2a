"""What one caller does wrong harms nobody else of a batch, and never locks the engine."""

from __future__ import annotations

import threading

import pytest

from cacheflow.errors import ConfigError

pytestmark = pytest.mark.torch


@pytest.fixture
def store():
    from cacheflow.stores.memory import MemoryStore

    with MemoryStore(capacity_bytes=1 << 28) as opened:
        yield opened


@pytest.fixture
def engine(store):
    from support.embedded_cases import make_engine, tiny

    return make_engine(tiny(), store)


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("cacheflow-")}


def test_a_session_of_another_engine_is_refused(store, engine):
    from support.embedded_cases import make_engine, tiny

    foreign = make_engine(tiny(), store).session()
    with engine.concurrent() as batch:
        with pytest.raises(ConfigError, match="not one of this engine's"):
            batch.submit(foreign, [1, 2, 3], max_new_tokens=2)
        with pytest.raises(ConfigError, match="not one of this engine's"):
            batch.submit(None, [1, 2, 3], max_new_tokens=2)


@pytest.mark.parametrize("deadline_s", ["1", 0, -1.0, float("nan"), float("inf")])
def test_a_deadline_that_is_none_harms_nobody_else(engine, deadline_s):
    with engine.concurrent(objective="slo") as batch:
        good = batch.submit(engine.session(), [1, 2, 3], max_new_tokens=8, deadline_s=5.0)
        with pytest.raises(ConfigError, match="deadline_s is"):
            batch.submit(engine.session(), [1, 2, 3], max_new_tokens=2, deadline_s=deadline_s)
    assert len(good.result(0).tokens) == 8


@pytest.mark.parametrize("option", ["starvation_s", "recompute_budget_ms"])
@pytest.mark.parametrize("value", [None, "x", 0, float("nan")])
def test_a_refused_option_leaves_the_engine_free(engine, option, value):
    with pytest.raises(ConfigError, match=f"{option} is"):
        engine.concurrent(**{option: value})
    with engine.concurrent() as batch:
        batch.submit(engine.session(), [1, 2, 3], max_new_tokens=2)


def test_an_interrupted_wait_ends_every_thread(engine, monkeypatch):
    from cacheflow.restore.executor import BatchExecutor

    def interrupted(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BatchExecutor, "drain", interrupted)
    with pytest.raises(KeyboardInterrupt), engine.concurrent() as batch:
        batch.submit(engine.session(), [1, 2, 3], max_new_tokens=2)
    assert not names() & {"cacheflow-compute", "cacheflow-io"}
    monkeypatch.undo()
    with engine.concurrent() as batch:
        batch.submit(engine.session(), [1, 2, 3], max_new_tokens=2)
