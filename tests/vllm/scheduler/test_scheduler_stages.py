"""Plans for pipeline stages on the scheduler side: what the store holds decides how a later stage starts; no vLLM."""

import numpy as np
import pytest

from cacheflow.plan.grid import Boundary, Cell
from cacheflow.stores.base import PutRequest
from cacheflow.stores.keys import RankKeys, Shard
from cacheflow.types import LoadOutcome
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.scheduler.view import ScheduledRequest
from cacheflow.vllm.step import CaptureWork
from support.scheduler_cases import CHUNK, LAYERS, Case, Worker, facts, tokens

STATE_BYTES = 2 * 8 * 2


def stage_facts(stage: int, **changes) -> EngineFacts:
    """One of two stages; the model has twice the layers of one."""
    later = {"boundary_token_bytes": STATE_BYTES, "linked": True} if stage else {}
    values = {"shard": Shard(pp_rank=stage, pp_size=2), "first_layer": stage * LAYERS, **later, **changes}
    return facts(**values)


def case_of(*, ratio: float = 1.0, **changes) -> Case:
    link = facts(ratio=ratio).link
    return Case(facts_by_rank=(stage_facts(0, link=link), stage_facts(1, **{"link": link, **changes})))


def saved(case: Case, num_chunks: int, *, boundaries: int = 0) -> list[int]:
    """A prompt of which the store holds so many chunks, and boundary states of so many of them."""
    prompt = tokens(num_chunks * CHUNK + 5)
    case.arrive("earlier", prompt)
    request = case.side.requests["earlier"]
    puts = []
    for chunk, name in enumerate(request.prefix.chain_hashes(0, num_chunks)):
        keys = [RankKeys().kv(request.name.namespace, name, (layer, layer + 1)) for layer in range(2 * LAYERS)]
        if chunk < boundaries:
            keys.append(RankKeys(first_layer=LAYERS).boundary(request.name.namespace, name))
        puts += [PutRequest(key, [np.zeros(64, np.uint8)], shape=(64,), dtype="bfloat16") for key in keys]
    case.store.submit_put(puts).wait(20)
    case.side.finished("earlier")
    return prompt


def started(case: Case, prompt: list[int]) -> Case:
    case.arrive("a", prompt, params={"explain": True})
    assert case.begin("a") == len(prompt) // CHUNK * CHUNK
    return case


def record_of(case: Case) -> dict:
    """What came of the restoration, once a worker on both ranks has obeyed."""
    TwoStages(case).run()
    (record,) = case.side.finished("a")["cacheflow"]
    return record


class TwoStages:
    """One obedient worker a stage; both see every step."""

    def __init__(self, case: Case) -> None:
        self.case, self.stages = case, [Worker(case, ranks=(stage,), step_s=0.01) for stage in range(2)]
        self.sent: list[tuple[bool, bool]] = []

    def run(self) -> None:
        from dataclasses import replace

        for _ in range(500):
            if not self.case.side.has_work:
                return
            orders = self.case.step()
            for stage, worker in enumerate(self.stages):
                worker.carry_out(replace(orders, by_stage=(orders.of_stage(stage),)))
        raise AssertionError("the restoration never ended")


def test_stored_boundary_states_let_both_stages_begin_at_once():
    case = case_of(linked=False)
    started(case, saved(case, 6, boundaries=6))
    orders = case.step()
    first, second = orders.of_stage(0), orders.of_stage(1)
    assert first[0].compute
    assert all(isinstance(read.piece, Cell) for read in first[0].reads)
    assert second[0].reads[0].piece == Boundary(0)


@pytest.mark.parametrize(
    ("boundaries", "changes", "source"),
    [
        (6, {"linked": False}, "stored"),
        (0, {}, "handed_over"),
        (6, {"boundary_token_bytes": 0}, "handed_over"),
        (0, {"linked": False}, "none"),
    ],
)
def test_the_record_says_where_activations_came_from(boundaries, changes, source):
    # Workers read at once what is ordered: on a slow link little is ordered in a step.
    case = case_of(ratio=1.0 if source == "none" else 6.0, **changes)
    record = record_of(started(case, saved(case, 6, boundaries=boundaries)))
    assert record["outcome"] == "done"
    assert [stage["boundary_source"] for stage in record["stages"]] == ["first_stage", source]
    assert (record["stages"][1]["recomputed_cells"] > 0) == (source != "none")
    assert (record["boundary_bytes"] > 0) == (source == "stored")
    assert [len(cells) for cells in record["cells"]] == [2 * LAYERS] * 6


