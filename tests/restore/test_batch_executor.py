"""Many restorations over fake ports: every request ends, right or with its error, and nothing is left running."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError, PromptError, RestoreCancelled
from cacheflow.plan.batch import Ranking
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import Lane
from cacheflow.policies.batch_registry import BATCH_POLICY_NAMES, make_batch_policy
from cacheflow.policies.registry import make_policy
from cacheflow.restore.batch import Follow, Prepared
from cacheflow.restore.decode_pace import DecodePace
from cacheflow.restore.executor import BatchExecutor
from cacheflow.restore.leaders_first import LeadersFirst
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.state.batch import Admission, BatchScheduler
from cacheflow.types import LoadOutcome
from support.batch_cases import OUTCOMES, FakeLink, FakeRequest, new_executor, problem, running_threads
from support.examples import examples
from support.manual_clock import ManualClock
from support.patience import PATIENT

HASTY = ExecutorOptions(deadline=ReadDeadline(floor_s=0.01, factor=0.1), poll_s=0.002)


def new_requests(lengths, **kwargs):
    link = FakeLink()
    return [FakeRequest(problem(length), link, **kwargs) for length in lengths]


def assert_all_freed(requests):
    assert running_threads() == []
    assert all(ticket.freed for request in requests for ticket in request.transfer.tickets)


@pytest.mark.parametrize("restore", ["cake", "cacheflow", "cacheflow_v1"])
@pytest.mark.parametrize("policy", BATCH_POLICY_NAMES)
def test_every_request_is_restored_under_every_policy(policy, restore):
    requests = new_requests((1024, 512, 2048, 0, 700), num_answer=3)
    with new_executor(policy, restore=restore, options=PATIENT) as executor:
        handles = executor.submit_all([each.request() for each in requests])
    assert all(each.is_right() for each in requests)
    for request, handle in zip(requests, handles, strict=True):
        outcome = handle.result(0)
        assert outcome.report.ttft_s == outcome.token_s[0]
        assert len(outcome.itl_s) == 2
        assert outcome.report.recomputed_cells + outcome.report.loaded_cells == request.buffer.cells.size
        assert outcome.report.restore_s <= outcome.report.ttft_s
        for lane in Lane:
            spans = [span for span in outcome.report.spans if span.lane is lane]
            assert all(0 <= span.start_s <= span.end_s for span in spans)
            assert all(span.start_s <= outcome.report.ttft_s for span in spans)
    assert_all_freed(requests)


def test_compute_is_one_thread_of_its_own():
    requests = new_requests((1024, 512), num_answer=2)
    with new_executor() as executor:
        executor.submit_all([each.request() for each in requests])
    idents = set().union(*(each.compute.thread_ids | each.decode.thread_ids for each in requests))
    assert len(idents) == 1
    assert threading.get_ident() not in idents


@settings(max_examples=examples(40))
@given(data=st.data())
def test_whatever_fails_or_is_cancelled_every_request_ends_and_nothing_is_left(data):
    """Random arrivals, read outcomes, raising ports, raising compute, cancels: who did not fail itself is right."""
    lengths = data.draw(st.lists(st.sampled_from([0, 300, 512, 1024, 1500]), min_size=1, max_size=5))
    requests = new_requests(lengths, cell_s=0.0003, load_s=0.0003)
    outcomes = data.draw(st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=30))
    fates = data.draw(
        st.lists(
            st.sampled_from(["fine", "fine", "start", "wait", "place", "compute", "prepare", "cancel"]),
            min_size=len(lengths),
            max_size=len(lengths),
        )
    )
    for request, fate in zip(requests, fates, strict=True):
        befall(request, fate, outcomes)
    policy = data.draw(st.sampled_from(BATCH_POLICY_NAMES))
    restore = data.draw(st.sampled_from(["cake", "cacheflow", "load"]))
    handles = []
    with new_executor(policy, restore=restore, options=HASTY, starvation_s=0.05) as executor:
        for request, fate in zip(requests, fates, strict=True):
            handles.append(executor.submit(request.request()))
            if fate == "cancel":
                handles[-1].cancel()
            if data.draw(st.booleans()):
                time.sleep(0.002)
    for request, fate, handle in zip(requests, fates, handles, strict=True):
        assert_ended_as(request, fate, handle.ended.exception(0))
    assert_all_freed(requests)


ERRORS = {"compute": RuntimeError, "prepare": ValueError, "cancel": RestoreCancelled}


def assert_ended_as(request, fate, error):
    if fate == "cancel" and error is None:  # it was through before
        fate = "fine"
    if fate in ERRORS:
        assert isinstance(error, ERRORS[fate])
    else:
        assert error is None
        assert request.is_right()


def befall(request, fate, outcomes):
    count = itertools.count()
    request.transfer.outcome_of = lambda tile: outcomes[next(count) % len(outcomes)]
    if fate in ("start", "wait", "place"):
        request.transfer.raise_in = fate
    if fate == "prepare":
        request.prepare_error = ValueError("no memory")
    if fate == "compute":
        request.compute.run_suffix = raising


def raising(block_lo, block_hi):
    raise RuntimeError("device lost")


class WatchedScheduler(BatchScheduler):
    """Counts how often compute was sent to rest although it alone could bring any request further."""

    num_idle = 0

    def claim_compute(self, now_s):
        work = super().claim_compute(now_s)
        alone = not any(self.state(name).loads_possible for name in list(self._entries))
        self.num_idle += work is None and len(self) > 0 and alone
        return work


@settings(max_examples=examples(25))
@given(
    lengths=st.lists(st.sampled_from([0, 400, 512, 1024, 1800]), min_size=2, max_size=6),
    policy=st.sampled_from(BATCH_POLICY_NAMES),
    restore=st.sampled_from(["cake", "cacheflow", "recompute"]),
)
def test_compute_never_rests_while_there_is_work_for_it(lengths, policy, restore):
    requests = new_requests(lengths)
    for each in requests:
        each.transfer.outcome_of = lambda tile: LoadOutcome.ERROR
    rates = LiveRates(bytes_per_s=1e6)
    scheduler = WatchedScheduler(make_batch_policy(policy, make_policy(restore)), rates)
    with BatchExecutor(scheduler) as executor:
        executor.submit_all([each.request() for each in requests])
    assert all(each.is_right() for each in requests)
    assert not any(ticket.outcome is LoadOutcome.OK for each in requests for ticket in each.transfer.tickets)
    assert scheduler.num_idle == 0


def test_both_sides_turn_to_the_next_request_where_they_meet():
    """A fast link reads cells of a later request before the one before it has its first token."""
    requests = new_requests((1024, 1024, 1024), cell_s=0.005, load_s=0.001)
    with new_executor("fcfs", restore="cake", options=PATIENT) as executor:
        handles = executor.submit_all([each.request() for each in requests])
    reports = [handle.result(0).report for handle in handles]
    for before, after in pairwise(reports):
        assert min(span.start_s for span in after.spans if span.lane is Lane.IO) < before.ttft_s


def test_requests_may_come_at_any_time_from_any_thread():
    requests = new_requests((512,) * 12)
    with new_executor("mean_ttft") as executor:

        def submit(mine):
            for each in mine:
                executor.submit(each.request()).result(30)

        threads = [threading.Thread(target=submit, args=(requests[i::3],)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(each.is_right() for each in requests)


def test_shorter_requests_come_first_where_the_mean_counts():
    requests = new_requests((4096, 512, 512), cell_s=0.003, load_s=0.003)
    with new_executor("mean_ttft", bytes_per_s=512 * 768 / 0.003) as executor:
        handles = executor.submit_all([each.request() for each in requests])
    long, *short = (handle.result(0).report for handle in handles)
    served_s = max(report.ttft_s for report in short)
    before = sum(span.block_hi - span.block_lo for span in long.spans if span.end_s < served_s)
    assert before < 0.5 * (long.recomputed_cells + long.loaded_cells)


def test_a_read_that_hangs_is_late_and_holds_up_nobody_else():
    requests = new_requests((1024, 1024))
    requests[0].transfer.outcome_of = lambda tile: None
    release = threading.Event()
    freed = requests[0].transfer.cancel

    def hangs(ticket):
        release.wait(30)
        freed(ticket)

    requests[0].transfer.cancel = hangs
    executor = new_executor("fcfs", restore="load", options=HASTY)
    handles = executor.submit_all([each.request() for each in requests])
    outcomes = [handle.result(30) for handle in handles]
    assert all(each.is_right() for each in requests)
    assert outcomes[0].report.failed_loads["late"] > 0
    release.set()
    executor.close()
    assert_all_freed(requests)


def test_closing_gives_up_what_is_left_and_takes_no_more():
    requests = new_requests((2048, 2048), cell_s=0.01, load_s=0.01)
    executor = new_executor()
    handles = executor.submit_all([each.request() for each in requests])
    executor.close()
    executor.close()
    for handle in handles:
        assert isinstance(handle.ended.exception(0), RestoreCancelled)
        assert isinstance(handle.first_token.exception(0), RestoreCancelled)
    with pytest.raises(ConfigError, match="closed"):
        executor.submit(requests[0].request())
    assert_all_freed(requests)


def test_an_exception_in_the_block_ends_the_batch():
    requests = new_requests((4096,), cell_s=0.05)
    handles = []

    def block():
        with new_executor() as executor:
            handles.append(executor.submit(requests[0].request()))
            raise KeyError

    with pytest.raises(KeyError):
        block()
    (handle,) = handles
    assert isinstance(handle.ended.exception(0), RestoreCancelled)
    assert_all_freed(requests)


def test_cancel_of_one_request_leaves_the_others_alone():
    requests = new_requests((2048, 1024, 1024), cell_s=0.002, load_s=0.002)
    begun = threading.Event()
    requests[0].compute.on_recompute = lambda tile: begun.set()
    with new_executor("fcfs", options=PATIENT) as executor:
        handles = executor.submit_all([each.request() for each in requests])
        assert begun.wait(30)
        handles[0].cancel()
        with pytest.raises(RestoreCancelled, match="request 0 cancelled after"):
            handles[0].result(30)
        frozen = requests[0].buffer.cells.copy()
        for handle in handles[1:]:
            handle.result(30)
        assert (requests[0].buffer.cells == frozen).all(), "a read was placed after the request had ended"
        handles[1].cancel()
    assert all(each.is_right() for each in requests[1:])
    assert_all_freed(requests)


def test_requests_wait_for_memory_and_count_from_their_arrival():
    requests = new_requests((512, 512, 512), num_tokens=60, cell_s=0.003, load_s=0.003)
    with new_executor("fcfs", admission=Admission(100)) as executor:
        handles = executor.submit_all([each.request() for each in requests])
        with pytest.raises(PromptError, match="101 tokens, memory holds 100"):
            executor.submit(FakeRequest(problem(512), FakeLink(), num_tokens=101).request())
    outcomes = [handle.result(0) for handle in handles]
    assert all(each.is_right() for each in requests)
    for before, after in pairwise(outcomes):
        assert after.admitted_s >= before.token_s[-1]
    assert outcomes[0].admitted_s < outcomes[1].admitted_s < outcomes[2].admitted_s < outcomes[2].report.ttft_s


def test_a_cancelled_request_leaves_the_queue_for_memory():
    requests = new_requests((2048, 512), num_tokens=60, cell_s=0.005)
    with new_executor("fcfs", admission=Admission(100)) as executor:
        handles = executor.submit_all([each.request() for each in requests])
        handles[1].cancel()
        with pytest.raises(RestoreCancelled):
            handles[1].result(30)
        assert not handles[0].ended.done()
    assert requests[1].num_prepared == 0
    assert requests[0].is_right()


@pytest.mark.parametrize("restore", ["cake", "cacheflow"])
def test_tokens_come_within_the_budget_while_others_restore(restore):
    """A whole chunk of Cake takes 40 ms; with a budget of 15 ms tokens come after every few blocks of it.

    On a clock that only compute and decoding move.
    """
    clock = ManualClock()
    answering = FakeRequest(problem(0), FakeLink(), num_answer=25, step_s=0.001, sleep=clock.sleep)
    restoring = FakeRequest(problem(8192, num_blocks=8), FakeLink(), cell_s=0.005, load_s=10.0, sleep=clock.sleep)
    pace, options = DecodePace(budget_s=0.015), replace(PATIENT, clock=clock)
    with new_executor("fcfs", restore=restore, pace=pace, options=options, bytes_per_s=1e3) as executor:
        first, second = executor.submit_all([answering.request(), restoring.request()])
        outcome = first.result(30)
        second.cancel()
    assert len(outcome.itl_s) == 24
    assert max(outcome.itl_s) <= 0.015 + 0.005 + 0.001 + 1e-9, "at most the budget, one cell and a round"
    assert min(outcome.itl_s[1:]) >= 0.005 + 0.001 - 1e-9, "the other request is restored between any two tokens"


def test_decoding_alone_waits_for_nothing():
    clock = ManualClock()
    answering = FakeRequest(problem(512), FakeLink(), num_answer=50, step_s=0.001, sleep=clock.sleep)
    options = replace(PATIENT, clock=clock)
    with new_executor(pace=DecodePace(budget_s=10.0), options=options) as executor:
        outcome = executor.submit(answering.request()).result(30)
    assert outcome.itl_s == pytest.approx([0.001] * 49)


def test_an_answer_that_fails_ends_its_request_only():
    requests = new_requests((512, 1024), num_answer=5, cell_s=0.001)

    def fail():
        raise RuntimeError("out of memory")

    requests[0].decode.step = fail
    requests[0].decode.start = lambda: True
    with new_executor("fcfs") as executor:
        handles = executor.submit_all([each.request() for each in requests])
    assert handles[0].first_token.exception(0) is None
    assert isinstance(handles[0].ended.exception(0), RuntimeError)
    assert requests[1].is_right()


class Follower(FakeRequest):
    """Follows the oldest running request that has enough chunks for a number of them, copied into nothing."""

    num_chunks = 3
    copied_when: list[int]

    def prepare(self, running) -> Prepared:
        prepared = super().prepare(running)
        leaders = [each for each in running if each.tag.problem.grid.num_chunks >= self.num_chunks]
        if not leaders:
            return prepared
        buffer = leaders[0].tag.buffer
        self.copied_when = []

        def copy():
            self.copied_when.append(bool((buffer.cells[: self.num_chunks] >= 0).all()))

        follow = Follow(leader=leaders[0], num_chunks=self.num_chunks, copy=copy)
        return replace(prepared, follow=follow)


def tagged(fake):
    return replace(fake.request(), tag=fake)


@pytest.mark.parametrize("policy", ["fcfs", "mean_ttft"])
def test_a_follower_starts_when_its_share_is_there(policy):
    link = FakeLink()
    leader = FakeRequest(problem(2048), link, cell_s=0.002, load_s=0.002)
    followers = [Follower(problem(512), link), Follower(problem(0), link)]
    begun = threading.Event()
    leader.compute.on_recompute = lambda tile: begun.set()
    with new_executor(policy, options=PATIENT) as executor:
        executor.submit(tagged(leader))
        assert begun.wait(30)
        executor.submit_all([tagged(each) for each in followers])
    assert all(each.is_right() for each in (leader, *followers))
    assert [each.copied_when for each in followers] == [[True], [True]]
    assert [each.num_prepared for each in followers] == [1, 1]


@pytest.mark.parametrize("how", ["cancel", "fail"])
def test_followers_are_prepared_anew_when_their_leader_does_not_get_there(how):
    link = FakeLink()
    leader = FakeRequest(problem(2048), link, cell_s=0.005, load_s=0.005)
    begun = threading.Event()

    def on_recompute(tile):
        begun.set()
        if how == "fail" and tile.block_lo == 2:
            raise RuntimeError("device lost")

    leader.compute.on_recompute = on_recompute
    followers = [Follower(problem(512), link), Follower(problem(1024), link)]
    for each in followers:
        each.num_chunks = 4  # all of the leader's
    with new_executor("fcfs", options=PATIENT) as executor:
        handles = executor.submit_all([tagged(each) for each in (leader, *followers)])
        assert begun.wait(30)
        if how == "cancel":
            handles[0].cancel()
        with pytest.raises((RestoreCancelled, RuntimeError)):
            handles[0].result(30)
        for handle in handles[1:]:
            handle.result(30)
    assert [each.num_prepared for each in followers] == [2, 2]
    assert all(each.is_right() for each in followers)
    assert_all_freed([leader, *followers])


def test_a_follower_that_wants_too_much_ends_alone():
    link = FakeLink()
    leader = FakeRequest(problem(1024), link)
    greedy = FakeRequest(problem(512), link)

    def prepare(running):
        prepared = FakeRequest.prepare(greedy, running)
        return replace(prepared, follow=Follow(leader=running[0], num_chunks=3, copy=lambda: None))

    with new_executor("fcfs") as executor:
        handles = executor.submit_all([tagged(leader), replace(greedy.request(), prepare=prepare)])
        with pytest.raises(ConfigError, match="wants 3 chunks of request 0, which restores 2"):
            handles[1].result(30)
    assert leader.is_right()


class BrokenScheduler(BatchScheduler):
    """Raises in one of its claims."""

    broken = ""

    def claim_read(self, now_s):
        if self.broken == "load" and len(self) > 1:
            raise ZeroDivisionError
        return super().claim_read(now_s)

    def claim_compute(self, now_s):
        if self.broken == "compute" and len(self) > 1:
            raise ZeroDivisionError
        return super().claim_compute(now_s)


def broken_executor(broken):
    scheduler = BrokenScheduler(make_batch_policy("fcfs", make_policy("load")), LiveRates(bytes_per_s=1e9))
    scheduler.broken = broken
    return BatchExecutor(scheduler, options=PATIENT)


def test_without_its_io_thread_the_batch_goes_on_by_compute(caplog):
    requests = new_requests((1024, 512, 700))
    with broken_executor("load") as executor:
        executor.submit_all([each.request() for each in requests[:2]])
        executor.drain()
        executor.submit(requests[2].request())
    assert all(each.is_right() for each in requests)
    assert "I/O thread failed" in caplog.text
    assert_all_freed(requests)


def test_without_its_compute_loop_every_request_ends(caplog):
    requests = new_requests((1024, 512))
    with broken_executor("compute") as executor:
        handles = executor.submit_all([each.request() for each in requests])
        for handle in handles:
            assert isinstance(handle.ended.exception(30), ZeroDivisionError)
        with pytest.raises(ConfigError, match="closed"):
            executor.submit(requests[0].request())
    assert "compute loop failed" in caplog.text
    assert_all_freed(requests)


def test_leaders_stand_before_their_followers():
    class Backwards:
        name = "backwards"

        def rank(self, now_s, waiting):
            ids = tuple(reversed(waiting))
            return Ranking(compute=ids, link=ids)

    leader_of = {4: 2, 2: 1, 3: 9}
    order = LeadersFirst(Backwards(), leader_of.get).rank(0.0, (0, 1, 2, 3, 4))
    assert order.compute == order.link == (1, 2, 4, 3, 0)
