from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError, TraceError, UnknownPolicyError
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Grid, regular_ends
from cacheflow.plan.problem import LinkCost
from cacheflow.plan.rates import LiveRates
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.device import VirtualDevice
from cacheflow.sim.granularity import coarsen
from cacheflow.sim.link import SharedBandwidth, SimulatedLink
from cacheflow.sim.policies import SYSTEMS, make_system
from cacheflow.sim.run import simulate
from cacheflow.state.batch import BatchScheduler
from support.clusters import CONFIG, SHAPE, TOKENS, ask, mixed_requests, serve, tiny_costs
from support.examples import examples

LONG_S = 1000.0
"""Long after everything before has ended."""


def flush(first_id: int, first_block: int, *, at_s: float = LONG_S):
    """A request that takes all of GPU memory and so evicts whatever lies idle there."""
    num = CONFIG.kv_blocks
    return ask(first_id, range(first_block, first_block + num), arrival_s=at_s, input_tokens=num * TOKENS - 1)


@pytest.mark.parametrize("policy", SYSTEMS)
@pytest.mark.parametrize("num_blocks", [1, 7, 40])
def test_a_restoration_on_an_idle_replica_takes_what_the_device_takes(policy, num_blocks):
    """Save a prefix, evict it from GPU memory, restore it: exactly as the device does on the same grid."""
    prompt = range(num_blocks + 1)
    requests = [ask(0, prompt), flush(1, 1000), ask(2, (*prompt[:-1], 5000, 5001), arrival_s=2 * LONG_S)]
    _, served = serve(requests, policy=policy)
    system, costs = make_system(policy), tiny_costs()
    known, end = num_blocks * TOKENS, (num_blocks + 2) * TOKENS - 1
    # What saves less than the steps of a restoration cost the plugin leaves to vLLM.
    known = 0 if policy == "vllm" or (policy == "cacheflow" and num_blocks == 1) else known
    grid = Grid(
        chunk_ends=regular_ends(0, known, TOKENS),
        num_blocks=SHAPE.num_layers,
        suffix_ends=regular_ends(known, end, CONFIG.pass_tokens),
    )
    link = LinkCost(bytes_per_s=CONFIG.nic_bytes_per_s, latency_s=CONFIG.nic_latency_s)
    exact = costs.problem(grid, link=link)
    problem = coarsen(exact, system.grain_of(exact))
    loop, done = EventLoop(), []
    device = VirtualDevice(
        loop,
        BatchScheduler(system.batch, LiveRates(bytes_per_s=link.bytes_per_s)),
        SimulatedLink(loop, link),
        reads_in_flight=1,
    )
    device.submit(0, problem, done.append)
    loop.run()
    ttft_s = served[2].first_token_at_s - served[2].arrival_s
    assert served[2].restored_tokens == known
    assert ttft_s == pytest.approx(done[0].first_token_at_s, rel=1e-9)
    assert ttft_s >= bound(exact).ttft_s * (1 - 1e-9)
    if policy == "cacheflow_embedded" and num_blocks > 1:
        assert ttft_s <= bound(exact).ttft_s * 1.06
    if policy == "cacheflow" and num_blocks > 1:  # new tokens follow the restoration
        assert ttft_s <= (bound(exact).restore_s + exact.suffix_s) * 1.06


def test_what_is_in_gpu_memory_costs_nothing_and_what_nobody_has_is_prefilled():
    prompt = tuple(range(20))
    requests = [ask(0, prompt), ask(1, prompt, arrival_s=LONG_S), ask(2, range(100, 120), arrival_s=2 * LONG_S)]
    cluster, served = serve(requests)
    assert [served[i].hit_tokens for i in range(3)] == [0, 19 * TOKENS, 0]
    ttfts = [served[i].first_token_at_s - served[i].arrival_s for i in range(3)]
    assert ttfts[0] == pytest.approx(ttfts[2])
    grid = Grid(chunk_ends=(), num_blocks=SHAPE.num_layers, suffix_ends=(20 * TOKENS - 1,), start=19 * TOKENS)
    assert ttfts[1] == pytest.approx(tiny_costs().problem(grid, link=LinkCost(bytes_per_s=1.0)).suffix_s)
    assert cluster.replicas[0].store_link.moved_bytes == 0


def test_the_host_tier_is_read_before_the_store():
    prompt, block_bytes = tuple(range(31)), TOKENS * SHAPE.kv_bytes_per_token
    requests = [ask(0, prompt), flush(1, 1000), ask(2, prompt, arrival_s=2 * LONG_S)]
    for host_blocks, from_host in ((300, 30), (0, 0)):
        cluster, served = serve(requests, policy="lmcache", host_tokens=host_blocks * TOKENS)
        assert served[2].loaded_bytes == 30 * block_bytes
        assert cluster.replicas[0].host_link.moved_bytes == from_host * block_bytes
        assert cluster.replicas[0].store_link.moved_bytes == (30 - from_host) * block_bytes


