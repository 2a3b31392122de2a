"""Models with recurrent layers on the scheduler side: where a prefix ends, what is read, and where states are saved."""

import time
from dataclasses import replace

import numpy as np
import pytest

from cacheflow.stores.base import PutRequest
from cacheflow.stores.keys import RankKeys
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.scheduler.checkpoints import CheckpointDue, RequestCheckpoints
from cacheflow.vllm.scheduler.stage_planner import PlanSpan, StagePlanner
from cacheflow.vllm.scheduler.view import RequestView, ScheduledRequest, TargetStates
from support.scheduler_cases import BLOCK, CHUNK, SHAPE, Case, Worker, facts, tokens

STATE_BYTES = (100, 0, 300, 50)
"""Of each row; one has no recurrent layer."""
RECURRENT = (facts(row_state_bytes=STATE_BYTES),)
STATES = TargetStates(blocks=(7, 8))


def options(**changes):
    return ConnectorOptions(chunk_tokens=CHUNK, lookup_timeout_s=20.0, explain=True, policy="cake", **changes)


def case(**changes):
    return Case(options=options(**changes), facts_by_rank=RECURRENT)


def hold_states(case, request_id, *chunks, rows=(0, 2, 3)):
    """Put running states at the end of some chunks of a known request into the store."""
    request = case.side.requests[request_id]
    for chunk in chunks:
        (name,) = request.prefix.chain_hashes(chunk, chunk + 1)
        keys = [RankKeys().states(request.name.namespace, name, (row, row + 1)) for row in rows]
        puts = [PutRequest(key, [np.zeros(8, np.uint8)], shape=(8,), dtype="uint8") for key in keys]
        case.store.submit_put(puts).wait(20)


def stored(case, count, num_chunks, *checkpoints, **kwargs):
    """A prompt whose first chunks are in the store, with states at the end of some of them."""
    prompt = tokens(count)
    case.arrive("earlier", prompt)
    case.hold("earlier", num_chunks)
    hold_states(case, "earlier", *checkpoints, **kwargs)
    case.side.finished("earlier")
    return prompt


@pytest.mark.parametrize(
    ("num_chunks", "checkpoints", "end"),
    [(6, (5,), 6), (6, (1, 3), 4), (3, (1, 5), 2), (6, (), 0), (6, (6,), 0), (0, (2,), 0)],
)
def test_a_prefix_ends_where_states_are_stored(num_chunks, checkpoints, end):
    made = case()
    prompt = stored(made, 7 * CHUNK + 5, num_chunks, *checkpoints)
    made.arrive("r", prompt)
    assert made.matched("r") == end * CHUNK


def test_the_last_token_is_computed():
    made = case()
    made.arrive("r", stored(made, 4 * CHUNK, 4, 2, 3))
    assert made.matched("r") == 3 * CHUNK


def test_states_of_every_row_are_asked_for():
    made = case()
    made.arrive("r", stored(made, 4 * CHUNK + 5, 4, 3, rows=(0, 3)))
    assert made.matched("r") == 0
    answer = made.side.finished("r")
    assert "running states are stored at the end of 0 chunks" in answer["cacheflow_reason"]


def test_what_is_loaded_at_the_end_brings_the_states():
    planner = StagePlanner(RECURRENT[0])
    span = PlanSpan(start=0, end=3 * CHUNK, chunk_tokens=CHUNK)
    problem = planner.problem(span, stored=False)
    plain = StagePlanner(facts()).problem(span, stored=False)
    more = problem.load_bytes_KB - plain.load_bytes_KB
    assert more[:2].sum() == 0
    assert tuple(more[2]) == STATE_BYTES
    assert problem.recurrent_B.tolist() == [True, False, True, True]


def test_a_chunk_that_is_partly_there_still_brings_all_of_the_states():
    span = PlanSpan(start=2 * CHUNK + BLOCK, end=3 * CHUNK, chunk_tokens=CHUNK)
    (bytes_B,) = StagePlanner(RECURRENT[0]).problem(span, stored=False).load_bytes_KB
    assert tuple(bytes_B) == tuple(CHUNK * SHAPE.kv_bytes_per_token_layer + each for each in STATE_BYTES)


def test_rows_of_several_layers_bring_theirs_together():
    assert facts(row_state_bytes=STATE_BYTES, layers_per_block=3).state_bytes_B == (400, 50)


def test_an_engine_that_only_loads_reads_the_states_too():
    loading = facts(row_state_bytes=STATE_BYTES, costs=None, load_only_reason="because")
    problem = StagePlanner(loading).problem(PlanSpan(start=0, end=2 * CHUNK, chunk_tokens=CHUNK), stored=False)
    assert tuple(problem.load_bytes_KB[1] - problem.load_bytes_KB[0]) == STATE_BYTES


