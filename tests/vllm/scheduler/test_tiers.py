"""A prompt whose chunks lie in two tiers: planned by what each delivers, read from both at once."""

import numpy as np
import pytest

from cacheflow.stores.keys import RankKeys
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.tiered import TieredStore
from support.scheduler_cases import CHUNK, LAYERS, Case, Worker, facts

NUM_CHUNKS = 8
IN_SLOW = [1] * 4 + [0] * 4


@pytest.fixture
def begun():
    """Begins a restoration of eight chunks, the first four of which are in the slow tier alone."""

    def begin(*, slowness, measured=True, throttled=False):
        fast, slow = (MemoryStore(capacity_bytes=1 << 28) for _ in range(2))
        tiers = TieredStore({"fast": fast, "slow": slow})
        store = ThrottledStore(tiers, 1e12) if throttled else tiers
        link = facts().link.bytes_per_s
        rates = (link, link / slowness) if measured else ()
        case = Case(facts_by_rank=(facts(tier_rates=rates),), store=store)
        prompt = case.saved_prompt(NUM_CHUNKS * CHUNK + 1, NUM_CHUNKS)
        assert tiers.drain(20.0)
        case.arrive("a", prompt)
        request = case.side.requests["a"]
        hashes = request.prefix.chain_hashes(0, IN_SLOW.count(1))
        names = [(request.name.namespace, each, (layer, layer + 1)) for each in hashes for layer in range(LAYERS)]
        fast.delete([RankKeys().kv(*name) for name in names])
        case.side.finished("a")
        case.arrive("b", prompt)
        case.matched("b")
        (stage,) = case.side.requests["b"].decision.stages
        assert case.begin("b") == NUM_CHUNKS * CHUNK
        return case, stage

    return begin


def test_chunks_cost_what_their_tier_delivers(begun):
    _, stage = begun(slowness=5.0)
    assert stage.problem.tier_KB[:, 0].tolist() == IN_SLOW
    cost_K = stage.problem.load_bytes_KB.sum(axis=1)
    assert np.allclose(cost_K[:4], 5 * cost_K[4:], rtol=1e-2)
    assert (stage.problem.moved_KB == stage.problem.moved_KB[0, 0]).all()


def test_the_slower_the_tier_the_more_is_recomputed(begun):
    levels = [sum(begun(slowness=slowness)[1].plan.levels_K) for slowness in (1.0, 5.0, 50.0)]
    assert levels[0] < levels[1] <= levels[2]


def test_what_was_never_measured_counts_as_equally_fast(begun):
    _, stage = begun(slowness=5.0, measured=False)
    assert stage.problem.tier_KB[:, 0].tolist() == IN_SLOW
    assert len(set(stage.problem.load_bytes_KB.ravel().tolist())) == 1


def test_tiers_behind_one_link_are_planned_as_one(begun):
    case, stage = begun(slowness=5.0, throttled=True)
    assert case.side.requests["b"].question.tiers == tuple(IN_SLOW)
    assert stage.problem.num_tiers == 1
    assert len(set(stage.problem.load_bytes_KB.ravel().tolist())) == 1


def test_a_step_asks_both_tiers_and_the_restoration_ends(begun):
    case, stage = begun(slowness=5.0)
    work = case.step()
    (of_stage,) = work.of_stage(0)
    asked = {int(stage.problem.tier_KB[read.piece]) for read in of_stage.reads}
    assert asked == {0, 1}
    worker = Worker(case)
    worker.carry_out(work)
    worker.run()
    assert len(worker.finished) == 1
    assert case.side.counts.restorations["done"] == 1
