"""A clock that only sleeping and the test move."""


class ManualClock:
    """Monotonic seconds; one thread moves it."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