@pytest.mark.parametrize(
    ("state_bytes", "boundaries", "source"),
    [(1, 6, "stored"), (STATE_BYTES * 100, 6, "handed_over"), (1, 1, "handed_over")],
    ids=["small states", "large states", "states of the first chunk only"],
)
def test_the_sooner_of_the_two_ways_is_taken(state_bytes, boundaries, source):
    case = case_of(boundary_token_bytes=state_bytes)
    record = record_of(started(case, saved(case, 6, boundaries=boundaries)))
    assert record["outcome"] == "done"
    assert record["stages"][1]["boundary_source"] == source


def test_boundary_states_that_end_early_end_the_staircase():
    case = case_of(linked=False)
    started(case, saved(case, 6, boundaries=2))
    worker = TwoStages(case)
    worker.stages[1].outcome = {(chunk, -1): LoadOutcome.MISS for chunk in range(2, 6)}
    worker.run()
    (record,) = case.side.finished("a")["cacheflow"]
    assert record["outcome"] == "done"
    assert all(cells[LAYERS:] == "l" * LAYERS for cells in record["cells"][2:])


def test_an_engine_that_only_loads_loads_on_every_stage():
    only = {"costs": None, "load_only_reason": "no", "linked": False, "boundary_token_bytes": 0}
    case = Case(facts_by_rank=(stage_facts(0, costs=None, load_only_reason="no"), stage_facts(1, **only)))
    record = record_of(started(case, saved(case, 4)))
    assert record["loaded_cells"] == 4 * 2 * LAYERS


def test_a_chunk_counts_as_stored_when_every_stage_has_it():
    case = case_of()
    prompt = saved(case, 3)
    case.arrive("b", prompt)
    name = case.side.requests["b"].prefix.hashes[1].hex()
    lost = RankKeys().kv(case.side.identity.namespace(None), name, (2 * LAYERS - 1, 2 * LAYERS))
    case.side.finished("b")
    assert case.store.delete([lost]) == 1
    case.arrive("a", prompt)
    assert case.matched("a") == CHUNK


def test_what_later_stages_are_to_keep_of_a_step():
    """Only tokens of chunks that will be saved, and nothing where no stage keeps boundary states."""
    case = case_of()
    prompt = tokens(3 * CHUNK + 9)
    case.arrive("a", prompt)
    assert case.matched("a") == 0
    half = CHUNK // 2
    steps = [(half, half), (2 * CHUNK, 2 * CHUNK - half), (3 * CHUNK + 9, CHUNK + 9), (3 * CHUNK + 10, 1)]
    captured = [case.step(ScheduledRequest("a", end, count), busy=1).captures for end, count in steps]
    assert captured == [
        (CaptureWork(request_id="a", start=0, end=half),),
        (CaptureWork(request_id="a", start=half, end=2 * CHUNK),),
        (CaptureWork(request_id="a", start=2 * CHUNK, end=3 * CHUNK + 9),),
        (CaptureWork(request_id="a", start=3 * CHUNK + 9, end=3 * CHUNK + 10),),
    ]
    plain = case_of(boundary_token_bytes=0)
    plain.arrive("a", prompt)
    assert plain.matched("a") == 0
    assert plain.step(ScheduledRequest("a", CHUNK, CHUNK), busy=1).captures == ()


def test_the_slowest_stage_decides_whether_restoring_pays():
    """One stage whose link is as good as none: what the other would gain is not worth waiting for."""
    slow = {"link": facts(ratio=1000.0).link, "boundary_token_bytes": 0, "linked": False}
    case = case_of(**slow)
    prompt = saved(case, 6)
    case.arrive("a", prompt)
    assert case.matched("a") == 0
    assert "2 pipeline stages" in case.side.requests["a"].reason
