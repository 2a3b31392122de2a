"""Turns of sessions on their way to requests: numbered, chained to the previous turn, on one clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cacheflow.workloads.request import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTurn:
    """One model call of a session, before it has a number.

    Attributes:
        session_id: The session.
        at_s: When it was sent, on the trace's clock or the session's own.
        end_s: When its answer was complete; ``at_s`` where the trace does not tell.
        think_s: Think or tool time before it as stated by the trace; None where only the gap is known.
        input_tokens: Tokens of the prompt.
        output_tokens: Tokens generated; a 0 counts as the one token that every prefill gives.
        block_ids: As in ``TraceRequest``.
    """

    session_id: str
    at_s: float
    end_s: float
    think_s: float | None = None
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]


def end_to_end(sessions: Iterable[Sequence[TraceTurn]]) -> Iterator[TraceTurn]:
    """Sessions whose clocks all start at their own 0, put one after the other on one clock.

    Turns of a session come in the order they were sent. The trace knows nothing of the time between sessions;
    ``retime`` lays them over each other at a chosen rate.
    """
    offset_s = 0.0
    for session in sessions:
        turns = sorted(session, key=lambda turn: turn.at_s)
        shift_s = offset_s - turns[0].at_s
        for turn in turns:
            yield dataclasses.replace(turn, at_s=turn.at_s + shift_s, end_s=turn.end_s + shift_s)
            offset_s = max(offset_s, turn.end_s + shift_s)


def to_requests(turns: Iterable[TraceTurn], block_tokens: int) -> Iterator[TraceRequest]:
    """Number turns that come in time order and chain each to its session's previous one.

    Turns of a session that ran at the same time (sub-agents) are chained with no delay, in the order they were sent.
    """
    start_s: float | None = None
    previous: dict[str, tuple[int, float]] = {}
    for request_id, turn in enumerate(turns):
        start_s = turn.at_s if start_s is None else start_s
        after, delay_s = None, 0.0
        if turn.session_id in previous:
            after, end_s = previous[turn.session_id]
            delay_s = max(0.0, turn.at_s - end_s)
            if turn.think_s is not None:
                # A sub-agent may have been working meanwhile: the gap to the previous turn is then the shorter one.
                delay_s = min(delay_s, turn.think_s)
        previous[turn.session_id] = (request_id, turn.end_s)
        yield TraceRequest(
            request_id=request_id,
            arrival_s=turn.at_s - start_s,
            input_tokens=turn.input_tokens,
            output_tokens=max(1, turn.output_tokens),
            block_ids=turn.block_ids,
            block_tokens=block_tokens,
            session_id=turn.session_id,
            after=after,
            delay_s=delay_s,
        )
