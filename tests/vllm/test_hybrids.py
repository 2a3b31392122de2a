"""Models with recurrent layers (Gated DeltaNet) in an engine: restored, and equal to never forgotten, bit for bit.

Keys, values, running states, tokens and log-probabilities are compared. The weights are random and the
recurrent layers forget slowly: an error in a state shows long after.
"""

import time

import numpy as np
import pytest

from cacheflow.stores.faults import Fault, FaultRule
from cacheflow.stores.keys import ObjectKind
from support.faulty_store import inject
from support.fixed_staircase import planned
from support.hybrid_engines import (
    CHUNK,
    DEEP,
    END,
    MIXED,
    PROMPT,
    ROWS,
    WISHES,
    assert_a_wrong_state_shows,
    assert_equal,
    assert_equal_beside_others,
    hybrid_engine,
    is_likely,
    nothing_lost,
    prompt,
    restored,
)
from support.v2_runner import first_runner

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_CHUNKS = END // CHUNK


@pytest.fixture(scope="module")
def started(tmp_path_factory, _single_process_vllm):
    from support.random_weights import model_folder

    folder = model_folder(tmp_path_factory.mktemp("hybrids") / "qwen3_next", "qwen3_next", **DEEP)
    with hybrid_engine(folder) as engine:
        yield engine


@pytest.fixture
def engine(started):
    """The engine with nothing cached and no faults; afterwards no block of it is lost."""
    with nothing_lost(started):
        yield started


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_both_ways_at_once(engine, ratio):
    tokens = prompt(1)
    own = engine.saved(tokens, **WISHES)
    again = restored(engine, tokens, ratio=ratio)
    assert again.record["end"] == END
    assert again.record["loaded_cells"] + again.record["recomputed_cells"] == NUM_CHUNKS * ROWS
    assert_equal(again, own)


STAIRCASES = [
    (3, 3, 3, 3, 0, 0, 0, 0),
    (3, 3, 3, 2, 0, 0, 0, 0),
    (3, 3, 2, 2, 1, 1, 0, 0),
    (3, 2, 2, 2, 2, 1, 1, 1),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (3, 3, 3, 3, 3, 3, 3, 2),
    (3, 3, 3, 3, 3, 3, 3, 3),
    (0, 0, 0, 0, 0, 0, 0, 0),
]
"""Rows of each chunk that are recomputed: whole chunks, one that is shared by rows, rows of which nothing is read where
the prefix ends, all, none."""


def bytes_read(engine, levels_K):
    """Of the keys and values above a staircase, and of the states of rows that are not recomputed to the end."""
    kv_bytes = [engine.layout.num_bytes(row, row + 1, 1) for row in range(ROWS)]
    state_bytes = engine.worker.facts.state_bytes_B
    return sum(sum(kv_bytes[level:]) for level in levels_K) + sum(state_bytes[levels_K[-1] :])


@first_runner
@pytest.mark.parametrize("kv_only_top", [False, True])
@pytest.mark.parametrize("levels_K", STAIRCASES, ids=lambda levels_K: "".join(map(str, levels_K)))
def test_a_staircase(engine, levels_K, kv_only_top):
    """As planned, with nothing left to chance; a row that is recomputed to the end needs no states from the store."""
    tokens = prompt(30)
    own = engine.saved(tokens, **WISHES)
    with planned(engine, *levels_K, kv_only_top=kv_only_top) as staircase:
        again = engine.ask(tokens, **WISHES)
    assert again.record["cells"] == staircase.cells(ROWS)
    assert again.record["loaded_bytes"] == bytes_read(engine, levels_K)
    assert_equal(again, own)


