"""Taking cells back from a link that has become too slow for them.

What the link has begun bottom-up can only be recomputed from the chunk's bottom block, through cells that are resident
already. So the chunks are taken from the head (cheapest, and each needs the ones before it), each with the cost of its
way up, as many as bring the end forward most; the last one only as high as that.
"""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.state.board import CellState
from cacheflow.state.progress import Progress

RECLAIM_GAIN = 0.97
"""Take cells back only when that is expected to end this much sooner."""

TAKEN = (CellState.OPEN,)
"""Cells compute may take back while it has other work."""
TAKEN_IDLE = (CellState.OPEN, CellState.LOADING)
"""... and when it has none."""


@dataclass(frozen=True, slots=True)
class _Option:
    """Compute restores chunks up to ``chunk``, and that one below ``height``; seconds until the first token."""

    chunk: int
    height: int
    end_s: float


def take_back(p: Progress, now_s: float, *, idle: bool) -> bool:
    """Demand of compute what it is expected to restore sooner than the link; whether there is anything.

    Args:
        p: The restoration.
        now_s: Seconds since it started.
        idle: Compute has nothing else to do: take over reads under way too.
    """
    if p.link_down or not p.link_climbs:
        return False
    bottom = p.bottom_row_pays()
    compute_s, left_bytes = p.compute_left_s(now_s) + p.suffix_left_s(), p.board.open_bytes
    if bottom:
        compute_s, left_bytes = compute_s + p.bottom_left_s(), left_bytes - float(p.board.bottom_bytes_K.sum())
    top_s = p.top_suffix_s * p.rates.compute_factor
    if (p.link_s(left_bytes) + top_s) * RECLAIM_GAIN <= compute_s:
        return False
    left_bytes -= p.demanded_bytes()
    compute_s += p.repair_left_s()
    waits_s = max(p.link_s(left_bytes) - p.read_s() + top_s, compute_s)
    best = _best(p, compute_s, left_bytes, states=TAKEN_IDLE if idle else TAKEN, lowest=1 if bottom else 0)
    if best is None or best.end_s >= RECLAIM_GAIN * waits_s:
        return False
    demanded = [
        _demand(p, chunk, best.height if chunk == best.chunk else p.board.num_blocks, TAKEN_IDLE if idle else TAKEN)
        for chunk in range(best.chunk + 1)
    ]
    return any(demanded)


def _demand(p: Progress, chunk: int, height: int, states: tuple[CellState, ...]) -> bool:
    """Demand the missing cells of a chunk below ``height``, unless compute's own order goes through all of them."""
    missing = [block for block in range(height) if p.board.state(chunk, block) in states]
    if not missing or all(p.board.is_open(chunk, block) for block in range(p.start_block(chunk), missing[-1] + 1)):
        return False
    p.demand_K[chunk] = max(p.demand_K[chunk], missing[-1] + 1)
    for block in missing:
        p.board.set(chunk, block, CellState.OPEN)  # a read of it may still come first
    return True


def _best(
    p: Progress, compute_s: float, left_bytes: float, *, states: tuple[CellState, ...], lowest: int
) -> _Option | None:
    """The option with the earliest end.

    Args:
        p: The restoration.
        compute_s: Seconds compute needs for everything but the options, suffix included.
        left_bytes: Open bytes that nobody is to restore yet.
        states: Cells that may be taken.
        lowest: Blocks below it are restored anyway.
    """
    board, factor, top_s = p.board, p.rates.compute_factor, p.top_suffix_s * p.rates.compute_factor
    best: _Option | None = None
    num_reads = board.num_in(CellState.LOADING)
    for chunk in range(board.num_chunks):
        demand = max(p.demand_K[chunk], lowest)
        missing = [block for block in range(demand, board.num_blocks) if board.state(chunk, block) in states]
        if not missing:
            continue
        start = p.demand_K[chunk] if p.demanded_open_block(chunk) >= 0 else p.start_block(chunk)
        for block in range(start, missing[-1] + 1):
            state = board.state(chunk, block)
            if block >= demand and state in states:
                if state is CellState.OPEN:
                    left_bytes -= board.load_bytes(chunk, block)
                else:
                    num_reads -= 1
                last_s = (
                    float(p.problem.kv_only_KB[chunk, block]) if block == missing[-1] else board.compute_s(chunk, block)
                )
                # Reads come in order: only when none of them is waited for do they not hold up the end.
                waited = num_reads > 0 or left_bytes > 0
                end_s = max(compute_s + last_s * factor, p.link_s(left_bytes) - p.read_s() + top_s if waited else 0.0)
                if best is None or end_s < best.end_s:
                    best = _Option(chunk, block + 1, end_s)
            compute_s += board.compute_s(chunk, block) * factor
        if best is not None and compute_s > best.end_s:
            break
    return best
