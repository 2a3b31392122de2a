"""LMCache's agent traces: the full text of every prompt, sent by agents that ran side by side.

Source: LMCache/lmcache-agent-trace (mini-swe-agent, tau-bench, Magentic-One).
"""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.workloads.prefix_ids import text_block_ids
from cacheflow.workloads.records import Record
from cacheflow.workloads.request import TraceRequest, num_blocks
from cacheflow.workloads.turns import TraceTurn, to_requests

CHARS_PER_TOKEN = 4
"""Characters taken as one token. English prose and code come to 3.5 to 4.5 with today's vocabularies."""


def read_lmcache_agent(records: Iterator[Record], block_tokens: int) -> Iterator[TraceRequest]:
    """Requests in order of time, with token counts estimated from characters.

    The file is grouped by session while sessions overlap in time, so all rows are read before the first request comes.
    Texts are not kept, only the ids of their blocks. Rows with an empty prompt are left out. The file does not say when
    an answer was complete: ``delay_s`` is the time between two calls.

    Raises:
        TraceError: A field is missing or wrong, or every prompt is empty.
    """
    turns: list[TraceTurn] = []
    record: Record | None = None
    for record in records:
        if record.text("input"):
            turns.append(_turn(record, block_tokens))
    if record is not None and not turns:
        record.complain("input is empty here and in every row above; expected the text of a prompt")
    turns.sort(key=lambda turn: turn.at_s)
    yield from to_requests(turns, block_tokens)


def _turn(record: Record, block_tokens: int) -> TraceTurn:
    text = record.text("input")
    at_s = record.count("timestamp") / 1e6
    return TraceTurn(
        session_id=record.text("session_id"),
        at_s=at_s,
        end_s=at_s,
        input_tokens=num_blocks(len(text), CHARS_PER_TOKEN),
        output_tokens=num_blocks(len(record.text("output")), CHARS_PER_TOKEN),
        block_ids=text_block_ids(text, block_tokens * CHARS_PER_TOKEN),
    )
