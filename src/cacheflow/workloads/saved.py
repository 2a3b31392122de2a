"""Our own trace file: JSON lines that hold exactly the fields of ``TraceRequest``."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from cacheflow.errors import ConfigError, TraceError
from cacheflow.workloads.prefix_ids import reblock
from cacheflow.workloads.records import Record
from cacheflow.workloads.request import TraceRequest

_NAMES = frozenset(field.name for field in dataclasses.fields(TraceRequest))


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> int:
    """Write requests one a line, streamed; ``read_trace`` with the same ``block_tokens`` gives equal ones back.

    Args:
        path: Ends in .jsonl, or in .jsonl.gz to be compressed.
        requests: In trace order.

    Returns:
        The number of requests written.

    Raises:
        ConfigError: The file has another ending.
    """
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"trace {path}: expected a file that ends in .jsonl or .jsonl.gz")
    written = 0
    with _open_for_writing(path) as file:
        for request in requests:
            file.write(json.dumps(dataclasses.asdict(request), separators=(",", ":")) + "\n")
            written += 1
    return written


def _open_for_writing(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "wt", encoding="utf-8")
    return path.open("w", encoding="utf-8")


def read_saved(records: Iterator[Record], block_tokens: int) -> Iterator[TraceRequest]:
    """Requests that ``write_trace`` wrote, streamed; renamed to blocks of ``block_tokens`` where they were of others.

    Raises:
        TraceError: A field is missing, unknown or wrong, numbers are not 0, 1, 2…, or time goes backwards.
    """
    previous_s = 0.0
    for position, record in enumerate(records):
        request = _request(record)
        if request.request_id != position:
            record.complain(f"request_id is {request.request_id}; expected {position}: 0, 1, 2… in trace order")
        if request.arrival_s < previous_s:
            record.complain(
                f"arrival_s {request.arrival_s} comes after {previous_s}; expected time not to go backwards"
            )
        previous_s = request.arrival_s
        yield _in_blocks_of(block_tokens, request)


def _request(record: Record) -> TraceRequest:
    if unknown := sorted(record.fields.keys() - _NAMES):
        record.complain(f"unknown field {unknown[0]}; expected {', '.join(sorted(_NAMES))}")
    after = record.fields.get("after")
    try:
        return TraceRequest(
            request_id=record.count("request_id"),
            arrival_s=record.number("arrival_s"),
            input_tokens=record.count("input_tokens", least=1),
            output_tokens=record.count("output_tokens", least=1),
            block_ids=tuple(record.ids("block_ids")),
            block_tokens=record.count("block_tokens", least=1),
            session_id=record.text("session_id"),
            after=None if after is None else record.count("after"),
            delay_s=record.number("delay_s"),
        )
    except TraceError as error:
        if str(error).startswith(record.place):
            raise
        raise TraceError(f"{record.place}: {error}") from error


def _in_blocks_of(block_tokens: int, request: TraceRequest) -> TraceRequest:
    if request.block_tokens == block_tokens:
        return request
    ids = reblock(
        request.block_ids, num_tokens=request.input_tokens, from_tokens=request.block_tokens, to_tokens=block_tokens
    )
    return dataclasses.replace(request, block_ids=ids, block_tokens=block_tokens)
