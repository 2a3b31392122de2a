"""Generated sessions have the published figures, and are sessions: chained, growing, sharing what they began with."""

import itertools
from collections import defaultdict
from functools import cache

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.workloads.arrivals import Bursts, Poisson, Uniform
from cacheflow.workloads.distributions import Geometric, LogNormal
from cacheflow.workloads.sessions import (
    CODING_AGENT,
    LMSYS_CHAT,
    PROFILES,
    SWE_BENCH,
    WILDCHAT,
    SessionProfile,
    generate_sessions,
)
from cacheflow.workloads.statistics import describe


@cache
def sample(profile, num_sessions, block_tokens=512):
    return tuple(
        generate_sessions(
            profile, num_sessions=num_sessions, arrivals=Poisson(0.1), seed=11, block_tokens=block_tokens
        )
    )  # fmt: skip


def by_session(requests):
    sessions = defaultdict(list)
    for request in requests:
        sessions[request.session_id].append(request)
    return sessions


def test_lmsys_chat_has_the_published_means():
    statistics = describe(sample(LMSYS_CHAT, 20_000))
    assert statistics.count / 20_000 == pytest.approx(2.0, rel=0.02)
    assert statistics.input_tokens.mean == pytest.approx(462, rel=0.05)
    assert statistics.output_tokens.mean == pytest.approx(210, rel=0.05)


def test_wildchat_has_the_published_means():
    requests = sample(WILDCHAT, 20_000)
    assert len(requests) / 20_000 == pytest.approx(2.54, rel=0.02)
    assert describe(requests).output_tokens.mean == pytest.approx(441.34, rel=0.05)
    firsts = [request.input_tokens for request in requests if request.after is None]
    # A deviation of five times the mean: the mean of 20,000 is itself good to 4 % only.
    assert np.mean(firsts) == pytest.approx(295.58, rel=0.12)


def test_swe_bench_has_the_published_percentiles():
    # Many sessions: the 99th percentile is made by few of them.
    statistics = describe(sample(SWE_BENCH, 6_000))
    assert statistics.input_tokens.p50 == pytest.approx(3_992, rel=0.15)
    assert statistics.input_tokens.p90 == pytest.approx(13_179, rel=0.15)
    assert statistics.input_tokens.p99 == pytest.approx(39_793, rel=0.25)
    assert 10 < statistics.count / 6_000 < 30
    assert describe(sample(SWE_BENCH, 600, 64)).reusable_share == pytest.approx(0.94, abs=0.03)


def test_coding_agents_have_the_published_percentiles():
    requests = sample(CODING_AGENT, 1_000)
    statistics = describe(requests)
    assert statistics.input_tokens.p50 == pytest.approx(101_495, rel=0.15)
    assert statistics.input_tokens.p90 == pytest.approx(210_539, rel=0.15)
    assert statistics.input_tokens.p99 == pytest.approx(507_924, rel=0.25)
    assert statistics.reusable_share == pytest.approx(0.96, abs=0.02)
    sessions = by_session(requests).values()
    assert np.median([len(turns) for turns in sessions]) == pytest.approx(44, rel=0.15)
    grown = [
        later.input_tokens - earlier.input_tokens for turns in sessions for earlier, later in itertools.pairwise(turns)
    ]
    assert np.median([tokens for tokens in grown if tokens > 0]) == pytest.approx(734, rel=0.25)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_turns_are_chained_and_build_on_each_other(profile):
    requests = sample(profile, 60, 64)
    assert [request.request_id for request in requests] == list(range(len(requests)))
    assert [request.arrival_s for request in requests] == sorted(request.arrival_s for request in requests)
    sessions = by_session(requests)
    assert len(sessions) == 60
    anew = turns_checked = 0
    for turns in sessions.values():
        assert turns[0].after is None
        assert turns[0].delay_s == 0
        for earlier, later in itertools.pairwise(turns):
            assert later.after == earlier.request_id
            assert later.arrival_s == pytest.approx(earlier.arrival_s + later.delay_s)
            # The answer is no part of the shared run, so only the earlier prompt's whole blocks are; where a prompt
            # would have been too long, the session began anew behind the common tokens.
            whole, common = earlier.input_tokens // 64, profile.common_tokens // 64
            same = sum(a == b for a, b in zip(earlier.block_ids, later.block_ids, strict=False))
            assert same == whole or (profile.compacts and same == common)
            anew += same != whole
            turns_checked += 1
            assert same == whole or not set(later.block_ids[same:]) & set(earlier.block_ids)
            assert later.input_tokens > earlier.input_tokens + earlier.output_tokens or same != whole
    # Published sessions begin anew in 170 of 22,546 turns.
    assert anew <= 0.05 * turns_checked


