"""Replicas of several GPUs: what stages, ranks and their links change, and that they serve every request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.stages import RankLayout
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.policies.stages import StagePolicy
from cacheflow.shapes.hardware import find_gpu, find_model
from cacheflow.shapes.roofline import Roofline
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.cluster import Cluster
from cacheflow.sim.costs import roofline_costs
from cacheflow.sim.device import VirtualDevice
from cacheflow.sim.link import SimulatedLink
from cacheflow.sim.policies import make_system
from cacheflow.sim.ranks import RankCosts
from cacheflow.state.batch import BatchScheduler
from support.clusters import CONFIG, SHAPE, TOKENS, mixed_requests, tiny_costs
from support.problems import transformer_problem

LINK = LinkCost(bytes_per_s=1e8)


def grid_of(num_tokens=40 * TOKENS, suffix_tokens=48):
    layers = SHAPE.num_layers
    return Grid.regular(num_tokens=num_tokens, chunk_tokens=TOKENS, num_blocks=layers, suffix_tokens=suffix_tokens)


def rank_costs(*, boundary_states=True, **layout):
    return RankCosts(tiny_costs(), RankLayout(**layout), boundary_states=boundary_states)


def test_tensor_parallel_ranks_take_their_share():
    whole = tiny_costs().problem(grid_of(), link=LINK)
    rank = rank_costs(tensor_parallel_size=2)
    half = rank.problem(grid_of(), link=LINK)
    assert half.recompute_s == pytest.approx(whole.recompute_s / 2)
    assert half.load_s == pytest.approx(whole.load_s / 2)
    assert half.suffix_s == pytest.approx(whole.suffix_s / 2)
    assert rank.decode_step_s(3, 5000) == pytest.approx(tiny_costs().decode_step_s(3, 5000) / 2)
    assert rank.elsewhere_s(half) == 0.0


def test_new_tokens_pass_the_other_stages_too_and_chunks_come_up_unless_states_are_stored():
    whole = tiny_costs().problem(grid_of(), link=LINK)
    for boundary_states in (False, True):
        rank = rank_costs(pipeline_parallel_size=4, boundary_states=boundary_states)
        own = rank.problem(grid_of(), link=LINK)
        assert own.grid.num_blocks * 4 == whole.grid.num_blocks
        waits_s = 0.0 if own.boundary_bytes_K.any() else 3 * float(own.compute_KB[0].sum())
        new_s = own.suffix_s + rank.elsewhere_s(own) - waits_s
        assert new_s == pytest.approx(whole.suffix_s)
        if not boundary_states:
            assert not own.boundary_bytes_K.any()


def test_boundary_states_are_read_where_that_is_sooner():
    rank = rank_costs(pipeline_parallel_size=2)
    slow, fast = (rank.problem(grid_of(10 * TOKENS), link=LinkCost(bytes_per_s=speed)) for speed in (1e6, 1e12))
    assert not slow.boundary_bytes_K.any()
    assert fast.boundary_bytes_K.any()


def test_a_layout_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ConfigError, match="cannot be shared by tensor_parallel_size"):
        rank_costs(tensor_parallel_size=7)
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 0"):
        replace(CONFIG, pipeline_parallel_size=0)


def served_by(config, system="cacheflow"):
    served = []
    cluster = Cluster(config, tiny_costs(), make_system(system))
    cluster.run(mixed_requests(80), served.append)
    return cluster, served


@pytest.mark.parametrize("system", ["vllm", "lmcache", "cake", "cacheflow_v1", "cacheflow"])
@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)])
def test_replicas_of_several_gpus_serve_every_request(system, layout):
    stages, ranks = layout
    config = replace(CONFIG, pipeline_parallel_size=stages, tensor_parallel_size=ranks)
    _, served = served_by(config, system)
    _, alone = served_by(CONFIG, system)
    assert len(served) == len(alone) > 0
    assert all(each.arrival_s < each.first_token_at_s <= each.last_token_at_s for each in served)


def test_more_gpus_with_links_of_their_own_are_sooner_than_with_one_between_them():
    def mean_s(config):
        _, served = served_by(config)
        return np.mean([each.first_token_at_s - each.arrival_s for each in served])

    one = mean_s(CONFIG)
    own = mean_s(replace(CONFIG, tensor_parallel_size=2))
    shared = mean_s(replace(CONFIG, tensor_parallel_size=2, link_per_rank=False))
    assert own < shared < one


@pytest.mark.parametrize("policy", sorted(RESTORE_POLICIES))
def test_stored_states_and_new_tokens_end_together_under_any_policy(policy):
    rng = np.random.default_rng(sorted(RESTORE_POLICIES).index(policy))
    for _ in range(40):
        problem = transformer_problem(
            num_tokens=int(rng.integers(1, 6000)),
            suffix_tokens=int(rng.choice([1, 300, 2000])),
            num_blocks=int(rng.choice([1, 2, 8])),
            ratio=float(10 ** rng.uniform(-1.3, 1.3)),
        )
        chunk_bytes = problem.load_bytes_KB.sum(axis=1)
        share = float(rng.choice([0.1, 0.5, 1.5]))
        problem = replace(problem, boundary_bytes_K=(chunk_bytes * share).astype(np.int64) + 1)
        loop, ended = EventLoop(), []
        scheduler = BatchScheduler(
            make_batch_policy("fcfs", StagePolicy(make_policy(policy))),
            LiveRates(bytes_per_s=problem.link.bytes_per_s),
        )
        device = VirtualDevice(loop, scheduler, SimulatedLink(loop, problem.link))
        device.submit(1, problem, ended.append)
        loop.run()
        assert len(ended) == 1, "no end in sight"
        assert ended[0].first_token_at_s >= problem.suffix_s


def test_a_hybrids_largest_stage_stands_for_all_in_rows():
    costs = roofline_costs(Roofline(shape=find_model("Qwen3.6-27B"), gpu=find_gpu("H100")), chunk_tokens=512)
    layout = RankLayout(pipeline_parallel_size=2, tensor_parallel_size=2)
    ranks = RankCosts(costs, layout, boundary_states=False)
    grid = Grid.regular(num_tokens=4096, chunk_tokens=512, num_blocks=16, suffix_tokens=256)
    problem, whole = ranks.problem(grid, link=LINK), costs.problem(grid, link=LINK)
    assert problem.grid.num_blocks == 8
    assert problem.recurrent_B.all()
    assert problem.load_bytes_KB.sum() == whole.load_bytes_KB.sum() // 4
    assert ranks.elsewhere_s(problem) > float(problem.suffix_B.sum()) > 0
