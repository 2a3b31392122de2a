"""Which waiting requests are let in, when their keys and values must fit in memory together.

Pure: time and the order are passed in. Who does not fit may be passed by others that do, but not for ever: one that has
waited ``starvation_s`` holds the door until it fits.
"""

from __future__ import annotations

from collections.abc import Sequence

from cacheflow.errors import ConfigError, PromptError


class Admission:
    """Counts the tokens of KV memory that requests hold; not thread-safe."""

    def __init__(self, capacity_tokens: int | None = None, *, starvation_s: float = float("inf")) -> None:
        """Start empty.

        Args:
            capacity_tokens: Tokens of KV that fit; None for no limit.
            starvation_s: A request that has waited this long is passed by nobody any more.

        Raises:
            ConfigError: A value is out of range.
        """
        if capacity_tokens is not None and capacity_tokens < 1:
            raise ConfigError(f"capacity_tokens is {capacity_tokens}, must be at least 1, or None for no limit")
        if not starvation_s > 0:
            raise ConfigError(f"starvation_s is {starvation_s}, must be above 0 seconds")
        self.capacity_tokens = capacity_tokens
        self._starvation_s = starvation_s
        self._waiting: dict[int, tuple[int, float]] = {}
        self._held: dict[int, int] = {}

    @property
    def held_tokens(self) -> int:
        """Tokens of the requests that are in."""
        return sum(self._held.values())

    def ask(self, request_id: int, num_tokens: int, *, arrival_s: float) -> None:
        """Let a request wait for room.

        Raises:
            PromptError: It does not fit even alone.
            ConfigError: The name is taken.
        """
        self.check(num_tokens)
        if request_id in self._waiting or request_id in self._held:
            raise ConfigError(f"request {request_id} has asked for room already")
        self._waiting[request_id] = (num_tokens, arrival_s)

    def check(self, num_tokens: int) -> None:
        """Pass if a request of so many tokens fits alone.

        Raises:
            PromptError: It does not.
        """
        if self.capacity_tokens is not None and num_tokens > self.capacity_tokens:
            raise PromptError(
                f"the request needs keys and values of {num_tokens} tokens, memory holds {self.capacity_tokens}: "
                "shorten the prompt or the answer, or raise kv_capacity_tokens"
            )

    def admit(self, order: Sequence[int], now_s: float) -> list[int]:
        """Let in whoever fits, and return them.

        Args:
            order: Every request that waits, first served first.
            now_s: On the clock of ``arrival_s``.
        """
        starved = [name for name in order if self._has_starved(name, now_s)]
        starved.sort(key=lambda name: self._waiting[name][1])
        passed = frozenset(starved)
        admitted = []
        for request_id in (*starved, *(name for name in order if name not in passed)):
            num_tokens = self._waiting[request_id][0]
            if self.capacity_tokens is None or self.held_tokens + num_tokens <= self.capacity_tokens:
                del self._waiting[request_id]
                self._held[request_id] = num_tokens
                admitted.append(request_id)
            elif request_id in passed:
                break
        return admitted

    def release(self, request_id: int) -> None:
        """Take a request out: it has ended, or waits no longer."""
        self._waiting.pop(request_id, None)
        self._held.pop(request_id, None)

    def _has_starved(self, request_id: int, now_s: float) -> bool:
        return now_s - self._waiting[request_id][1] > self._starvation_s
