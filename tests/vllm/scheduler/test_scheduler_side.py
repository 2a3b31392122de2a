"""The scheduler side without vLLM: lookups, decisions, orders, deadlines, saves, counts."""

import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from cacheflow.plan.engine_pass import EnginePass
from cacheflow.plan.problem import LinkCost
from cacheflow.stores.keys import Shard
from cacheflow.types import LoadOutcome
from cacheflow.vllm.adapters import Adapter
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.scheduler.lookup import QUEUED_S
from cacheflow.vllm.scheduler.view import ScheduledRequest
from cacheflow.vllm.step import ModelNews, WeightsChange
from support.scheduler_cases import BLOCK, CHUNK, LAYERS, Case, Worker, costs, facts, tokens

pytestmark = pytest.mark.torch


def options(**changes):
    return ConnectorOptions(**{"chunk_tokens": CHUNK, "lookup_timeout_s": 20.0, "explain": True, **changes})


def test_a_prefix_in_the_store_is_restored_by_both_sides_and_reported():
    case = Case()
    prompt = case.saved_prompt(10 * CHUNK + 5, 10)
    case.arrive("a", prompt)
    assert case.begin("a") == 10 * CHUNK
    worker = Worker(case)
    worker.run()
    (restore_id,) = worker.finished
    assert worker.restored[restore_id] == {(chunk, layer) for chunk in range(10) for layer in range(LAYERS)}
    (record,) = case.side.finished("a")["cacheflow"]
    assert record["outcome"] == "done"
    assert record["recomputed_cells"] > 0
    assert record["loaded_cells"] > 0
    assert record["recomputed_cells"] + record["loaded_cells"] == 10 * LAYERS
    counted = case.side.counts.take()
    assert counted["restorations"] == {"done": 1}
    assert counted["tokens"]["recomputed"] + counted["tokens"]["loaded"] == pytest.approx(10 * CHUNK)


@pytest.mark.parametrize(
    ("outcome", "source"),
    [
        (LoadOutcome.LATE, "late"),
        (LoadOutcome.MISS, "failed"),
        (LoadOutcome.CORRUPT, "failed"),
        (LoadOutcome.ERROR, "failed"),
    ],
)
def test_a_read_that_came_too_late_is_not_one_that_failed(outcome, source):
    case = Case()
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, 6))
    case.begin("a")
    Worker(case, outcome={(5, LAYERS - 1): outcome}).run()
    counted = case.side.counts.take()
    assert counted["restorations"] == {"done": 1}
    assert counted["tokens"][source] == pytest.approx(CHUNK / LAYERS)
    assert set(counted["tokens"]) & {"late", "failed"} == {source}


def test_the_last_token_is_never_restored():
    case = Case()
    case.arrive("a", case.saved_prompt(4 * CHUNK, 4))
    assert case.matched("a") == 3 * CHUNK


def test_a_local_hit_that_ends_inside_a_chunk_leaves_the_rest_of_it():
    case = Case()
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, 6))
    assert case.begin("a", num_computed=2 * CHUNK + BLOCK) == 4 * CHUNK - BLOCK
    (target,) = case.step().targets
    assert (target.start, target.object_start) == (2 * CHUNK + BLOCK, 2 * CHUNK)
    assert target.chunk_ends == tuple(CHUNK * n for n in (3, 4, 5, 6))
    assert len(target.tokens) == 4 * CHUNK - BLOCK


