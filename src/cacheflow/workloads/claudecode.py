"""Coding-agent sessions of kv-cache-tester: the original sessions, and one row a request.

Source: callanjfox/kv-cache-tester. Every session has its own clock and, unless it says otherwise, its own hash ids, of
64-token blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from cacheflow.workloads.prefix_ids import PromptTree, check_block_tokens, reblock
from cacheflow.workloads.records import Record
from cacheflow.workloads.request import TraceRequest, num_blocks
from cacheflow.workloads.turns import TraceTurn, end_to_end, to_requests

_Names = dict[tuple[int, int], int]
"""Our id of a prefix by (our id of the prefix one block shorter, the file's hash id)."""

_NO_PARENT = -1


def read_claudecode_sessions(records: Iterator[Record], block_tokens: int) -> Iterator[TraceRequest]:
    """Requests of the original files, one session a line; one session is held at a time.

    Sessions follow one another on the clock, because nothing is known of the time between them. Sub-agents (a request
    that itself holds ``requests``) are turns of their session. The file names whole 64-token blocks only: the tokens
    after the last of them count as shared with nobody.

    Raises:
        TraceError: A field is missing or wrong, or the hashes do not cover the input.
    """
    return to_requests(end_to_end(_sessions(records, block_tokens)), block_tokens)


def read_claudecode_requests(records: Iterator[Record], block_tokens: int) -> Iterator[TraceRequest]:
    """Requests of the table with one row a request, grouped by session; one session is held at a time.

    ``reused_tokens`` says how long the leading run is that the session saw before; it is taken from the session's
    latest prompt that is long enough.

    Raises:
        TraceError: A field is missing or wrong.
    """
    return to_requests(end_to_end(_grouped(records, block_tokens)), block_tokens)


def _sessions(records: Iterator[Record], block_tokens: int) -> Iterator[list[TraceTurn]]:
    fresh_ids = itertools.count()
    common: _Names = {}
    for record in records:
        hash_tokens = record.count("block_size", least=1)
        check_block_tokens(hash_tokens, block_tokens)
        names = common if record.fields.get("hash_id_scope") == "global" else {}
        prompts = _HashedPrompts(hash_tokens, block_tokens, names, fresh_ids)
        turns = [_turn(call, record.text("id"), prompts) for call in _calls(record)]
        if not turns:
            record.complain("requests is empty; expected at least one")
        yield turns


def _calls(record: Record) -> Iterator[Record]:
    for call in record.children("requests"):
        if "requests" in call.fields:
            yield from _calls(call)
        else:
            yield call


def _turn(call: Record, session_id: str, prompts: _HashedPrompts) -> TraceTurn:
    at_s = call.number("t")
    return TraceTurn(
        session_id=session_id,
        at_s=at_s,
        end_s=at_s + (call.optional_number("api_time") or 0.0),
        think_s=call.optional_number("think_time"),
        input_tokens=call.count("in", least=1),
        output_tokens=call.count("out"),
        block_ids=prompts.block_ids(call),
    )


class _HashedPrompts:
    """Turns a session's own hash ids into ids that no other session has, of the block size asked for."""

    def __init__(self, hash_tokens: int, block_tokens: int, names: _Names, fresh_ids: Iterator[int]) -> None:
        self._hash_tokens = hash_tokens
        self._block_tokens = block_tokens
        self._names = names
        self._fresh_ids = fresh_ids

    def block_ids(self, call: Record) -> tuple[int, ...]:
        num_tokens = call.count("in", least=1)
        hashes = call.ids("hash_ids")
        needed = num_blocks(num_tokens, self._hash_tokens)
        if len(hashes) not in (num_tokens // self._hash_tokens, needed):
            call.complain(
                f"{len(hashes)} hash_ids for {num_tokens} input tokens; expected "
                f"{num_tokens // self._hash_tokens}, one for {self._hash_tokens} tokens"
            )
        ids = []
        parent = _NO_PARENT
        for hash_id in hashes:
            # Keyed by the parent too: that an id names a prefix, not a block's content, is then no assumption.
            key = (parent, hash_id)
            if (known := self._names.get(key)) is None:
                known = self._names[key] = next(self._fresh_ids)
            ids.append(parent := known)
        ids.extend(itertools.islice(self._fresh_ids, needed - len(ids)))
        return reblock(ids, num_tokens=num_tokens, from_tokens=self._hash_tokens, to_tokens=self._block_tokens)


def _grouped(records: Iterator[Record], block_tokens: int) -> Iterator[list[TraceTurn]]:
    fresh_ids = itertools.count()
    for session_id, rows in itertools.groupby(records, key=lambda record: record.text("trace")):
        prompts = PromptTree(block_tokens=block_tokens, fresh_ids=fresh_ids)
        yield [_row_turn(row, session_id, prompts) for row in rows]


def _row_turn(row: Record, session_id: str, prompts: PromptTree) -> TraceTurn:
    at_s = row.number("t")
    num_tokens = row.count("input", least=1)
    reused = row.count("reused_tokens")
    if reused > num_tokens:
        row.complain(f"reused_tokens is {reused}; expected at most input, {num_tokens}")
    return TraceTurn(
        session_id=session_id,
        at_s=at_s,
        end_s=at_s + (row.optional_number("api_time") or 0.0),
        think_s=row.optional_number("think_time"),
        input_tokens=num_tokens,
        output_tokens=row.count("output"),
        block_ids=prompts.extend(shared_tokens=reused, num_tokens=num_tokens),
    )
