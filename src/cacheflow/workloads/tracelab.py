"""TraceLab's rounds: what coding agents sent, and how much of it the provider's cache had.

Source: uw-syfi/TraceLab.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from cacheflow.workloads.lengths import parse_time
from cacheflow.workloads.prefix_ids import PromptTree
from cacheflow.workloads.records import Record
from cacheflow.workloads.request import TraceRequest
from cacheflow.workloads.turns import TraceTurn, end_to_end, to_requests

_INPUT_EVENTS = frozenset({"user_message", "tool_result"})


def read_tracelab(records: Iterator[Record], block_tokens: int) -> Iterator[TraceRequest]:
    """Requests of a round trace, grouped by session; one session is held at a time.

    A round is sent at its last input event and ends at its last event. ``prefix_tokens`` is what the provider's cache
    hit, so it is at most what could have been reused; a session's first round shares with nobody here, because whose
    prefix it hit is not known. Sessions follow one another on the clock.

    Raises:
        TraceError: A field is missing or wrong.
    """
    return to_requests(end_to_end(_sessions(records, block_tokens)), block_tokens)


def _sessions(records: Iterator[Record], block_tokens: int) -> Iterator[list[TraceTurn]]:
    fresh_ids = itertools.count()
    for session_id, rounds in itertools.groupby(records, key=lambda record: record.text("session_id")):
        prompts = PromptTree(block_tokens=block_tokens, fresh_ids=fresh_ids)
        yield [_turn(record, session_id, prompts) for record in rounds]


def _turn(record: Record, session_id: str, prompts: PromptTree) -> TraceTurn:
    num_tokens = record.count("input_tokens_total", least=1)
    cached = record.count("prefix_tokens")
    if cached > num_tokens:
        record.complain(f"prefix_tokens is {cached}; expected at most input_tokens_total, {num_tokens}")
    at_s, end_s = _span_s(record)
    return TraceTurn(
        session_id=session_id,
        at_s=at_s,
        end_s=end_s,
        input_tokens=num_tokens,
        output_tokens=record.count("output_tokens"),
        block_ids=prompts.extend(shared_tokens=cached, num_tokens=num_tokens),
    )


def _span_s(record: Record) -> tuple[float, float]:
    events = [
        (parse_time(event, "timestamp").timestamp(), event.text("event_type"))
        for event in record.children("timing_events")
    ]
    if not events:
        record.complain("timing_events is empty; expected at least one event")
    sent = [time_s for time_s, kind in events if kind in _INPUT_EVENTS]
    end_s = max(time_s for time_s, _ in events)
    return (max(sent) if sent else min(time_s for time_s, _ in events)), end_s