def test_sessions_share_the_common_tokens_and_nothing_else():
    sessions = list(by_session(sample(CODING_AGENT, 60, 64)).values())
    common = CODING_AGENT.common_tokens // 64
    for a, b in itertools.combinations(sessions[:10], 2):
        assert a[0].block_ids[:common] == b[0].block_ids[:common]
        of_a, of_b = (set(itertools.chain(*(turn.block_ids for turn in turns))) for turns in (a, b))
        assert len(of_a & of_b) == common


TEN_A_TURN = {
    "turns": LogNormal(median=5, sigma=0), "first_tokens": LogNormal(median=100, sigma=0),
    "new_tokens": LogNormal(median=10, sigma=0), "output_tokens": LogNormal(median=20, sigma=0),
    "delay_s": LogNormal(median=3, sigma=0), "context_tokens": LogNormal(median=10_000, sigma=0),
}  # fmt: skip


def lengths(profile, **options):
    requests = generate_sessions(
        profile, num_sessions=1, arrivals=Uniform(1.0), seed=0, block_tokens=10, **options
    )  # fmt: skip
    return [request.input_tokens for request in requests]


def test_a_prompt_is_the_one_before_its_answer_and_what_is_new():
    assert lengths(SessionProfile(name="p", **TEN_A_TURN)) == [100, 130, 160, 190, 220]


def test_at_the_limit_a_chat_ends_and_an_agent_begins_anew():
    assert lengths(SessionProfile(name="p", **TEN_A_TURN), max_tokens=160) == [100, 130, 160]
    agent = SessionProfile(name="p", common_tokens=30, compacts=True, **TEN_A_TURN)
    assert lengths(agent, max_tokens=165) == [130, 160, 130, 160, 130]
    assert lengths(agent, max_tokens=120) == [120] * 5
    first, _, anew, *_ = generate_sessions(
        agent, num_sessions=1, arrivals=Uniform(1.0), seed=0, block_tokens=10, max_tokens=165
    )
    assert anew.block_ids[:3] == first.block_ids[:3]
    assert not set(anew.block_ids[3:]) & set(first.block_ids)


def test_one_seed_one_trace_and_arrivals_do_not_change_the_sessions():
    def lengths_by_session(arrivals, seed):
        requests = generate_sessions(LMSYS_CHAT, num_sessions=50, arrivals=arrivals, seed=seed)
        return {
            name: [(turn.input_tokens, turn.output_tokens, turn.delay_s) for turn in turns]
            for name, turns in by_session(requests).items()
        }

    assert list(generate_sessions(LMSYS_CHAT, num_sessions=50, arrivals=Poisson(1.0), seed=3)) == list(
        generate_sessions(LMSYS_CHAT, num_sessions=50, arrivals=Poisson(1.0), seed=3)
    )
    assert lengths_by_session(Poisson(1.0), 3) == lengths_by_session(Bursts(9.0, 5), 3)
    assert lengths_by_session(Poisson(1.0), 3) != lengths_by_session(Poisson(1.0), 4)


def test_without_a_number_of_sessions_there_is_no_end():
    requests = generate_sessions(LMSYS_CHAT, num_sessions=None, arrivals=Poisson(1.0), seed=3)
    assert len(list(itertools.islice(requests, 500))) == 500


def test_impossible_wishes_are_refused():
    for options, said in (
        ({"num_sessions": 0}, "num_sessions 0 must be 1 or more"),
        ({"num_sessions": 1, "block_tokens": 0}, "block_tokens 0 must be 1 or more"),
        ({"num_sessions": 1, "max_tokens": 17_217}, "max_tokens 17217 must be more than the 17217 tokens"),
    ):
        with pytest.raises(ConfigError, match=said):
            generate_sessions(CODING_AGENT, arrivals=Poisson(1.0), seed=0, **options)


def test_distributions_have_the_figures_they_are_made_of():
    rng = np.random.Generator(np.random.PCG64(5))
    tail = LogNormal.of_percentiles(p50=10.0, p90=169.0)
    drawn = [tail.sample(rng) for _ in range(50_000)]
    assert np.percentile(drawn, (50, 90)) == pytest.approx([10, 169], rel=0.05)
    known = LogNormal.of_mean(441.0, deviation=411.0)
    drawn = [known.sample(rng) for _ in range(50_000)]
    assert known.mean == pytest.approx(441.0)
    assert (np.mean(drawn), np.std(drawn)) == pytest.approx((441, 411), rel=0.05)
    counts = [Geometric(2.5).sample(rng) for _ in range(50_000)]
    assert min(counts) == 1
    assert np.mean(counts) == pytest.approx(2.5, rel=0.03)
    for make in (lambda: LogNormal(0.0, 1.0), lambda: LogNormal(1.0, -1.0), lambda: Geometric(0.5)):
        with pytest.raises(ConfigError):
            make()