@pytest.mark.parametrize("policy", ["lmcache", "hicache"])
def test_a_prefix_that_lies_in_two_tiers_is_read_from_both_and_no_byte_twice(policy):
    """The flush has 199 full blocks, so that the host keeps the first 10 of the prompt's; the store has all 30."""
    prompt, block_bytes = tuple(range(31)), TOKENS * SHAPE.kv_bytes_per_token
    requests = [ask(0, prompt), flush(1, 1000), ask(2, prompt, arrival_s=2 * LONG_S)]
    cluster, served = serve(requests, policy=policy, host_tokens=209 * TOKENS)
    assert served[2].loaded_bytes == 30 * block_bytes
    assert cluster.replicas[0].host_link.moved_bytes == 10 * block_bytes
    assert cluster.replicas[0].store_link.moved_bytes == 20 * block_bytes


def test_a_turn_comes_after_the_one_before_and_its_pause():
    requests = [
        ask(0, range(10), output_tokens=50, session_id="a"),
        ask(1, range(12), after=0, arrival_s=0.25, delay_s=0.25, session_id="a"),
        ask(2, range(13), after=1, arrival_s=50.0, delay_s=0.1, session_id="a"),
    ]
    _, served = serve(requests)
    assert served[1].arrival_s == pytest.approx(served[0].last_token_at_s + 0.25)
    assert served[2].arrival_s == 50.0


def test_a_turn_waits_for_one_that_waits_itself():
    requests = [
        ask(0, range(10), output_tokens=50, session_id="a"),
        ask(1, range(12), after=0, arrival_s=0.01, delay_s=3.0, session_id="a"),
        ask(2, range(13), after=1, arrival_s=0.02, delay_s=0.5, session_id="a"),
    ]
    _, served = serve(requests)
    assert served[1].arrival_s == pytest.approx(served[0].last_token_at_s + 3.0)
    assert served[2].arrival_s == pytest.approx(served[1].last_token_at_s + 0.5)


def test_two_turns_may_follow_one():
    requests = [
        ask(0, range(3), session_id="a"),
        *(ask(i, range(4), after=0, delay_s=i, session_id="a") for i in (1, 2)),
    ]
    _, served = serve(requests)
    assert [served[i].arrival_s - served[0].last_token_at_s for i in (1, 2)] == pytest.approx([1.0, 2.0])


def test_a_request_waits_for_room_in_gpu_memory():
    half = CONFIG.kv_blocks // 2 + 1
    requests = [ask(0, range(half), output_tokens=30), ask(1, range(500, 500 + half)), ask(2, range(900, 902))]
    _, served = serve(requests)
    assert served[1].first_token_at_s > served[0].last_token_at_s
    assert served[2].first_token_at_s > served[0].last_token_at_s, "first come, first served"


def test_a_link_that_all_share_is_shared_and_never_faster_than_its_own():
    loop = EventLoop()
    shared, ends = SharedBandwidth(100.0), []
    links = [SimulatedLink(loop, LinkCost(bytes_per_s=80.0), shared=shared) for _ in range(2)]
    for link in links:
        for _ in range(2):
            link.read(100, lambda busy_s: ends.append((loop.now_s, busy_s)))
    loop.run()
    # One after the other through the store at 100 B/s: 1, 2, 3, 4 s; the first link needs 1.25 s a read by itself.
    assert [end for end, _ in ends] == pytest.approx([1.25, 2.5, 3.0, 4.25])
    assert shared.busy_s == pytest.approx(4.0)
    assert sum(link.moved_bytes for link in links) == 400


@pytest.mark.parametrize("router", ["affinity", "round_robin"])
@pytest.mark.parametrize("policy", SYSTEMS)
def test_nothing_is_lost_and_nobody_works_more_than_all_the_time(policy, router):
    requests = mixed_requests(120)
    config = replace(CONFIG, num_replicas=3, router=router, host_tokens=100 * TOKENS, store_bytes_per_s=1.5e8)
    cluster, served = serve(requests, policy=policy, config=config)
    end_s = cluster.loop.now_s
    assert sorted(served) == [request.request_id for request in requests]
    for each in served.values():
        assert each.arrival_s <= each.first_token_at_s <= each.last_token_at_s <= end_s
        assert each.hit_tokens + each.restored_tokens < each.request.input_tokens
        assert 0 <= each.loaded_bytes <= each.restored_tokens * SHAPE.kv_bytes_per_token
    moved = sum(replica.store_link.moved_bytes + replica.host_link.moved_bytes for replica in cluster.replicas)
    assert moved == sum(each.loaded_bytes + each.wasted_bytes for each in served.values())
    decoded = sum(replica.gpu.decoded_tokens for replica in cluster.replicas)
    assert decoded == sum(request.output_tokens - 1 for request in requests)
    for replica in cluster.replicas:
        assert replica.gpu.given_busy_s + replica.gpu.decode_busy_s <= end_s + 1e-9
        assert replica.store_link.busy_s <= end_s + 1e-9
        assert replica.num_unserved == 0
        assert replica.cache.num_free + replica.cache.num_idle == config.kv_blocks
    loads = sum(each.loaded_bytes for each in served.values())
    assert (loads == 0) if policy == "vllm" else (loads > 0)
    if policy in ("lmcache", "hicache"):
        assert loads == sum(each.restored_tokens for each in served.values()) * SHAPE.kv_bytes_per_token


