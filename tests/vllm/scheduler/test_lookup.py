"""The question to the store, asked off the scheduler's thread."""

from concurrent.futures import Future

from cacheflow.vllm.scheduler.lookup import Lookup, PrefixLookup
from support.gated_store import GatedStore
from support.store_objects import key, put
from support.waiting import eventually


class Watched(Future):
    """A future that notes how long it was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_s: list[float] = []

    def result(self, timeout: float | None = None) -> int:
        assert timeout is not None
        self.waited_s.append(timeout)
        return super().result(timeout)


def test_a_slow_store_is_waited_for_once_a_request_and_not_in_every_step():
    future, now_s = Watched(), 0.0
    lookup = Lookup(future, 0, deadline_at_s=1.0, clock=lambda: now_s)
    assert [lookup.poll() for _ in range(50)] == [None] * 50
    assert [wait_s for wait_s in future.waited_s if wait_s > 0] == future.waited_s[:1]
    future.set_result(7)
    assert lookup.poll() == 7
    assert not lookup.timed_out


def test_after_the_deadline_the_answer_is_nothing_even_when_it_comes_later():
    future, now_s = Watched(), 0.0
    assert future.set_running_or_notify_cancel()
    lookup = Lookup(future, 0, deadline_at_s=1.0, clock=lambda: now_s)
    assert lookup.poll() is None
    now_s = 1.0
    assert lookup.poll() == 0
    future.set_result(7)
    assert lookup.poll() == 0
    assert lookup.timed_out


def test_what_was_given_up_while_the_store_hung_is_not_asked_once_it_answers():
    asked, now_s = [], 0.0

    class Asked(GatedStore):
        def holds(self, keys):
            asked.append(keys)
            return super().holds(keys)

    store = Asked()
    put(store, 7)
    store.questions.clear()
    asked.clear()
    lookup = PrefixLookup(store, timeout_s=1.0, clock=lambda: now_s, num_threads=1)
    given_up = [lookup.start([[key(number)]]) for number in range(5)]
    eventually(lambda: len(asked) == 1)
    now_s = 1.0
    assert [each.poll() for each in given_up] == [0] * 5
    fresh = lookup.start([[key(7)]])
    store.open_gates()
    eventually(lambda: fresh.poll() == 1)
    assert asked == [[key(0)], [key(7)]]
    lookup.close()
    store.close()
