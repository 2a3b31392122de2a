"""Traces that know lengths but no prefixes: Azure's (with arrivals) and etalon's (without). Nothing is shared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime

from cacheflow.workloads.records import Record
from cacheflow.workloads.request import TraceRequest, num_blocks


def read_azure(records: Iterator[Record], block_tokens: int) -> Iterator[TraceRequest]:
    """Requests of an Azure LLM inference trace (Azure/AzurePublicDataset, 2023 and 2024), streamed.

    Raises:
        TraceError: A field is missing or wrong, or time goes backwards.
    """
    fresh_ids = itertools.count()
    start: datetime | None = None
    previous: datetime | None = None
    for request_id, record in enumerate(records):
        now = parse_time(record, "TIMESTAMP")
        if previous is not None and now < previous:
            record.complain(f"TIMESTAMP {now} comes after {previous}; expected time not to go backwards")
        previous = now
        start = now if start is None else start
        num_tokens = record.count("ContextTokens", least=1)
        yield TraceRequest(
            request_id=request_id,
            arrival_s=(now - start).total_seconds(),
            input_tokens=num_tokens,
            output_tokens=max(1, record.count("GeneratedTokens")),
            block_ids=_own_prefix(fresh_ids, num_tokens, block_tokens),
            block_tokens=block_tokens,
        )


def read_etalon(records: Iterator[Record], block_tokens: int) -> Iterator[TraceRequest]:
    """Requests of a length file of project-etalon/etalon, streamed; all arrive at 0, ``retime`` spreads them.

    Raises:
        TraceError: A field is missing or wrong.
    """
    fresh_ids = itertools.count()
    for request_id, record in enumerate(records):
        num_tokens = record.count("num_prefill_tokens", least=1)
        yield TraceRequest(
            request_id=request_id,
            arrival_s=0.0,
            input_tokens=num_tokens,
            output_tokens=max(1, record.count("num_decode_tokens")),
            block_ids=_own_prefix(fresh_ids, num_tokens, block_tokens),
            block_tokens=block_tokens,
        )


def parse_time(record: Record, field: str) -> datetime:
    """An ISO 8601 time, taken as UTC where it names no zone.

    Raises:
        TraceError: The field is missing or holds anything else.
    """
    text = record.text(field)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        record.complain(f"{field} is {text!r}; expected a time such as 2023-11-16 18:17:03.979960")
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _own_prefix(fresh_ids: Iterator[int], num_tokens: int, block_tokens: int) -> tuple[int, ...]:
    return tuple(itertools.islice(fresh_ids, num_blocks(num_tokens, block_tokens)))
