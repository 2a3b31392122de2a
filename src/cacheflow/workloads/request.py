"""One request of a trace: when it arrives, how long it is, and which prefixes it shares with others."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cacheflow.errors import TraceError

MAX_S = 1e9
"""Longest time in a trace: 31 years."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """A request as the simulator and the benchmarks replay it.

    Attributes:
        request_id: 0, 1, 2… in trace order.
        arrival_s: Seconds from the first request of the trace.
        input_tokens: Tokens of the prompt, 1 or more.
        output_tokens: Tokens generated, 1 or more.
        block_ids: One id for each block of ``block_tokens`` input tokens; the last block may be partial. Two equal ids,
            in one session or in two, say that the whole prefixes up to and including these blocks are equal.
        block_tokens: Tokens in a block.
        session_id: The conversation or agent the request belongs to; empty when the trace has no sessions.
        after: ``request_id`` of the session's previous turn, for closed-loop replay.
        delay_s: Think or tool time between the end of the previous turn and this one.

    Raises:
        TraceError: A value contradicts the above.
    """

    request_id: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]
    block_tokens: int
    session_id: str = ""
    after: int | None = None
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        _at_least("request_id", self.request_id, 0, self.request_id)
        for name in ("input_tokens", "output_tokens", "block_tokens"):
            _at_least(name, getattr(self, name), 1, self.request_id)
        for name in ("arrival_s", "delay_s"):
            _at_least(name, getattr(self, name), 0, self.request_id)
        if self.after is not None and not 0 <= self.after < self.request_id:
            raise TraceError(f"request {self.request_id}: after is {self.after}; expected the id of an earlier request")
        self._check_blocks()

    def _check_blocks(self) -> None:
        needed = num_blocks(self.input_tokens, self.block_tokens)
        if len(self.block_ids) != needed:
            raise TraceError(
                f"request {self.request_id}: {len(self.block_ids)} block_ids for {self.input_tokens} input tokens; "
                f"expected {needed} of {self.block_tokens} tokens"
            )
        if min(self.block_ids) < 0:
            raise TraceError(f"request {self.request_id}: block id {min(self.block_ids)}; expected 0 or more")
        if len(set(self.block_ids)) != needed:
            raise TraceError(
                f"request {self.request_id}: block_ids repeat; an id names one prefix, so each stands once"
            )


def num_blocks(num_tokens: int, block_tokens: int) -> int:
    """Blocks that ``num_tokens`` occupy, the last one possibly partial."""
    return -(-num_tokens // block_tokens)


def _at_least(name: str, value: float, least: int, request_id: int) -> None:
    # `not >=` rather than `<`: a NaN fails it too.
    if not value >= least or math.isinf(value):
        raise TraceError(f"request {request_id}: {name} is {value}; expected a finite number, {least} or more")
    if name.endswith("_s") and value > MAX_S:
        raise TraceError(
            f"request {request_id}: {name} is {value:g}; expected at most {MAX_S:g} seconds from the first request: "
            "beyond it, times of milliseconds cannot be told apart"
        )
