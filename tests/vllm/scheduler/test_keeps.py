"""Prefixes that requests ask to keep: what they may ask for, what workers are told, and what ends it."""

import pytest

pytest.importorskip("torch")

from cacheflow.stores.keys import Shard
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.scheduler.keeps import MAX_KEPT, Keeps
from cacheflow.vllm.scheduler.request_params import Keep, KeepLimits, Mode, RequestParams
from cacheflow.vllm.scheduler.view import ScheduledRequest
from cacheflow.vllm.step import NOTHING
from support.manual_clock import ManualClock
from support.scheduler_cases import CHUNK, LAYERS, NAMESPACE, Case, facts, tokens

pytestmark = pytest.mark.torch

MINUTE = Keep(keep_s=60.0)
TOOL = Keep(keep_s=30.0, until_next=True)
END = Keep(keep_s=0.0)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def keeps(clock):
    return Keeps([facts().objects], clock=clock)


def ended(keeps, chunks, asked=None, namespace=NAMESPACE):
    """``(chunks, seconds)`` of what workers are told; a letter is a chunk."""
    return [("".join(each.chain_hashes), each.keep_s) for each in keeps.request_ended(namespace, tuple(chunks), asked)]


def test_a_prefix_is_kept_for_as_long_as_was_asked(keeps):
    assert ended(keeps, "abc", MINUTE) == [("abc", 60.0)]
    assert ended(keeps, "abcd") == [], "seconds are kept whatever comes"
    assert ended(keeps, "", MINUTE) == [], "no whole chunk"


def test_the_next_request_on_the_prefix_ends_a_tools_keep(keeps):
    assert ended(keeps, "abc", TOOL) == [("abc", 30.0)]
    assert ended(keeps, "ab") == [], "another prompt that begins like it"
    assert ended(keeps, "abx") == []
    assert ended(keeps, "abcd") == [("abc", 0.0)]
    assert keeps.empty
    assert ended(keeps, "abcd") == []


def test_or_renews_it(keeps):
    ended(keeps, "abc", TOOL)
    assert ended(keeps, "abcd", TOOL) == [("abcd", 30.0)], "nothing is let go of in between"
    assert ended(keeps, "abcde") == [("abcd", 0.0)]


def test_what_others_keep_too_stays(keeps):
    ended(keeps, "abc", TOOL)
    ended(keeps, "abx", TOOL)
    assert ended(keeps, "abcd") == [("c", 0.0)]
    assert ended(keeps, "abxd") == [("abx", 0.0)]


def test_nothing_seconds_end_all_that_is_kept_of_the_prefix(keeps):
    ended(keeps, "ab", MINUTE)
    ended(keeps, "abc", TOOL)
    ended(keeps, "abz", MINUTE)
    assert ended(keeps, "abcd", END) == [("c", 0.0)], "abz is another conversation's"
    assert ended(keeps, "abz", END) == [("abz", 0.0)]


def test_another_namespace_or_tenant_ends_nothing(keeps):
    ended(keeps, "abc", TOOL)
    assert ended(keeps, "abcd", END, namespace="f" * 32) == []
    assert not keeps.empty


def test_what_is_over_is_forgotten(keeps, clock):
    ended(keeps, "abc", TOOL)
    ended(keeps, "abx", MINUTE)
    clock.now_s += 30.0
    assert ended(keeps, "abcd") == [], "it ended by itself"
    clock.now_s += 30.0
    ended(keeps, "q")
    assert keeps.empty


def test_the_same_prefix_kept_twice_is_kept_until_the_later_end(keeps, clock):
    ended(keeps, "abc", MINUTE)
    clock.now_s += 50.0
    ended(keeps, "abc", Keep(keep_s=1.0))
    clock.now_s += 5.0
    assert ended(keeps, "abc", END) == [("abc", 0.0)]


def test_what_is_remembered_is_bounded(keeps):
    for number in range(MAX_KEPT + 5):
        keeps.request_ended(NAMESPACE, (f"{number}",), TOOL)
    assert keeps.request_ended(NAMESPACE, ("0",), None) == []
    assert keeps.request_ended(NAMESPACE, (f"{MAX_KEPT}",), None)


