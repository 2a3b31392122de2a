"""Mooncake's traces: real arrivals, and prefix hashes of 512-token blocks.

Source: kvcache-ai/Mooncake, FAST25-release/traces (conversation, toolagent, synthetic).
"""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.workloads.prefix_ids import check_block_tokens, reblock
from cacheflow.workloads.records import Record
from cacheflow.workloads.request import TraceRequest, num_blocks

HASH_TOKENS = 512
"""Tokens that one of the file's ``hash_ids`` stands for."""


def read_mooncake(records: Iterator[Record], block_tokens: int) -> Iterator[TraceRequest]:
    """Requests of a Mooncake trace, in file order, streamed.

    Raises:
        TraceError: A field is missing or wrong, time goes backwards, or the hashes do not cover the input.
    """
    check_block_tokens(HASH_TOKENS, block_tokens)
    start_ms: float | None = None
    previous_ms = 0.0
    for request_id, record in enumerate(records):
        now_ms = record.number("timestamp")
        start_ms = now_ms if start_ms is None else start_ms
        if now_ms < previous_ms:
            record.complain(f"timestamp {now_ms:g} comes after {previous_ms:g}; expected time not to go backwards")
        previous_ms = now_ms
        num_tokens = record.count("input_length", least=1)
        yield TraceRequest(
            request_id=request_id,
            arrival_s=(now_ms - start_ms) / 1e3,
            input_tokens=num_tokens,
            output_tokens=max(1, record.count("output_length")),
            block_ids=reblock(
                _hash_ids(record, num_tokens), num_tokens=num_tokens, from_tokens=HASH_TOKENS, to_tokens=block_tokens
            ),
            block_tokens=block_tokens,
        )


def _hash_ids(record: Record, num_tokens: int) -> list[int]:
    ids = record.ids("hash_ids")
    needed = num_blocks(num_tokens, HASH_TOKENS)
    # More than needed is as wrong as fewer: another trace with the same field names uses 16-token blocks.
    if len(ids) != needed:
        record.complain(
            f"{len(ids)} hash_ids for input_length {num_tokens}; expected {needed}, one for {HASH_TOKENS} tokens"
        )
    if len(set(ids)) != needed:
        record.complain("hash_ids repeat; expected each once, because an id names the whole prefix up to its block")
    return ids
