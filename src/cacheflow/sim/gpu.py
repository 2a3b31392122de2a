"""A GPU that decodes beside what it is given to compute.

One step decodes one token for every request that has its first. While there is work (recomputed tiles, new tokens),
a step follows at the latest after every ``budget_s`` seconds of it; without, steps follow each other and many
are taken as one event, which new work cuts short at the end of the step under way. Steps and work do not overlap:
an engine that runs both in one pass reads the weights once less.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import partial

from cacheflow.errors import ConfigError
from cacheflow.sim.clock import EventLoop

StepCost = Callable[[int, int], float]
"""Seconds of a step by number of requests and the tokens of context of all of them."""


class DecodeBatch:
    """The requests that decode, one token each a step.

    Attributes:
        context_tokens: Tokens of context of all of them now.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.context_tokens = 0
        self._steps = 0
        # Step at which a request ends, its name, its context then.
        self._ends: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        """Number of requests."""
        return len(self._ends)

    def add(self, request_id: int, *, context_tokens: int, num_tokens: int) -> None:
        """Let a request decode so many tokens from now."""
        heapq.heappush(self._ends, (self._steps + num_tokens, request_id, context_tokens + num_tokens))
        self.context_tokens += context_tokens

    @property
    def steps_left(self) -> int:
        """Steps until the first of them ends; it must not be empty."""
        return self._ends[0][0] - self._steps

    def advance(self, num_steps: int) -> list[int]:
        """Take steps, no more than ``steps_left``; returns who ended."""
        self._steps += num_steps
        self.context_tokens += num_steps * len(self._ends)
        ended = []
        while self._ends and self._ends[0][0] <= self._steps:
            _, request_id, context_tokens = heapq.heappop(self._ends)
            self.context_tokens -= context_tokens
            ended.append(request_id)
        return ended


class Gpu:
    """One compute resource; see ``Compute``.

    Attributes:
        given_busy_s: Seconds spent on that work.
        decode_busy_s: Seconds spent on decode steps.
        decoded_tokens: Tokens those gave.
    """

    def __init__(self, loop: EventLoop, step_s: StepCost, *, budget_s: float, ended: Callable[[int], None]) -> None:
        """Start idle.

        Args:
            loop: The virtual clock.
            step_s: What a decode step costs.
            budget_s: Seconds of work after which a decode step is due.
            ended: Called with a request's name when it has all its tokens.

        Raises:
            ConfigError: The budget is not above 0.
        """
        if not budget_s > 0:
            raise ConfigError(f"recompute_budget_s is {budget_s}, must be above 0")
        self._loop, self._step_s, self._budget_s, self._ended = loop, step_s, budget_s, ended
        self.wake: Callable[[], None] = lambda: None
        """Called when decoding has made room for more work."""
        self.given_busy_s = self.decode_busy_s = 0.0
        self.decoded_tokens = 0
        self._batch = DecodeBatch()
        self._since_step_s = 0.0
        self._ordered = False
        self._leap: _Leap | None = None

    @property
    def num_decoding(self) -> int:
        """Requests that have a first token and wait for more."""
        return len(self._batch)

    def decode(self, request_id: int, *, context_tokens: int, num_tokens: int) -> None:
        """Give a request so many more tokens, 1 or more; call it between pieces of work."""
        self._batch.add(request_id, context_tokens=context_tokens, num_tokens=num_tokens)

    def acquire(self) -> bool:
        """Whether work may start now; otherwise ``wake`` is called at the end of the decode step under way."""
        if self._leap is not None:
            self._cut_short(self._leap)
        return self._leap is None and not self._ordered

    def run(self, seconds: float, done: Callable[[], None]) -> None:
        """Carry out work, decode steps in between as often as they are due, then call back."""
        self._ordered = True
        end_s = self._loop.now_s + seconds + self._steps_within(seconds)
        self.given_busy_s += seconds
        self._loop.at(end_s, lambda: self._end_order(done), priority=1)

    def leave(self) -> None:
        """There is no work: decode until a request ends or work comes."""
        if self._leap is not None or self._ordered or not self._batch:
            return
        num_steps = self._batch.steps_left
        # Costs are affine in the context, so that the middle step stands for all of them.
        middle_tokens = self._batch.context_tokens + len(self._batch) * (num_steps - 1) // 2
        step_s = self._step_s(len(self._batch), middle_tokens)
        self._since_step_s = 0.0
        self._start_leap(_Leap(self._loop.now_s, num_steps, step_s))

    def _steps_within(self, seconds: float) -> float:
        """Take the decode steps that fall due within such work; returns their seconds."""
        start_s, spent_s, left_s = self._loop.now_s, 0.0, self._since_step_s + seconds
        worked_s = -self._since_step_s
        while self._batch and left_s >= self._budget_s:
            num_steps = min(int(left_s / self._budget_s), self._batch.steps_left)
            step_s = self._step_s(len(self._batch), self._batch.context_tokens)
            left_s -= num_steps * self._budget_s
            worked_s += num_steps * self._budget_s
            spent_s += num_steps * step_s
            at_s = start_s + max(0.0, worked_s) + spent_s
            for request_id in self._take(num_steps, num_steps * step_s):
                self._loop.at(at_s, partial(self._ended, request_id))
        self._since_step_s = left_s if self._batch else 0.0
        return spent_s

    def _take(self, num_steps: int, seconds: float) -> list[int]:
        """Count steps; returns who ended with the last of them."""
        self.decode_busy_s += seconds
        self.decoded_tokens += num_steps * len(self._batch)
        return self._batch.advance(num_steps)

    def _start_leap(self, leap: _Leap) -> None:
        self._leap = leap
        # max: the end of the step under way may round to before now.
        self._loop.at(max(leap.end_s, self._loop.now_s), lambda: self._end_leap(leap), priority=1)

    def _cut_short(self, leap: _Leap) -> None:
        """End a leap with the step under way."""
        done = min(leap.num_steps, max(1, math.ceil((self._loop.now_s - leap.start_s) / leap.step_s)))
        if done < leap.num_steps:
            self._start_leap(_Leap(leap.start_s, done, leap.step_s))

    def _end_leap(self, leap: _Leap) -> None:
        if self._leap is not leap:
            return
        self._leap = None
        for request_id in self._take(leap.num_steps, leap.num_steps * leap.step_s):
            self._ended(request_id)
        self.wake()
        self.leave()

    def _end_order(self, done: Callable[[], None]) -> None:
        self._ordered = False
        done()


class _Leap:
    """Decode steps taken as one event; compared by identity, because one that was cut short is another."""

    __slots__ = ("num_steps", "start_s", "step_s")

    def __init__(self, start_s: float, num_steps: int, step_s: float) -> None:
        self.start_s, self.num_steps, self.step_s = start_s, num_steps, step_s

    @property
    def end_s(self) -> float:
        return self.start_s + self.num_steps * self.step_s