# The scheduler side


def options(**changes):
    return ConnectorOptions(**{"chunk_tokens": CHUNK, "lookup_timeout_s": 20.0, "explain": True, **changes})


def test_a_request_that_ended_is_kept_with_its_answer_on_every_rank():
    ranks = tuple(facts(shard=Shard(tp_rank=rank, tp_size=2)) for rank in (0, 1))
    case = Case(facts_by_rank=ranks)
    prompt = tokens(2 * CHUNK + 5)
    case.arrive("a", prompt, params={"keep": 120})
    assert case.matched("a") == 0
    prompt += tokens(CHUNK, seed=1)  # the answer
    case.step(ScheduledRequest("a", len(prompt)), busy=1)
    case.side.finished("a")
    (keep,) = case.step().keeps
    assert (len(keep.chain_hashes), keep.keep_s) == (3, 120.0)
    names = [key.name for rank in keep.objects for key in rank.kv(keep.namespace, keep.chain_hashes[0])]
    assert len(set(names)) == 2 * LAYERS
    assert case.step() is NOTHING


@pytest.mark.parametrize(("asked", "keep_s"), [("tool", 45.0), (3600, 3600.0), (0.5, 0.5), (0, None), (None, None)])
def test_what_a_request_may_ask_for(asked, keep_s):
    case = Case(options=options(keep_tool_s=45.0))
    case.arrive("a", tokens(2 * CHUNK), params={"keep": asked})
    answer = case.side.finished("a")
    assert "cacheflow_error" not in answer
    assert [each.keep_s for each in case.step().keeps] == ([] if keep_s is None else [keep_s])


@pytest.mark.parametrize("asked", ["tools", "120", -1, 3601, float("nan"), float("inf"), True, False, [], {"s": 1}])
def test_what_it_may_not_is_answered_and_keeps_nothing(asked):
    case = Case()
    case.arrive("a", tokens(2 * CHUNK), params={"keep": asked})
    answer = case.side.finished("a")
    assert "must be 'tool' or seconds, from 0 to 3600" in answer["cacheflow_error"]
    assert case.step() is NOTHING


def test_what_is_not_saved_is_not_kept():
    case = Case()
    case.arrive("a", tokens(2 * CHUNK), params={"keep": 60, "cacheflow": "off"})
    assert "nothing to keep" in case.side.finished("a")["cacheflow_error"]
    assert case.step() is NOTHING


def test_a_tool_that_answers_ends_the_keep_of_its_own_tenant_alone():
    case, prompt = Case(), tokens(2 * CHUNK)
    for name, salt, params in (("a", "one", {"keep": "tool"}), ("b", "two", None), ("c", "", None), ("d", "one", None)):
        case.arrive(name, prompt, salt=salt, params=params)
    case.side.finished("a")
    (kept,) = case.step().keeps
    for name in ("b", "c"):
        case.side.finished(name)
        assert case.step() is NOTHING
    case.side.finished("d")
    (freed,) = case.step().keeps
    assert (freed.chain_hashes, freed.keep_s) == (kept.chain_hashes, 0.0)


@pytest.mark.parametrize(
    ("name", "meant"), [("keep_s", "keep"), ("max_load_token", "max_load_tokens"), ("explian", "explain")]
)
def test_a_key_that_is_nearly_one_is_named(name, meant):
    params = RequestParams.of({name: 30, "cacheflow": "load"}, KeepLimits())
    assert params.complaint == f"{name} is no key of CacheFlow's: {meant} is"
    assert params.mode is Mode.LOAD


def test_keys_of_other_connectors_are_left_alone():
    others = ("do_remote_decode", "do_remote_prefill", "remote_engine_id", "remote_block_ids", "transfer_id", "lmcache")
    assert RequestParams.of(dict.fromkeys((*others, "keep" * 1000), 1), KeepLimits()).complaint == ""