def test_nothing_is_restored_that_the_store_lacks_or_another_tenant_saved(tmp_path):
    case = Case()
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    adapter = Adapter(name="name", number=1, path=str(tmp_path))
    unreadable = Adapter(name="name", number=2, path=str(tmp_path / "missing"))
    prompt = case.saved_prompt(6 * CHUNK + 1, 6, salt="one")
    case.arrive("other salt", prompt, salt="two")
    case.arrive("no salt", prompt)
    case.arrive("same salt", prompt, salt="one")
    case.arrive("adapter", prompt, salt="one", adapter=adapter)
    case.arrive("unreadable", prompt, salt="one", adapter=unreadable)
    case.arrive("other text", tokens(6 * CHUNK + 1, seed=9), salt="one")
    case.arrive("embeddings", prompt, salt="one", hashable=False)
    names = ("other salt", "no salt", "adapter", "unreadable", "other text", "embeddings")
    assert [case.matched(name) for name in names] == [0] * 6
    assert "cannot be read" in case.side.finished("unreadable")["cacheflow_reason"]
    assert case.matched("same salt") == 6 * CHUNK


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"cacheflow": "off"}, 0),
        ({"cacheflow": "recompute"}, 0),
        ({"cacheflow": "load"}, 6 * CHUNK),
        ({"max_load_tokens": 3 * CHUNK + 1}, 3 * CHUNK),
        ({"max_load_tokens": 0}, 0),
        ({"someone_elses": 1}, 6 * CHUNK),
    ],
)
def test_a_request_may_say_how_it_is_restored(params, expected):
    case = Case()
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, 6), params=params)
    assert case.matched("a") == expected


def test_what_a_request_says_wrongly_is_answered():
    case = Case()
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, 6), params={"cacheflow": "fast", "max_load_tokens": -1})
    assert case.matched("a") == 6 * CHUNK
    error = case.side.finished("a")["cacheflow_error"]
    assert "'fast'" in error
    assert "auto, load, recompute, off" in error
    assert "-1" in error


@pytest.mark.parametrize(
    "params", [{"cacheflow": "x" * 10**6}, {"max_load_tokens": "9" * 10**6}, {"explain": ["y" * 10**6] * 100}]
)
def test_what_a_client_sent_is_not_repeated_at_length(params):
    case = Case()
    case.arrive("a", tokens(6 * CHUNK + 1), params=params)
    assert len(case.side.finished("a")["cacheflow_error"]) < 300


def reason(case, request_id="a"):
    answer = case.side.finished(request_id)
    assert all(record["outcome"] != "done" for record in answer["cacheflow"])
    return answer["cacheflow_reason"]


def test_a_prompt_that_vllm_computes_whatever_is_cached_says_so_and_nothing_is_offered():
    case = Case()
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, 6), computes_all=True)
    assert case.matched("a") == 0
    assert "log-probabilities are asked for" in reason(case)


def test_a_restoration_that_vllm_did_not_take_up_claims_no_cause_it_does_not_know():
    case = Case()
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, 6))
    assert case.matched("a") == 6 * CHUNK
    said = reason(case)
    assert f"did not take up the {6 * CHUNK} tokens" in said
    assert "log-probabilities" not in said


def test_a_prompt_of_embeddings_says_so_and_is_neither_restored_nor_saved():
    case = Case()
    prompt = case.saved_prompt(6 * CHUNK + 1, 6)
    case.arrive("a", prompt, hashable=False)
    assert case.matched_now("a") == 0
    assert not case.step(ScheduledRequest("a", len(prompt), len(prompt))).saves
    assert "embeddings" in reason(case)


def test_a_request_that_ends_early_says_how_far_it_came():
    case = Case()
    prompt = case.saved_prompt(6 * CHUNK + 1, 6)
    case.arrive("queued", prompt)
    assert "before vLLM asked" in reason(case, "queued")
    case.arrive("asked", prompt)
    case.side.requests["asked"].question.lookup = SimpleNamespace(poll=lambda: None, timed_out=False)  # a slow store
    assert case.matched_now("asked") is None
    assert "before the store said" in reason(case, "asked")
    case.arrive("begun", prompt)
    case.begin("begun")
    case.step()
    assert "while its prefix was being restored" in reason(case, "begun")
    case.arrive("short", tokens(CHUNK - 1))
    assert case.matched_now("short") == 0
    assert "no whole chunk" in reason(case, "short")


def restore(case, request_id, prompt):
    case.arrive(request_id, prompt)
    case.begin(request_id)
    Worker(case).run()


