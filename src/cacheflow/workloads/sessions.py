"""Multi-turn sessions drawn from a profile: prompts that grow turn by turn, and share what they began with."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import numpy as np

from cacheflow.errors import ConfigError
from cacheflow.workloads.arrivals import ArrivalProcess
from cacheflow.workloads.distributions import Distribution
from cacheflow.workloads.prefix_ids import PromptTree
from cacheflow.workloads.request import TraceRequest
from cacheflow.workloads.session_profile import (
    CODING_AGENT,
    LMSYS_CHAT,
    PROFILES,
    SWE_BENCH,
    WILDCHAT,
    SessionProfile,
)

__all__ = ["CODING_AGENT", "LMSYS_CHAT", "PROFILES", "SWE_BENCH", "WILDCHAT", "SessionProfile", "generate_sessions"]

_ARRIVALS_STREAM = 0
_SESSIONS_STREAM = 1


def generate_sessions(
    profile: SessionProfile,
    *,
    num_sessions: int | None,
    arrivals: ArrivalProcess,
    seed: int,
    block_tokens: int = 512,
    max_tokens: int | None = None,
) -> Iterator[TraceRequest]:
    """Requests of generated sessions, in order of arrival; memory holds the sessions under way.

    ``arrival_s`` takes serving as instantaneous: a turn arrives ``delay_s`` after the one before. Closed-loop replay
    goes by ``after`` and ``delay_s`` instead. A session's lengths and pauses depend on the seed and the session's
    number alone, so that another arrival process gives the same sessions.

    Args:
        profile: What to draw from.
        num_sessions: Sessions to generate; None for no end.
        arrivals: When sessions start.
        seed: Same seed, same requests.
        block_tokens: Tokens in a block.
        max_tokens: Longest prompt, where the profile's own limit is longer.

    Raises:
        ConfigError: A count is less than 1, or ``max_tokens`` leaves nothing after the profile's common tokens.
    """
    for name, value in (("num_sessions", num_sessions), ("block_tokens", block_tokens), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} must be 1 or more")
    if max_tokens is not None and max_tokens <= profile.common_tokens:
        raise ConfigError(
            f"max_tokens {max_tokens} must be more than the {profile.common_tokens} tokens that all prompts of "
            f"{profile.name} begin with"
        )
    starts_s = arrivals.times_s(num_sessions, _generator(seed, _ARRIVALS_STREAM))
    ids = itertools.count()
    common = tuple(itertools.islice(ids, profile.common_tokens // block_tokens))
    sessions = (
        _Session(
            profile=profile,
            number=number,
            start_s=start_s,
            rng=_generator(seed, _SESSIONS_STREAM, number),
            prompts=PromptTree(block_tokens=block_tokens, fresh_ids=ids, common=common),
            max_tokens=max_tokens,
        )
        for number, start_s in enumerate(starts_s)
    )
    return _merged(sessions, block_tokens)


class _Session:
    """One session under way: the turn that comes next, and what it will build on."""

    def __init__(
        self,
        *,
        profile: SessionProfile,
        number: int,
        start_s: float,
        rng: np.random.Generator,
        prompts: PromptTree,
        max_tokens: int | None,
    ) -> None:
        self.session_id = f"{profile.name}-{number}"
        self.at_s = start_s
        self.delay_s = 0.0
        self.after: int | None = None
        self._profile = profile
        self._rng = rng
        self._prompts = prompts
        self._turns_left = _whole(profile.turns, rng)
        limit = _whole(profile.context_tokens, rng)
        self._limit_tokens = max(profile.common_tokens + 1, limit if max_tokens is None else min(limit, max_tokens))
        self._shared_tokens = profile.common_tokens
        self._input_tokens = self._fresh_prompt()

    def emit(self, request_id: int, block_tokens: int) -> TraceRequest:
        """The next turn, under this id."""
        request = TraceRequest(
            request_id=request_id,
            arrival_s=self.at_s,
            input_tokens=self._input_tokens,
            output_tokens=_whole(self._profile.output_tokens, self._rng),
            block_ids=self._prompts.extend(shared_tokens=self._shared_tokens, num_tokens=self._input_tokens),
            block_tokens=block_tokens,
            session_id=self.session_id,
            after=self.after,
            delay_s=self.delay_s,
        )
        self.after = request_id
        return request

    def goes_on(self, last: TraceRequest) -> bool:
        """Prepare the turn after ``last``; False when there is none."""
        self._turns_left -= 1
        if self._turns_left < 1:
            return False
        grown = last.input_tokens + last.output_tokens + _whole(self._profile.new_tokens, self._rng)
        if grown <= self._limit_tokens:
            self._shared_tokens, self._input_tokens = last.input_tokens, grown
        elif self._profile.compacts:
            self._shared_tokens, self._input_tokens = self._profile.common_tokens, self._fresh_prompt()
        else:
            return False
        self.delay_s = self._profile.delay_s.sample(self._rng)
        self.at_s += self.delay_s
        return True

    def _fresh_prompt(self) -> int:
        first = self._profile.common_tokens + _whole(self._profile.first_tokens, self._rng)
        return min(first, self._limit_tokens)


def _merged(sessions: Iterator[_Session], block_tokens: int) -> Iterator[TraceRequest]:
    """All sessions' turns by time; of equal times the session that started first goes first."""
    under_way: list[tuple[float, int, _Session]] = []
    request_ids = itertools.count()
    upcoming = enumerate(sessions)
    following = next(upcoming, None)
    while under_way or following:
        if following and (not under_way or following[1].at_s < under_way[0][0]):
            heapq.heappush(under_way, (following[1].at_s, *following))
            following = next(upcoming, None)
        _, number, session = under_way[0]
        request = session.emit(next(request_ids), block_tokens)
        yield request
        if session.goes_on(request):
            heapq.heapreplace(under_way, (session.at_s, number, session))
        else:
            heapq.heappop(under_way)


def _whole(distribution: Distribution, rng: np.random.Generator) -> int:
    return max(1, round(distribution.sample(rng)))


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *stream])))
