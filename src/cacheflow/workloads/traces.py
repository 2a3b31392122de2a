"""Request traces from files: one door for every format."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from cacheflow.errors import ConfigError, TraceError
from cacheflow.workloads.formats import FORMAT_NAMES, check_format, find_format
from cacheflow.workloads.records import Record, read_records
from cacheflow.workloads.request import TraceRequest
from cacheflow.workloads.saved import write_trace

__all__ = ["FORMAT_NAMES", "read_trace", "write_trace"]


def read_trace(
    path: Path, *, format: str = "auto", block_tokens: int = 512, limit: int | None = None
) -> Iterator[TraceRequest]:
    """The requests of a trace, in order of arrival.

    Streams: beyond the request at hand, memory holds what tells prefixes apart (for most formats nothing, for sessions
    the one being read). Only ``lmcache-agent`` must be read whole first, because its file is not in order of time.

    Args:
        path: Ends in .jsonl, .jsonl.gz, .csv, .csv.gz or .parquet.
        format: One of ``FORMAT_NAMES``, or ``auto`` to tell from the first record.
        block_tokens: Tokens that one block id stands for, whatever the trace's own blocks are.
        limit: Stop after so many requests; None reads all.

    Raises:
        ConfigError: An argument is wrong, the file cannot be opened, or it is parquet and pyarrow is not installed;
            about the arguments at once, about the file when the first request is asked for.
        TraceError: The file's content is wrong, when the request concerned is asked for.
    """
    check_format(format)
    if block_tokens < 1:
        raise ConfigError(f"block_tokens {block_tokens} must be 1 or more")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} must be 1 or more, or None for the whole trace")
    return itertools.islice(_requests(path, read_records(path), format, block_tokens), limit)


def _requests(path: Path, records: Iterator[Record], name: str, block_tokens: int) -> Iterator[TraceRequest]:
    first = next(records)
    try:
        yield from find_format(first, name).read(itertools.chain([first], records), block_tokens)
    except TraceError as error:
        if str(error).startswith(str(path)):
            raise
        raise TraceError(f"{path}: {error}") from error  # what a request is refused for knows its number alone