def test_the_choice_that_ends_last_answers_for_all_of_its_response():
    """vLLM answers n choices with what the one was told that ended last; which one that is, nobody knows."""
    for last, first in (("0_x", "1_x"), ("1_x", "0_x")):
        case = Case()
        prompt = case.saved_prompt(6 * CHUNK + 1, 6)
        restore(case, "0_x", prompt)
        case.arrive("1_x", prompt)
        assert case.matched("1_x", 6 * CHUNK) == 0  # its prefix is in vLLM's own cache by now
        case.side.finished(first)
        answer = case.side.finished(last)
        (record,) = answer["cacheflow"]
        assert (record["outcome"], record["choice_index"]) == ("done", 0)
        assert "cacheflow_reason" not in answer
        assert not case.side._siblings._families  # noqa: SLF001 -- memory shows nowhere else


def test_choices_of_which_none_was_restored_give_the_reason_of_the_first():
    case = Case()
    prompt = tokens(6 * CHUNK + 1)
    for name in ("0_x", "1_x"):
        case.arrive(name, prompt)
    assert case.matched("0_x") == 0
    case.side.finished("1_x")
    answer = case.side.finished("0_x")
    assert answer["cacheflow"] == []
    assert "the store holds 0" in answer["cacheflow_reason"]


def test_requests_that_are_alone_are_told_of_themselves_alone():
    case = Case()
    prompt = case.saved_prompt(6 * CHUNK + 1, 6)
    for name in ("0_x", "cmpl-0_x", "0_y"):
        restore(case, name, prompt)
        (record,) = case.side.finished(name)["cacheflow"]
        assert "choice_index" not in record


def test_an_idle_minute_between_two_restorations_changes_nothing_in_the_second():
    case, ordered = Case(), []
    worker = Worker(case)
    prompts = [case.saved_prompt(20 * CHUNK + 1, 20, seed=seed) for seed in (1, 2)]
    for name, prompt in zip("ab", prompts, strict=True):
        case.arrive(name, prompt)
        case.begin(name)
        reads = []
        while case.side.has_work:
            orders = case.step(busy=1)
            reads.append(sum(len(each.reads) for each in orders.of_stage(0)))
            worker.carry_out(orders)
        ordered.append(reads)
        case.side.finished(name)
        case.now_s += 60.0
    first, second = ordered
    assert max(second) <= max(first)  # the minute was not taken for an engine step, for which to read ahead


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_a_bound_that_leaves_compute_nothing_does_not_keep_a_request_waiting(ratio):
    case = Case(options=options(itl_slo_ms=1e-3), facts_by_rank=(facts(ratio=ratio),))
    case.arrive("a", case.saved_prompt(20 * CHUNK + 1, 20), params=None)
    case.begin("a")
    worker, num_steps = Worker(case), 0
    while case.side.has_work:
        worker.carry_out(case.step(busy=1))
        num_steps += 1
        assert num_steps < 400  # each read of the worker ends with its step: 80 cells
    assert case.now_s < case.options.restore_timeout_s


def test_a_request_that_queued_while_its_prefix_was_computed_is_restored():
    case = Case()
    prompt = tokens(6 * CHUNK + 1)
    for name in ("first turn", "queued", "in the next step", "of another text"):
        case.arrive(name, prompt if name != "of another text" else tokens(6 * CHUNK + 1, seed=9))
    assert case.matched("first turn") == 0
    assert len(case.step(ScheduledRequest("first turn", 6 * CHUNK + 1), busy=1).saves) == 6
    case.hold("first turn", 6)
    case.side.finished("first turn")
    assert case.matched("in the next step") == 0  # too soon to ask again: a slow store would delay it twice
    case.now_s = QUEUED_S + 0.1
    assert case.matched("queued") == 6 * CHUNK
    assert case.matched("of another text") == 0  # asked twice as well, and once only
    case.now_s += QUEUED_S + 0.1
    assert case.side.num_matched("of another text", 0) == 0


def test_a_link_that_cannot_help_leaves_the_prompt_to_vllm():
    case = Case(facts_by_rank=(facts(ratio=500.0),))
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, 6))
    assert case.matched("a") == 0