@settings(max_examples=examples(15))
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(sorted(SYSTEMS)), rate=st.sampled_from([2.0, 20.0, 200.0]))
def test_the_same_seed_gives_the_same_result(seed, policy, rate):
    config = replace(CONFIG, num_replicas=2)
    first, second = (
        simulate(
            mixed_requests(40, seed=seed, rate_per_s=rate),
            config=config,
            costs=tiny_costs(),
            policy=make_system(policy),
        )
        for _ in range(2)
    )
    assert first.result == second.result
    assert first.ttfts_s == second.ttfts_s


def test_affinity_sends_a_session_to_the_replica_that_holds_it_unless_that_is_busy():
    prompt = tuple(range(30))
    apart = [ask(0, prompt), ask(1, range(500, 530), arrival_s=1.0), ask(2, (*prompt[:-1], 77), arrival_s=LONG_S)]
    _, served = serve(apart, num_replicas=3)
    assert served[2].hit_tokens == 29 * TOKENS
    together = [ask(0, prompt), *(ask(i, (*prompt[:3], 1000 + i), arrival_s=LONG_S) for i in range(1, 7))]
    cluster, _ = serve(together, num_replicas=3)
    assert all(replica.gpu.given_busy_s > 0 for replica in cluster.replicas)


def test_errors_at_the_door():
    with pytest.raises(ConfigError, match=r"takes 63,999 \+ 1 tokens, a replica holds 12,800"):
        serve([ask(0, range(1000))])
    with pytest.raises(ConfigError, match="blocks of 64 tokens, the cluster of 128"):
        serve([ask(0, range(3))], block_tokens=128)
    with pytest.raises(TraceError, match="expected the order of arrival"):
        serve([ask(0, range(3), arrival_s=5.0), ask(1, range(3), arrival_s=4.0)])
    with pytest.raises(TraceError, match="request 2 comes after 0, but has no session_id"):
        serve([ask(0, range(3)), ask(2, range(3), after=0)])
    with pytest.raises(TraceError, match="no request"):
        simulate([], config=CONFIG, costs=tiny_costs(), policy=make_system("cake"))
    with pytest.raises(UnknownPolicyError, match="known are vllm, lmcache"):
        make_system("cak")
    with pytest.raises(UnknownPolicyError, match="known are mean_ttft"):
        make_system("cacheflow", objective="p98")
    with pytest.raises(UnknownPolicyError, match="affinity, round_robin"):
        serve([ask(0, range(3))], router="random")
    for name in ("num_replicas", "kv_tokens", "nic_bytes_per_s", "recompute_budget_s"):
        with pytest.raises(ConfigError, match=name):
            replace(CONFIG, **{name: 0})


class _DearChunks:
    """The costs of a model whose chunks are dear beside longer passes, as a mixture of experts' are."""

    def __init__(self, costs, *, pass_saving: float):
        self._costs, self._saving = costs, pass_saving

    def __getattr__(self, name):
        return getattr(self._costs, name)

    def problem(self, grid, *, link):
        exact = self._costs.problem(grid, link=link)
        cheap = self._saving if grid.suffix_tokens > CONFIG.block_tokens * 2 else 1.0
        return replace(exact, suffix_B=exact.suffix_B * cheap)


@pytest.mark.parametrize("policy", ["cacheflow", "cake"])
def test_ours_leaves_a_prompt_to_the_engines_own_prefill_where_that_is_sooner(policy):
    prompt = tuple(range(40))
    requests = [ask(0, prompt), flush(1, 1000), ask(2, prompt, arrival_s=2 * LONG_S)]
    ttfts_s = {}
    for saving in (1.0, 0.01):
        costs = _DearChunks(tiny_costs(), pass_saving=saving)
        _, served = serve(requests, policy=policy, costs=costs)
        ttfts_s[saving] = served[2].first_token_at_s - served[2].arrival_s
        left = policy == "cacheflow" and saving < 1.0
        assert served[2].restored_tokens == (0 if left else 39 * TOKENS)
        assert (served[2].loaded_bytes == 0) is left
    if policy == "cacheflow":
        assert ttfts_s[0.01] < 0.1 * ttfts_s[1.0]