def begun(made, *, start=0, states=STATES, has_start_states=True):
    prompt = stored(made, 6 * CHUNK + 5, 6, 5)
    made.arrive("r", prompt)
    made.matched("r", start)
    matched = made.side.num_matched("r", start, has_start_states=has_start_states)
    made.side.allocated("r", range(100, 100 + (start + matched) // BLOCK), matched, states)
    return made.step()


def test_workers_are_told_where_the_states_stand():
    work = begun(case(), start=CHUNK, states=replace(STATES, start=(3, 4)))
    (target,) = work.targets
    assert target.state_blocks == STATES.blocks
    assert target.start_states == (3, 4)
    (decided,) = work.by_stage[0]
    assert decided.compute


def test_without_states_at_the_start_nothing_is_recomputed():
    made = case()
    work = begun(made, start=CHUNK, has_start_states=False)
    assert work.targets[0].start_states == ()
    worker = Worker(made)
    worker.carry_out(work)
    worker.run()
    assert not any(worker.num_computed.values())
    (record,) = made.side.finished("r")["cacheflow"]
    assert record["outcome"] == "done"
    assert record["recomputed_cells"] == 0


def test_what_another_restoration_has_in_the_middle_is_not_copied():
    made = case()
    prompt = stored(made, 6 * CHUNK + 5, 6, 2, 5)
    made.arrive("first", prompt)
    assert made.begin("first") == 6 * CHUNK
    made.arrive("same", list(prompt))
    assert made.matched("same") is None  # it waits, then vLLM has it
    made.arrive("part", prompt[: 3 * CHUNK + 9])
    assert made.matched("part") == 3 * CHUNK
    assert made.side.requests["part"].offered.copied_from == ()


# Where states are saved


def positions(num_prompt=5 * CHUNK + 9, **changes):
    view = RequestView(request_id="r", tokens=[], num_prompt_tokens=num_prompt)
    return RequestCheckpoints(view, **{"chunk_tokens": CHUNK, "every_chunks": None, "decode_too": True, **changes})


NOW, AT_END = CheckpointDue.NOW, CheckpointDue.AT_END


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        ({}, {5: NOW, 6: AT_END, 7: AT_END}),
        ({"decode_too": False}, {5: NOW}),
        ({"every_chunks": 2}, {2: NOW, 4: NOW, 5: NOW, 6: NOW, 7: AT_END}),
        ({"num_prompt": 5 * CHUNK}, {4: NOW, 5: AT_END, 6: AT_END, 7: AT_END}),
        ({"num_prompt": CHUNK}, dict.fromkeys(range(1, 8), AT_END)),
    ],
)
def test_states_are_saved_at_the_prompt_s_last_chunk_and_of_a_reply_at_its_last(changes, due):
    made = positions(**changes)
    found = {chunk: made.due(chunk * CHUNK) for chunk in range(1, 8)}
    assert {chunk: each for chunk, each in found.items() if each is not None} == due
    assert all(made.due(chunk * CHUNK + BLOCK) is None for chunk in range(8))
    made.note_stored(frozenset(chunk - 1 for chunk in due))
    assert all(made.due(chunk * CHUNK) is None for chunk in range(1, 8))


@pytest.mark.parametrize(
    ("asked", "stop"),
    [
        ({"num_stored": 3, "end": 0}, 3),  # the store's prompts part from this one there
        ({"num_stored": 3, "end": 2}, 3),
        ({"num_stored": 3, "end": 3}, 3),  # so that vLLM's own cache keeps what was restored
        ({"num_stored": 9, "end": 5}, 0),  # where vLLM stops anyway
        ({"num_stored": 0, "end": 0}, 0),
        ({"num_stored": 3, "end": 0, "vllm_stop": 4}, 4),
        ({"num_stored": 0, "end": 0, "stops_itself": False}, 5),
        ({"num_stored": 3, "end": 0, "stops_itself": False}, 3),
    ],
)
def test_vllm_is_asked_to_stop_where_states_are_wanted(asked, stop):
    made = positions()
    arguments = {"stops_itself": True, "vllm_stop": 0} | asked
    arguments |= {name: arguments[name] * CHUNK for name in ("end", "vllm_stop")}
    assert made.stop_at(**arguments) == stop * CHUNK
    if stop and stop != asked["end"]:
        assert made.due(stop * CHUNK) is NOW


def test_vllm_does_not_stop_for_states_that_are_stored():
    made = positions()
    made.note_stored(frozenset({2}))
    assert made.stop_at(num_stored=3, end=0, stops_itself=True, vllm_stop=0) == 0


def kept(made):
    """A request whose workers keep the states at the end of its second chunk, which it has decoded."""
    made.arrive("r", prompt := tokens(CHUNK + 9))
    made.matched("r")
    prompt += tokens(2 * CHUNK, seed=5)
    assert scheduled_step(made, 2 * CHUNK).saves[-1].keep
    made.hold("r", 2)
    return prompt


