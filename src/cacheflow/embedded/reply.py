"""An answer and how its prefix came to be there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cacheflow.engine.saver import SaveReport
from cacheflow.plan.report import RestoreReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer and how its prefix came to be there.

    Attributes:
        tokens: New tokens, in order.
        logits: ``[V]`` of the last prompt token.
        ttft_s: Seconds from the call to the first token, lookup and planning included.
        resident_tokens: Prefix tokens whose KV was still in memory.
        restored_tokens: Prefix tokens that were restored.
        suffix_tokens: Prompt tokens that were new.
        report: The restoration; None when nothing had to be restored.
        saved: What was written to the store.
        lookup_timed_out: The store took too long to say what it holds; it may hold more than was restored.
        shared_tokens: Of the restored tokens, those that were copied from another request's restoration.
        itl_s: Seconds between one token and the next, of answers made among others; empty for answers made alone.
    """

    tokens: tuple[int, ...]
    logits: torch.Tensor
    ttft_s: float
    resident_tokens: int
    restored_tokens: int
    suffix_tokens: int
    report: RestoreReport | None
    saved: SaveReport
    lookup_timed_out: bool = False
    shared_tokens: int = 0
    itl_s: tuple[float, ...] = ()