def test_a_store_that_does_not_answer_costs_its_deadline_and_no_more():
    case = Case(options=options(lookup_timeout_s=0.05))
    release = threading.Event()
    case.store.contains = lambda keys: release.wait(20) and (True,) * len(keys)
    try:
        case.arrive("a", tokens(6 * CHUNK + 1))
        assert case.side.num_matched("a", 0) is None
        case.now_s = 0.06
        for _ in range(3):  # vLLM asks in every step in which it cannot place the request
            assert case.side.num_matched("a", 0) == 0
        assert case.side.counts.take()["lookup_timeouts"] == 1
    finally:
        release.set()


def test_failed_reads_are_recomputed():
    case = Case()
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    worker = Worker(case, outcome={(9, 3): LoadOutcome.CORRUPT, (8, 1): LoadOutcome.MISS})
    worker.run()
    assert worker.restored[worker.finished[0]] == {(c, layer) for c in range(10) for layer in range(LAYERS)}
    counted = case.side.counts.take()
    assert counted["restorations"] == {"done": 1}
    assert counted["tokens"]["failed"] > 0


def test_a_compute_failure_hands_the_rest_to_vllm():
    case = Case()
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    worker = Worker(case, compute_error="boom")
    worker.run()
    (blocks,) = worker.failed_blocks.values()
    assert blocks == tuple(range(100, 100 + 10 * CHUNK // BLOCK))  # nothing was resident from the start
    assert case.side.counts.take()["restorations"] == {"failed": 1}


def test_a_load_only_engine_gives_back_what_is_behind_a_hole():
    only = facts(costs=None, load_only_reason="a test")
    case = Case(facts_by_rank=(only,))
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    worker = Worker(case, outcome={(6, 2): LoadOutcome.MISS})
    worker.run()
    (blocks,) = worker.failed_blocks.values()
    assert blocks == tuple(range(100 + 6 * CHUNK // BLOCK, 100 + 10 * CHUNK // BLOCK))


def test_an_overdue_restoration_stops_loading_and_ends():
    case = Case(options=options(restore_timeout_s=0.5))
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    case.step()  # the workers begin and say nothing: the store hangs
    case.now_s = 1.0
    orders = case.step()
    assert not any(each.reads for each in orders.of_stage(0))


def test_a_store_whose_reads_are_all_late_costs_recomputation():
    case = Case(options=options(restore_timeout_s=0.5))
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    worker = Worker(case, default=LoadOutcome.LATE, step_s=0.2)
    worker.run()
    assert worker.restored[worker.finished[0]] == {(c, layer) for c in range(10) for layer in range(LAYERS)}
    assert case.side.counts.take()["tokens"]["recomputed"] == pytest.approx(10 * CHUNK)


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_an_aborted_request_is_cancelled_on_the_workers(steps_before):
    case = Case()
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    worker = Worker(case)
    for _ in range(steps_before):
        worker.carry_out(case.step())
    assert case.side.has_work
    case.side.finished("a")
    worker.run(max_steps=2)
    assert len(worker.finished) == 1
    assert case.side.counts.take()["restorations"] == {"cancelled": 1}


def test_two_requests_for_the_same_prefix_load_it_once():
    case = Case()
    prompt = case.saved_prompt(10 * CHUNK + 5, 10)
    case.arrive("a", prompt)
    case.arrive("b", [*prompt[: 10 * CHUNK], 1, 2, 3])
    case.begin("a")
    assert case.matched("b") is None
    Worker(case).run()
    assert case.matched("b", 10 * CHUNK) == 0  # vLLM's own prefix cache has it now


def test_ranks_finish_together():
    slow = facts(shard=Shard(tp_rank=1, tp_size=2), link=LinkCost(bytes_per_s=1e5))
    case = Case(facts_by_rank=(facts(shard=Shard(tp_rank=0, tp_size=2)), slow))
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    worker = Worker(case, ranks=(0,))
    for _ in range(30):
        worker.carry_out(case.step())
    assert case.side.has_work, "rank 1 has not reported"


def test_compute_stays_within_the_budget_while_others_decode():
    case = Case(options=options(recompute_budget_ms=20.0))
    case.arrive("a", case.saved_prompt(40 * CHUNK + 5, 40))
    case.begin("a")
    orders = case.step(busy=3)
    cells = sum(order.tile.num_cells for each in orders.of_stage(0) for order in each.compute)
    assert cells == 2  # of 10 ms each
    assert orders.wait_s == 0


def test_itl_slo_shrinks_the_budget():
    case = Case(options=options(recompute_budget_ms=50.0, itl_slo_ms=40.0))
    case.arrive("a", case.saved_prompt(40 * CHUNK + 5, 40))
    case.begin("a")
    for _ in range(40):  # the engine's own step takes 30 ms
        case.step(busy=3)
        case.now_s += 0.03
    orders = case.step(busy=3)
    assert sum(order.tile.num_cells for each in orders.of_stage(0) for order in each.compute) <= 1


def test_chunks_are_saved_once_when_they_are_complete():
    case = Case()
    prompt = tokens(3 * CHUNK + 10)
    case.arrive("a", prompt)
    assert case.matched("a") == 0
    saved = []
    for num_computed in (CHUNK // 2, CHUNK, CHUNK, 3 * CHUNK + 10):
        saved.append([order.block_ids for order in case.step(ScheduledRequest("a", num_computed), busy=1).saves])
    per_chunk = CHUNK // BLOCK
    blocks = [tuple(range(chunk * per_chunk, (chunk + 1) * per_chunk)) for chunk in range(3)]
    assert saved == [[], [blocks[0]], [], blocks[1:]]


def test_decoded_tokens_are_saved_once_they_are_known_unless_forbidden():
    for decode_too in (True, False):
        case = Case(options=options(save_decode_kv=decode_too))
        known = tokens(CHUNK - 1)
        case.arrive("a", known)
        assert case.matched("a") == 0
        assert case.step(ScheduledRequest("a", CHUNK), busy=1).saves == ()  # its last token is not sampled yet
        known.append(5)
        assert len(case.step(ScheduledRequest("a", CHUNK), busy=1).saves) == decode_too


def test_what_the_store_has_is_not_saved_again():
    case = Case()
    case.arrive("a", case.saved_prompt(4 * CHUNK + 1, 3))
    case.matched("a")
    orders = case.step(ScheduledRequest("a", 4 * CHUNK + 1), busy=1)
    assert len(orders.saves) == 1


def test_with_nothing_to_do_a_step_orders_nothing():
    case = Case()
    case.arrive("a", tokens(CHUNK // 2))
    assert case.matched("a") == 0
    assert case.step(ScheduledRequest("a", CHUNK // 2), busy=1).idle_after_forward


@pytest.mark.parametrize(
    ("params", "num_saved", "said"),
    [
        ({}, 0, "the store holds 0"),
        ({"cacheflow": "recompute"}, 6, "'recompute'"),
        ({"cacheflow": "off"}, 6, "'off'"),
        ({"max_load_tokens": 0}, 6, "0 may be restored"),
    ],
    ids=str,
)
def test_why_nothing_was_restored_is_answered(params, num_saved, said):
    case = Case()
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, num_saved), params=params)
    case.side.num_matched("a", 0) if "off" in said else case.matched("a")
    answer = case.side.finished("a")
    assert answer["cacheflow"] == []
    assert said in answer["cacheflow_reason"]


def test_the_guards_choice_of_recomputation_is_answered_and_counted():
    case = Case(facts_by_rank=(facts(ratio=500.0),))
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, 6))
    assert case.matched("a") == 0
    assert case.side.counts.take()["guard"] == {"recompute": 1}
    assert case.side.finished("a")["cacheflow_reason"].startswith("recompute: ")


@pytest.mark.parametrize(("saved_s", "restored"), [(0.0, 6 * CHUNK), (0.035, 0)])
def test_a_prompt_that_vllms_longer_passes_have_sooner_is_left_to_them(saved_s, restored):
    own = EnginePass(pass_tokens=8 * CHUNK, chunk_tokens=CHUNK, saved_s=saved_s)
    case = Case(facts_by_rank=(facts(costs=costs(engine_pass=own)),))
    case.arrive("a", case.saved_prompt(6 * CHUNK + 1, 6))
    assert case.matched("a") == restored
    if not restored:
        assert case.side.finished("a")["cacheflow_reason"].startswith("prefill: it takes ")


def test_a_prompt_without_a_whole_chunk_says_so():
    case = Case()
    case.arrive("a", tokens(CHUNK - 1))
    assert case.side.num_matched("a", 0) == 0
    assert f"no whole chunk of {CHUNK} tokens" in case.side.finished("a")["cacheflow_reason"]


def test_a_prefix_that_many_ask_for_at_once_is_saved_once():
    """The store told all of them that it is missing: the first had not computed it yet."""
    case = Case()
    prompt = tokens(3 * CHUNK)
    names = ("a", "b", "c")
    for name in names:
        case.arrive(name, [*prompt, *tokens(CHUNK, seed=ord(name))])
        assert case.matched(name) == 0
    saved = {}
    for name in names:
        saved[name] = len(case.step(ScheduledRequest(name, 4 * CHUNK), busy=1).saves)
    assert saved == {"a": 4, "b": 1, "c": 1}


def test_a_chunk_that_is_missing_after_it_was_saved_is_saved_again():
    """Its write failed, or the store has evicted it since."""
    case = Case()
    prompt = tokens(3 * CHUNK)
    for name in ("a", "b"):
        case.arrive(name, prompt)
        assert case.matched(name) == 0
        assert len(case.step(ScheduledRequest(name, 3 * CHUNK), busy=1).saves) == 3


def test_a_failed_restoration_leaves_a_record_and_its_reason():
    case = Case()
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    Worker(case, compute_error="boom").run()
    answer = case.side.finished("a")
    (record,) = answer["cacheflow"]
    assert (record["outcome"], record["error"]) == ("failed", "boom")
    assert (record["start"], record["end"]) == (0, 10 * CHUNK)
    assert record["recomputed_cells"] + record["loaded_cells"] < 10 * LAYERS
    assert answer["cacheflow_reason"] == "the restoration was failed: boom"


def test_a_request_that_is_restored_after_all_gives_no_reason():
    """Preempted after a failure, as far as the answer goes: what counts is that something was restored."""
    case = Case()
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    Worker(case).run()
    case.side.requests["a"].reason = "of a later look"
    answer = case.side.finished("a")
    assert [record["outcome"] for record in answer["cacheflow"]] == ["done"]
    assert "cacheflow_reason" not in answer


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_cancelled_restoration_leaves_one_record_of_what_it_had_done(steps_before):
    case = Case()
    case.arrive("a", case.saved_prompt(10 * CHUNK + 5, 10))
    case.begin("a")
    worker = Worker(case)
    for _ in range(steps_before):
        worker.carry_out(case.step())
    request = case.side.requests["a"]
    answer = case.side.finished("a")
    (record,) = answer["cacheflow"]
    assert (record["outcome"], record["error"]) == ("cancelled", "")
    assert (record["restore_s"] > 0) == (steps_before > 0)
    assert (record["recomputed_cells"] > 0) == (steps_before > 0)
    worker.run(max_steps=2)
    assert request.records == [record]


def test_what_another_connector_loads_for_a_step_is_saved_once_a_token_proves_it():
    """Steps may overlap: the next one is ordered before it is known whether the load succeeded."""
    case = Case()
    prompt = tokens(3 * CHUNK + 5)
    case.arrive("a", prompt)
    begins = ScheduledRequest("a", len(prompt), 5, unproven=True)
    assert case.step(begins, busy=5).saves == ()
    assert case.step(ScheduledRequest("a", len(prompt) + 1, 1), busy=1).saves == ()
    prompt.append(7)
    assert [each.chunk for each in case.step(ScheduledRequest("a", len(prompt), 1), busy=1).saves] == [0, 1, 2]


def test_nothing_is_saved_of_a_request_whose_load_failed():
    case = Case()
    prompts = {name: tokens(3 * CHUNK + 5, seed=seed) for seed, name in enumerate("ab")}
    for name, prompt in prompts.items():
        case.arrive(name, prompt)
    assert case.step(*(ScheduledRequest(each, 3 * CHUNK + 5, 5, unproven=True) for each in "ab"), busy=10).saves == ()
    prompts["b"].append(7)  # its own came
    case.side.load_failed()
    prompts["a"] += [7] * CHUNK
    scheduled = [ScheduledRequest(name, len(prompt), 1) for name, prompt in prompts.items()]
    assert {each.request_id for each in case.step(*scheduled, busy=2).saves} == {"b"}


def test_who_brought_a_prefix_is_said():
    """Offered and passed over, or brought without an offer; not where vLLM looked for nobody's."""
    case = Case()
    prompt = case.saved_prompt(4 * CHUNK + 5, 4)
    by_another = "another connector of this engine loaded the prefix"
    for name, num_loaded in (("offered", 0), ("brought", 4 * CHUNK)):
        case.arrive(name, prompt)
        assert case.matched(name) == 4 * CHUNK
        case.side.passed_over(name, num_loaded=num_loaded)
        assert case.side.finished(name)["cacheflow_reason"] == by_another
    case.arrive("lacking", tokens(2 * CHUNK, seed=9))
    assert case.matched("lacking") == 0
    case.side.passed_over("lacking", num_loaded=0)
    assert "nothing to restore" in case.side.finished("lacking")["cacheflow_reason"]


def test_the_second_call_for_a_restored_request_is_no_pass_over():
    case = Case()
    worker = Worker(case)
    case.arrive("a", case.saved_prompt(4 * CHUNK + 5, 4))
    assert case.begin("a") == 4 * CHUNK
    case.side.passed_over("a", num_loaded=4 * CHUNK)  # under way
    worker.run()
    case.side.passed_over("a", num_loaded=4 * CHUNK)  # vLLM counts it as brought
    answer = case.side.finished("a")
    assert "cacheflow_reason" not in answer
    assert [record["outcome"] for record in answer["cacheflow"]] == ["done"]


@pytest.mark.parametrize("num_saved", [0, 3])
@pytest.mark.parametrize("num_loaded", [4 * CHUNK, None])
def test_what_another_connector_loads_after_a_preemption_is_not_saved_under_the_new_weights_name(num_saved, num_loaded):
    """Whether or not a restoration of ours came before: vLLM resets no other connector when weights change."""
    case = Case()
    case.arrive("a", case.saved_prompt(4 * CHUNK + 5, num_saved))
    if num_saved:
        case.begin("a")
        Worker(case).run()
    else:
        assert case.matched("a") == 0
    case.side.passed_over("a", num_loaded=0)
    change = WeightsChange(version=1, how="reload_weights", announced=True)
    case.step(ScheduledRequest("a", 4 * CHUNK + 5, 5), busy=5)
    case.side.take_news({0: ModelNews(weights=change)})
    assert case.matched("a", num_preemptions=1) == 0
    case.side.passed_over("a", num_loaded=num_loaded)
    assert case.step(ScheduledRequest("a", 4 * CHUNK + 5, 5), busy=5).saves == ()


@pytest.mark.parametrize("num_loaded", [2 * CHUNK, None])
@pytest.mark.parametrize("heard", ["before the reset", "after the first step"])
def test_what_another_connector_loads_is_as_old_in_vllms_own_cache(num_loaded, heard):
    """VLLM's was reset after the change of weights, the other connector was not."""
    case, prompt = Case(), tokens(4 * CHUNK + 5)
    news = {0: ModelNews(weights=WeightsChange(version=1, how="reload_weights", announced=True, before_forward=True))}
    if heard == "before the reset":
        case.side.take_news(news)
    case.side.local_cache_was_reset()
    for name, num_local in (("brought", 0), ("builds on it", 2 * CHUNK)):
        case.arrive(name, prompt)
        assert case.matched(name, num_local) == 0
        case.side.passed_over(name, num_loaded=0 if num_local else num_loaded)
        saves = case.step(ScheduledRequest(name, 4 * CHUNK + 5, 5), busy=5).saves
        if heard == "after the first step" and not num_local:
            case.side.take_news(news)  # that step's were refused by the worker, which has other weights by then
        else:
            assert saves == ()
