"""What one request asks of CacheFlow through ``kv_transfer_params``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from reprlib import repr as shortened
from typing import Any


class Mode(Enum):
    """How a request's prefix may come back."""

    AUTO = "auto"
    """As the configured policy decides."""
    LOAD = "load"
    """All that the store holds is read, even where recomputing would be faster; what cannot be read is recomputed."""
    RECOMPUTE = "recompute"
    """Only by vLLM's own prefill; what it computes is saved."""
    OFF = "off"
    """Neither restored nor saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestParams:
    """One request's parameters, checked.

    Attributes:
        mode: How its prefix may come back.
        max_load_tokens: Never restore more than this many tokens; None: the engine's limit.
        explain: Return the explain record in the response's ``kv_transfer_params``.
        complaint: What could not be understood; the rest was taken as if it had not been given. Empty when all was.
    """

    mode: Mode = Mode.AUTO
    max_load_tokens: int | None = None
    explain: bool = False
    complaint: str = ""

    @classmethod
    def of(cls, params: Any) -> RequestParams:  # noqa: ANN401 -- JSON from a client
        """Read ``kv_transfer_params``; keys of other connectors are left alone.

        A request cannot be refused from inside the engine, so what is wrong is answered, not raised.
        """
        if not params:
            return NOTHING_ASKED
        if not isinstance(params, Mapping):  # it comes from the network, where vLLM does not check its type everywhere
            return cls(complaint=f"kv_transfer_params is {shortened(params)}, must be an object")
        complaints = []
        mode, limit, explain = params.get("cacheflow", "auto"), params.get("max_load_tokens"), params.get("explain")
        if mode not in [each.value for each in Mode]:
            complaints.append(
                f"cacheflow is {shortened(mode)}, must be one of {', '.join(each.value for each in Mode)}"
            )
            mode = "auto"
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            complaints.append(f"max_load_tokens is {shortened(limit)}, must be a whole number of 0 or more")
            limit = None
        if explain not in (None, True, False):
            complaints.append(f"explain is {shortened(explain)}, must be true or false")
            explain = False
        return cls(
            mode=Mode(mode), max_load_tokens=limit, explain=bool(explain), complaint="; ".join(complaints)
        )  # fmt: skip


NOTHING_ASKED = RequestParams()