def matched(made, name, **kwargs):
    """What is found of a request once the store has answered, again and again; None while it is waited for."""
    for _ in range(50):
        found = made.side.num_matched(name, 0, **kwargs)
        if found is not None:
            return found
        time.sleep(0.001)
    return None


def test_a_preempted_request_waits_until_its_states_are_written():
    made = case()
    kept(made)
    assert matched(made, "r", num_preemptions=1) is None
    hold_states(made, "r", 1)
    assert matched(made, "r", num_preemptions=1) == 2 * CHUNK


def test_the_next_turn_waits_for_the_states_of_the_one_before():
    made = case()
    prompt = kept(made)
    made.arrive("other", tokens(2 * CHUNK, seed=77))
    made.side.finished("r")
    made.arrive("next", prompt)
    assert matched(made, "other") == 0
    assert matched(made, "next") is None
    hold_states(made, "next", 1)
    assert matched(made, "next") == 2 * CHUNK


def test_states_that_are_not_written_are_waited_for_no_longer_than_the_store():
    made = case()
    prompt = kept(made)
    made.side.finished("r")
    made.arrive("next", prompt)
    assert matched(made, "next") is None
    made.now_s += made.options.lookup_timeout_s
    assert matched(made, "next") == 0


def scheduled_step(made, num_computed, **kwargs):
    return made.side.step(
        [ScheduledRequest("r", num_computed, CHUNK)],
        lambda _: range(1000),
        num_scheduled_tokens=CHUNK,
        state_blocks_of=lambda name, end: (end // BLOCK, 1),
        **kwargs,
    )


def test_a_chunk_s_save_carries_the_states_where_they_are_due():
    made = case()
    made.arrive("r", tokens(2 * CHUNK + 9))
    made.matched("r")
    (plain,) = scheduled_step(made, CHUNK).saves
    assert plain.state_blocks == ()
    (last,) = scheduled_step(made, 2 * CHUNK).saves
    assert (last.chunk, last.state_blocks, last.keep) == (1, (2 * CHUNK // BLOCK, 1), False)
    assert last.block_ids == tuple(range(CHUNK // BLOCK, 2 * CHUNK // BLOCK))


def test_states_whose_last_token_is_known_a_step_late_are_saved_then():
    """VLLM schedules a step before it knows what the one before has sampled."""
    made = case()
    made.arrive("r", prompt := tokens(2 * CHUNK - 2))
    made.matched("r")
    scheduled_step(made, 2 * CHUNK - 2)
    assert scheduled_step(made, 2 * CHUNK - 1).saves == ()
    prompt.append(1)
    assert scheduled_step(made, 2 * CHUNK).saves == ()
    prompt.append(2)
    (late,) = scheduled_step(made, 2 * CHUNK + 1).saves
    assert (late.chunk, late.state_blocks, late.keep) == (1, (2 * CHUNK // BLOCK, 1), True)


def test_vllm_is_asked_to_stop_where_it_would_go_by():
    """A chunk is larger than a block, or states are kept within passes."""
    made = case()
    made.arrive("r", tokens(4 * CHUNK + 5))
    assert made.side.stop_at("r", 0, vllm_stop=0) == 4 * CHUNK
    blocks = Case(options=replace(options(), chunk_tokens=BLOCK), facts_by_rank=RECURRENT)
    blocks.arrive("r", tokens(4 * CHUNK + 5))
    assert blocks.side.stop_at("r", 0, vllm_stop=0) == 0
    assert blocks.side.stop_at("r", 0, vllm_stop=0, kept_within_passes=True) == 4 * CHUNK + 4 // BLOCK * BLOCK


def test_states_are_saved_where_the_keys_and_values_were_long_ago():
    made = case()
    prompt = stored(made, 4 * CHUNK, 4)
    other = prompt[: 2 * CHUNK] + tokens(2 * CHUNK, seed=9)
    made.arrive("r", other)
    assert made.matched("r") == 0
    assert made.side.stop_at("r", 0, vllm_stop=0) == 2 * CHUNK
    (save,) = scheduled_step(made, 2 * CHUNK).saves
    assert (save.chunk, bool(save.state_blocks)) == (1, True)


def test_workers_hear_of_who_is_preempted():
    made = case()
    made.arrive("r", tokens(2 * CHUNK + 9))
    assert made.side.step([], lambda _: (), num_scheduled_tokens=0, preempted=["r"]).preempted == ("r",)
    plain = Case()
    assert plain.side.step([], lambda _: (), num_scheduled_tokens=0, preempted=["r"]).preempted == ()


def test_other_models_are_asked_for_no_states():
    made = Case()
    made.arrive("r", made.saved_prompt(4 * CHUNK + 5, 4))
    assert made.matched("r") == 4 * CHUNK
    assert made.side.stop_at("r", 0, vllm_stop=32) == 32
    problem = StagePlanner(facts()).problem(PlanSpan(start=0, end=CHUNK, chunk_tokens=CHUNK), stored=False)
    assert not problem.recurrent_B.any()