@pytest.mark.parametrize(
    ("more", "end"),
    [
        pytest.param(0, END - CHUNK, marks=first_runner),
        (1, END),
        *(pytest.param(*each, marks=first_runner) for each in ((6, END), (CHUNK, END), (CHUNK + 1, END + CHUNK))),
    ],
)
def test_prompts_that_end_with_a_block_or_right_after(engine, more, end):
    """The last token is computed for its logits, and the states come to stand before it."""
    tokens = prompt(1000 + more, END + more)
    own = engine.saved(tokens, **WISHES)
    with planned(engine, *sorted([ROWS, 1, *MIXED], reverse=True)[: end // CHUNK]) as staircase:
        again = engine.ask(tokens, **WISHES)
    assert again.record["end"] == end
    assert again.record["cells"] == staircase.cells(ROWS)
    assert_equal(again, own)


def test_by_loading_alone(engine):
    tokens = prompt(2)
    own = engine.saved(tokens, **WISHES)
    again = engine.ask(tokens, params={"cacheflow": "load"}, **WISHES)
    assert again.record["recomputed_cells"] == 0
    kv_bytes = engine.layout.num_bytes(0, ROWS, END // CHUNK)
    assert again.record["loaded_bytes"] == kv_bytes + engine.states.num_bytes(0, 1)
    assert_equal(again, own)


def test_all_recomputed(engine):
    """The store has lost all of it since it was asked."""
    tokens = prompt(3)
    own = engine.saved(tokens, **WISHES)
    inject(engine, FaultRule(fault=Fault.MISS))
    again = restored(engine, tokens, ratio=1.0)
    assert again.record["loaded_cells"] == 0
    assert again.record["outcome"] == "done"
    assert_equal(again, own)


def lost(engine, tokens, kind, *, chunk, row):
    """One object that cannot be read any more."""
    from cacheflow.stores.keys import RankKeys, chain_hashes

    hashes = chain_hashes(tokens, list(range(CHUNK, END + 1, CHUNK)))
    name = engine.side.identity.namespace(None), hashes[chunk].hex(), (row, row + 1)
    key = RankKeys().states(*name) if kind is ObjectKind.STATE else RankKeys().kv(*name)
    return FaultRule(fault=Fault.MISS, matches=lambda each: each == key)


LAST = NUM_CHUNKS - 1


@pytest.mark.parametrize("row", [0, *(pytest.param(row, marks=first_runner) for row in range(1, ROWS))])
def test_a_lost_state(engine, row):
    """Its row is recomputed to the end, with all below it."""
    tokens = prompt(4)
    own = engine.saved(tokens, **WISHES)
    inject(engine, lost(engine, tokens, ObjectKind.STATE, chunk=LAST, row=row))
    again = restored(engine, tokens, ratio=0.5)
    assert again.record["failed_loads"]["miss"] == 1
    assert again.record["outcome"] == "done"
    assert all("l" not in column[: row + 1] for column in again.record["cells"])
    assert_equal(again, own)


@pytest.mark.parametrize(
    ("chunk", "row"), [(2, 1), *(pytest.param(*each, marks=first_runner) for each in ((3, 0), (6, 2), (LAST, 1)))]
)
def test_lost_keys_and_values(engine, chunk, row):
    tokens = prompt(5)
    own = engine.saved(tokens, **WISHES)
    inject(engine, lost(engine, tokens, ObjectKind.KV, chunk=chunk, row=row))
    again = restored(engine, tokens, ratio=0.5)
    assert again.record["outcome"] == "done"
    assert_equal(again, own)


@first_runner
def test_an_end_short_of_what_is_saved(engine):
    """Where two prompts part there is no state at first: the second leaves one, and the third is restored to it."""
    first, second, third = (prompt(6)[:900] + prompt(seed, 250) for seed in (6, 7, 8))
    engine.saved(first, **WISHES)
    seconds = engine.ask(second, **WISHES)
    assert seconds.records == []
    assert "running states are stored at the end of" in seconds.params["cacheflow_reason"]
    own = engine.own(third, **WISHES)
    again = restored(engine, third, ratio=1.0)
    assert again.record["end"] == 896
    assert_equal(again, own)


@first_runner
def test_what_vllm_has_itself_is_gone_on_from(engine):
    tokens = prompt(9)
    own = engine.saved(tokens, **WISHES)
    engine.ask(tokens[:800], params={"cacheflow": "off"}, num_tokens=1)
    again = restored(engine, tokens, ratio=1.0)
    assert again.record["start"] == 768
    assert_equal(again, own)


@pytest.mark.parametrize(
    "levels_K", [(2, 1), *(pytest.param(each, marks=first_runner) for each in ((3, 3), (3, 0), (0, 0)))], ids=str
)
def test_a_staircase_after_what_vllm_has_itself(engine, levels_K):
    tokens, start = prompt(32), END - 2 * CHUNK
    own = engine.saved(tokens, **WISHES)
    engine.ask(tokens[: start + 32], params={"cacheflow": "off"}, num_tokens=1)
    with planned(engine, *levels_K) as staircase:
        again = engine.ask(tokens, **WISHES)
    assert again.record["start"] == start
    assert again.record["cells"] == staircase.cells(ROWS)
    assert_equal(again, own)


@first_runner
def test_what_vllm_has_without_states_is_gone_on_from_by_loading(engine, monkeypatch):
    """Those that the store holds there are not read for it."""
    from cacheflow.vllm.local_states import LocalStates

    tokens = prompt(33)
    own = engine.saved(tokens, **WISHES)
    engine.saved(tokens[:800])
    engine.ask(tokens[:800], params={"cacheflow": "off"}, num_tokens=1)
    monkeypatch.setattr(LocalStates, "hold", lambda *args: False)
    again = restored(engine, tokens, ratio=4.0)
    assert (again.record["start"], again.record["end"]) == (768, END)
    assert again.record["recomputed_cells"] == 0
    assert_equal(again, own)


def gone_on_under_pressure(engine, tokens):
    """Restored after 768 tokens that vLLM has; once blocks are set aside for it, another uses all that are free."""
    engine.ask(tokens[:800], params={"cacheflow": "off"}, num_tokens=1)
    pool, connector = engine.scheduler.kv_cache_manager.block_pool, engine.connector
    set_aside = connector.update_state_after_alloc

    def then_another_comes_and_goes(*args):
        set_aside(*args)
        free = pool.get_new_blocks(pool.get_num_free_blocks())
        engine.poison([block.block_id for block in free])
        pool.free_blocks(free)

    with planned(engine, 3, 1) as staircase, pytest.MonkeyPatch.context() as patch:
        patch.setattr(connector, "update_state_after_alloc", then_another_comes_and_goes)
        again = engine.ask(tokens, **WISHES)
    assert again.record["start"] == 768
    assert again.record["cells"] == staircase.cells(ROWS)
    return again


@first_runner
def test_states_that_vllm_has_are_not_evicted_while_something_goes_on_from_them(engine):
    tokens = prompt(34)
    own = engine.saved(tokens, **WISHES)
    assert_equal(gone_on_under_pressure(engine, tokens), own)


@first_runner
def test_states_that_are_not_held_are_evicted(engine, monkeypatch):
    """Negative control: the same, but that vLLM does not learn that the blocks are held."""
    from cacheflow.vllm.local_states import LocalStates

    tokens, pool = prompt(34), engine.scheduler.kv_cache_manager.block_pool
    own = engine.saved(tokens, **WISHES)

    def unknown_to_vllm(method):
        def instead(*args):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pool, "touch", lambda blocks: None)
                patch.setattr(pool, "free_blocks", lambda blocks: None)
                return method(*args)

        return instead

    for name in ("hold", "release"):
        monkeypatch.setattr(LocalStates, name, unknown_to_vllm(getattr(LocalStates, name)))
    again = gone_on_under_pressure(engine, tokens)
    assert not np.array_equal(again.kv, own.kv)
    assert not np.array_equal(again.states, own.states)


def test_a_failure_in_the_middle_is_computed_by_vllm(engine, monkeypatch):
    tokens = prompt(10)
    own = engine.saved(tokens, **WISHES)
    from cacheflow.vllm.models.partial_forward import PartialForward

    run, calls = PartialForward.run, []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return run(*args, **kwargs)

    monkeypatch.setattr(PartialForward, "run", failing)
    with planned(engine, *MIXED):
        again = engine.ask(tokens, **WISHES)
    assert len(calls) >= 2
    assert again.record["outcome"] == "failed"
    assert_equal(again, own)


def test_two_at_once(engine):
    prompts = [prompt(11), prompt(12)]
    owns = [engine.saved(tokens, **WISHES) for tokens in prompts]
    with planned(engine, *MIXED) as staircase:
        names = [engine.submit(tokens, **WISHES) for tokens in prompts]
        engine.run()
    for name, tokens, own in zip(names, prompts, owns, strict=True):
        assert engine.answers[name].record["cells"] == staircase.cells(ROWS)
        assert_equal_beside_others(engine, tokens, engine.answers[name], own)


@first_runner
def test_the_same_prompt_at_once_and_later_is_restored_once(engine):
    """VLLM's own cache keeps the states where a restored prefix ends, also within a prompt."""
    first = prompt(20)
    own = engine.saved(first, **WISHES)
    longer = first[:END] + prompt(21, 300)
    engine.balance_link(PROMPT, ratio=1.0)
    names = [engine.submit(tokens, **WISHES) for tokens in (longer, first)]
    engine.run()
    # The one of which the store answers first.
    [record] = [record for name in names for record in engine.answers[name].records]
    assert record["end"] == END
    later = engine.ask(first[:END] + prompt(22, 300), **WISHES)
    assert later.records == []
    assert "of 1324 tokens 1024 are in the KV cache" in later.params["cacheflow_reason"]
    assert_equal_beside_others(engine, first, engine.answers[names[1]], own)


@first_runner
def test_beside_a_request_that_decodes(engine):
    tokens = prompt(13)
    own = engine.saved(tokens, **WISHES)
    engine.balance_link(PROMPT, ratio=1.0)
    other = engine.submit(prompt(14, 300), num_tokens=64, params={"cacheflow": "off"})
    engine.run(until=lambda: len(engine.answers[other].tokens) > 4)
    with planned(engine, *MIXED) as staircase:
        again = engine.ask(tokens, **WISHES)
    assert again.record["cells"] == staircase.cells(ROWS)
    assert_equal_beside_others(engine, tokens, again, own)
    assert is_likely(engine, prompt(14, 300), engine.answers[other].tokens)


def all_have_begun(engine, names):
    """Whether each has a few tokens. Steps wait a little meanwhile, or one might end before the other's reads do."""
    num_tokens = [len(engine.answers[name].tokens) for name in names]
    if min(num_tokens) <= 4 < max(num_tokens):
        time.sleep(0.1)
    return min(num_tokens) > 4


@pytest.mark.parametrize(
    ("seeds", "num_tokens"),
    [pytest.param((15,), 12, id="alone"), pytest.param((35, 36), 50, marks=first_runner, id="two")],
)
def test_preempted_and_restored_again(engine, seeds, num_tokens):
    prompts = [prompt(seed) for seed in seeds]
    owns = [engine.saved(tokens, num_tokens=2) for tokens in prompts]
    with planned(engine, *MIXED) as staircase:
        names = [engine.submit(tokens, num_tokens=num_tokens) for tokens in prompts]
        engine.run(until=lambda: all_have_begun(engine, names))
        requests = [engine.request(name) for name in names]
        decoded = [list(engine.answers[name].tokens) for name in names]
        engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.poison()
        found = {}
        while engine.busy:
            engine.step()
            for name, request in zip(names, requests, strict=True):
                if name not in found and request.num_computed_tokens > END:
                    kv, states = engine.block_ids(name)[:NUM_CHUNKS], engine.state_blocks(name, END)
                    found[name] = engine.gather(kv), engine.gather_states(states)
    assert [request.num_preemptions for request in requests] == [1] * len(seeds)
    for name, own in zip(names, owns, strict=True):
        assert [record["cells"] for record in engine.answers[name].records] == [staircase.cells(ROWS)] * 2
        assert np.array_equal(found[name][0], own.kv)
        assert np.array_equal(found[name][1], own.states)
    for name, tokens, begun in zip(names, prompts, decoded, strict=True):
        reply = engine.answers[name].tokens
        assert reply[: len(begun)] == begun
        assert is_likely(engine, tokens, reply)
        if len(prompts) == 1:  # every step to itself: then to the token, what was decoded before coming with the prompt
            assert reply[len(begun) :] == engine.own(tokens + begun, num_tokens=num_tokens - len(begun)).tokens


@first_runner
def test_preempted_after_its_answer_has_outgrown_the_prompt(engine):
    """It is restored to the last chunk that it decoded itself, of which the states are written as it is preempted."""
    end = 3 * CHUNK
    engine.balance_link(PROMPT, ratio=0.01)
    name = engine.submit(prompt(23, CHUNK + 100), num_tokens=2 * CHUNK)
    engine.run(until=lambda: engine.request(name).num_computed_tokens >= end)
    states = engine.gather_states(engine.state_blocks(name, end))
    kv = engine.gather(engine.block_ids(name)[:3])
    engine.run(until=lambda: len(engine.answers[name].tokens) > CHUNK + 60)
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.poison()
    engine.run(until=lambda: engine.request(name).num_computed_tokens > end)
    assert np.array_equal(engine.gather(engine.block_ids(name)[:3]), kv)
    assert np.array_equal(engine.gather_states(engine.state_blocks(name, end)), states)
    engine.run()
    assert engine.answers[name].record["end"] == end


def test_a_reply_is_restored_up_to_its_last_chunk(engine):
    """The next turn of a chat: states that only decoding passed are written when the reply ends."""
    first, end = prompt(16, END + CHUNK - 10), END + CHUNK
    name = engine.submit(first, num_tokens=20)
    engine.run(until=lambda: engine.request(name).num_computed_tokens >= end)
    states = engine.gather_states(engine.state_blocks(name, end))
    kv = engine.gather(engine.block_ids(name)[: end // CHUNK])
    engine.run()
    turn = first + engine.answers[name].tokens + prompt(17, 60)
    engine.ask(prompt(18, 20), num_tokens=1, params={"cacheflow": "off"})  # vLLM tells workers of ends a step later
    engine.evict()
    again = engine.ask(turn, params={"cacheflow": "load"}, **WISHES)
    assert again.record["end"] == end == (len(turn) - 1) // CHUNK * CHUNK
    assert np.array_equal(again.kv, kv)
    assert np.array_equal(again.states, states)


@first_runner
@pytest.mark.parametrize("wrong", ["none", "of an earlier chunk", "a little"])
def test_a_wrong_state_shows(engine, wrong):
    tokens = prompt(19)
    own = engine.own(tokens, **WISHES)
    assert_a_wrong_state_shows(engine, tokens, own, wrong, end=END, step=2 * CHUNK)
