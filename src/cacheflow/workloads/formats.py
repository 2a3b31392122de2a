"""The trace formats we read, and how a file's first record tells which one it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cacheflow.errors import ConfigError, TraceError
from cacheflow.workloads.claudecode import read_claudecode_requests, read_claudecode_sessions
from cacheflow.workloads.lengths import read_azure, read_etalon
from cacheflow.workloads.lmcache_agent import read_lmcache_agent
from cacheflow.workloads.mooncake import read_mooncake
from cacheflow.workloads.records import Record
from cacheflow.workloads.request import TraceRequest
from cacheflow.workloads.saved import read_saved
from cacheflow.workloads.tracelab import read_tracelab


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """One layout of records.

    Attributes:
        name: What ``read_trace`` calls it; two layouts of one source share a name.
        fields: Fields that no other format has together.
        read: Turns the records of a file into requests of blocks of the size given.
    """

    name: str
    fields: frozenset[str]
    read: Callable[[Iterator[Record], int], Iterator[TraceRequest]]


FORMATS = (
    TraceFormat("cacheflow", frozenset({"request_id", "block_ids", "block_tokens"}), read_saved),
    TraceFormat("mooncake", frozenset({"timestamp", "input_length", "hash_ids"}), read_mooncake),
    TraceFormat("claudecode", frozenset({"id", "block_size", "requests"}), read_claudecode_sessions),
    TraceFormat("claudecode", frozenset({"trace", "t", "input", "reused_tokens"}), read_claudecode_requests),
    TraceFormat("lmcache-agent", frozenset({"timestamp", "input", "output", "session_id"}), read_lmcache_agent),
    TraceFormat("azure", frozenset({"TIMESTAMP", "ContextTokens"}), read_azure),
    TraceFormat("etalon", frozenset({"num_prefill_tokens", "num_decode_tokens"}), read_etalon),
    TraceFormat("tracelab", frozenset({"session_id", "input_tokens_total", "prefix_tokens"}), read_tracelab),
)

FORMAT_NAMES = tuple(dict.fromkeys(known.name for known in FORMATS))
"""The names ``read_trace`` knows, beside ``auto``."""


def check_format(name: str) -> None:
    """Refuse a name that is neither ``auto`` nor one of ``FORMAT_NAMES``.

    Raises:
        ConfigError: It is not; the message lists the known ones.
    """
    if name != "auto" and name not in FORMAT_NAMES:
        raise ConfigError(f"trace format {name!r} is not known; expected auto, {', '.join(FORMAT_NAMES)}")


def find_format(first: Record, name: str) -> TraceFormat:
    """The format whose fields the first record has; with a name other than ``auto``, among the layouts of that name.

    Where a named format has one layout only, that is it: a field that the record lacks is then named by the reader.

    Raises:
        TraceError: The record fits none.
    """
    candidates = [known for known in FORMATS if name in ("auto", known.name)]
    for candidate in candidates:
        if candidate.fields <= first.fields.keys():
            return candidate
    if len(candidates) == 1:
        return candidates[0]
    has = ", ".join(str(field) for field in first.fields)
    wanted = "; ".join(f"{known.name} has {', '.join(sorted(known.fields))}" for known in candidates)
    raise TraceError(f"{first.place}: no known trace format has the fields {has}; expected one of: {wanted}")
