"""The question to the store, asked off the scheduler's thread."""

from concurrent.futures import Future

from cacheflow.vllm.scheduler.lookup import Lookup


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
    lookup = Lookup(future, 0, deadline_at_s=1.0, clock=lambda: now_s)
    assert lookup.poll() is None
    now_s = 1.0
    assert lookup.poll() == 0
    future.set_result(7)
    assert lookup.poll() == 0
    assert lookup.timed_out
