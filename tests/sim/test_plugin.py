"""The plugin's order: prompts by arrival, as vLLM computes them; only restorations are ordered."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.plan.batch import WaitingRequest
from cacheflow.plan.plan import Choice
from cacheflow.plan.remaining import Remaining
from cacheflow.policies.step_overhead import STEP_OVERHEAD_S
from cacheflow.sim.plugin import PluginRanking
from cacheflow.sim.policies import DEFAULT_SYSTEMS, EMBEDDED, SYSTEMS, make_system
from support.clusters import CONFIG, TOKENS, ask, serve
from support.examples import examples
from support.random_problems import equal_blocks

LONG_S = 1000.0


def fresh_prompts(count: int, *, seed: int, rate_per_s: float):
    """Prompts of many lengths that share nothing."""
    rng, blocks, now_s, found = random.Random(seed), itertools.count(), 0.0, []
    for request_id in range(count):
        now_s += rng.expovariate(rate_per_s)
        prompt = [next(blocks) for _ in range(rng.randint(1, 40))]
        found.append(ask(request_id, prompt, arrival_s=now_s, output_tokens=rng.randint(1, 30)))
    return found


def saved(*prompts: tuple[int, ...]):
    """Requests that save these prompts' blocks, then one that evicts all of GPU memory, all long before ``LONG_S``."""
    first = [ask(900 + index, prompt, arrival_s=float(index)) for index, prompt in enumerate(prompts)]
    num = CONFIG.kv_blocks
    flush = ask(999, range(10**6, 10**6 + num), arrival_s=LONG_S / 2, input_tokens=num * TOKENS - 1)
    return [*first, flush]


def ttfts_s(served) -> dict[int, float]:
    return {request_id: each.first_token_at_s - each.arrival_s for request_id, each in served.items()}


@settings(max_examples=examples(20))
@given(
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([0.5, 5.0, 50.0]),
    name=st.sampled_from(sorted(set(SYSTEMS) - {"vllm", EMBEDDED})),
    replicas=st.integers(1, 3),
    pipeline=st.sampled_from([1, 2]),
)
def test_where_nothing_can_be_restored_nothing_changes(seed, rate, name, replicas, pipeline):
    options = {"num_replicas": replicas, "pipeline_parallel_size": pipeline}
    requests = fresh_prompts(40, seed=seed, rate_per_s=rate)
    _, own = serve(requests, policy="vllm", **options)
    _, served = serve(requests, policy=name, **options)
    assert ttfts_s(served) == pytest.approx(ttfts_s(own), rel=1e-9)
    for request_id, each in served.items():
        assert each.last_token_at_s == pytest.approx(own[request_id].last_token_at_s, rel=1e-9)


def test_only_the_embedded_engine_orders_new_prompts():
    long_first = [ask(0, range(60)), ask(1, range(100, 160)), ask(2, range(200, 202))]
    _, plugin = serve(long_first)
    _, embedded = serve(long_first, policy=EMBEDDED)
    assert plugin[0].first_token_at_s < plugin[1].first_token_at_s < plugin[2].first_token_at_s
    assert embedded[2].first_token_at_s < embedded[1].first_token_at_s
    assert EMBEDDED not in DEFAULT_SYSTEMS


def test_a_new_prompt_is_computed_before_a_restoration_goes_on_recomputing():
    """As if it were alone: whatever is being restored takes the compute that prompts leave."""
    prompt, new = tuple(range(60)), range(500, 530)
    _, alone = serve([ask(1, new)])
    restoring = ask(0, (*prompt[:-1], 77), arrival_s=LONG_S)
    _, both = serve([*saved(prompt), restoring, ask(1, new, arrival_s=LONG_S + 1e-3)], nic_bytes_per_s=1e6)
    assert both[0].restored_tokens == 59 * TOKENS
    # It waits for the piece that compute is at, no longer.
    one_piece_s = 0.06
    assert ttfts_s(both)[1] <= ttfts_s(alone)[1] + one_piece_s
    assert both[0].first_token_at_s > both[1].first_token_at_s


def test_restorations_are_ordered_by_the_objective():
    long, short = tuple(range(60)), tuple(range(100, 108))
    requests = [
        *saved(long, short),
        ask(0, (*long[:-1], 77), arrival_s=LONG_S),
        ask(1, (*short[:-1], 78), arrival_s=LONG_S + 1e-3),
    ]
    _, served = serve(requests, nic_bytes_per_s=2e7)
    assert served[0].restored_tokens > 0
    assert served[1].restored_tokens > 0
    assert served[1].first_token_at_s < served[0].first_token_at_s


def test_new_tokens_start_when_the_prefix_is_complete():
    """The embedded engine lets them climb behind the load, so that it has the first token sooner."""
    prompt, new = tuple(range(41)), tuple(range(500, 530))
    requests = [*saved(prompt), ask(0, (*prompt[:-1], *new), arrival_s=LONG_S)]
    _, plugin = serve(requests)
    _, embedded = serve(requests, policy=EMBEDDED)
    assert plugin[0].restored_tokens == embedded[0].restored_tokens == 40 * TOKENS
    assert ttfts_s(embedded)[0] < 0.97 * ttfts_s(plugin)[0]


def test_a_starved_restoration_passes_restorations_and_no_prompt():
    order = PluginRanking(make_system(EMBEDDED).batch, starvation_s=10.0)
    waiting = [
        WaitingRequest(request_id=index, arrival_s=float(index), remaining=remaining)
        for index, remaining in enumerate(
            [Remaining(9.0, 9.0, 1.0), Remaining(0.0, 0.0, 5.0), Remaining(1.0, 1.0, 1.0), Remaining(0.0, 0.0, 1.0)]
        )
    ]
    assert order.rank(5.0, waiting).compute == (1, 3, 2, 0)
    assert order.rank(10.5, waiting).compute == (1, 3, 0, 2)
    assert order.rank(5.0, waiting).link[:2] == (2, 0)


def test_the_plan_is_that_of_the_prefix_alone():
    """A long suffix does not make compute leave the prefix to the link, because it cannot start before."""
    plugin, embedded = make_system("cacheflow").restore, make_system(EMBEDDED).restore
    short, long = (equal_blocks(num_chunks=12, suffix_s=suffix_s) for suffix_s in (0.01, 0.3))
    assert plugin.plan(long).levels_K == plugin.plan(short).levels_K
    assert sum(embedded.plan(long).levels_K) < sum(embedded.plan(short).levels_K)
    planned = plugin.plan(long).predicted
    assert planned.ttft_s == pytest.approx(planned.restore_s + long.suffix_s)


@pytest.mark.parametrize(("cell_s", "left"), [(0.01, False), (1e-4, True)])
def test_what_costs_more_engine_steps_than_it_saves_is_left_to_vllm(cell_s, left):
    problem = equal_blocks(cell_s=cell_s, suffix_s=cell_s)
    problem = replace(problem, prefill_s=problem.recompute_s + problem.suffix_s)
    system = make_system("cacheflow")
    plan = system.restore.plan(problem)
    assert plan.guard is not None
    saved_s = plan.guard.without_loading_s - plan.predicted.restore_s
    assert saved_s > 0
    assert (saved_s < STEP_OVERHEAD_S) is left
    assert (plan.guard.choice is Choice.PREFILL) is left
    assert system.leaves_to_prefill(problem) is left
    assert not make_system(EMBEDDED).leaves_to_prefill(problem)
