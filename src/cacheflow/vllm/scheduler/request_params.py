"""What one request asks of CacheFlow through ``kv_transfer_params``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from reprlib import repr as shortened
from typing import Any

import numpy as np
import numpy.typing as npt

from cacheflow.errors import PromptError
from cacheflow.stores.keys import as_token_array


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


MAX_PREFIXES = 16
"""That one request may announce."""
MAX_ANNOUNCED_TOKENS = 1 << 18
"""Of all of them together: they are hashed on the scheduler's thread, which takes 10 ms for so many."""

_KEYS = ("cacheflow", "max_load_tokens", "keep", "prefetch", "explain")
_LONGEST_KEY = 32
"""That is compared with ours."""

TOOL = "tool"
"""The value of ``keep`` that means: until the prefix's next request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """For how long a prefix stays in the store, from the end of its request on.

    Attributes:
        keep_s: Seconds; 0 ends what was asked for before.
        until_next: The next request on the same prefix ends it.
    """

    keep_s: float
    until_next: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepLimits:
    """What the operator allows.

    Attributes:
        tool_s: Seconds of ``keep: "tool"``.
        max_s: Most seconds that may be asked for.
    """

    tool_s: float = 300.0
    max_s: float = 3600.0

    def read(self, value: Any) -> Keep | None:  # noqa: ANN401 -- JSON from a client
        """What a request's ``keep`` asks for; None for what is not understood or not allowed."""
        if value == TOOL:
            return Keep(keep_s=self.tool_s, until_next=True)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return Keep(keep_s=float(value)) if is_number and 0 <= value <= self.max_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestParams:
    """One request's parameters, checked.

    Attributes:
        mode: How its prefix may come back.
        max_load_tokens: Never restore more than this many tokens; None: the engine's limit.
        keep: For how long its prefix stays in the store; None: no longer than any other.
        prefetch: Token ids of prefixes of prompts that come next.
        explain: Return the explain record in the response's ``kv_transfer_params``.
        complaint: What could not be understood; the rest was taken as if it had not been given. Empty when all was.
    """

    mode: Mode = Mode.AUTO
    max_load_tokens: int | None = None
    keep: Keep | None = None
    prefetch: tuple[npt.NDArray[np.int64], ...] = field(default=(), compare=False)
    explain: bool = False
    complaint: str = ""

    @classmethod
    def of(cls, params: Any, limits: KeepLimits) -> RequestParams:  # noqa: ANN401 -- JSON from a client
        """Read ``kv_transfer_params``; keys of other connectors are left alone, but for those that are nearly ours.

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
        announced = params.get("prefetch")
        prefetch = () if announced is None else _prefixes(announced)
        if prefetch is None:
            complaints.append(
                f"prefetch is {shortened(announced)}, must be a list of lists of token ids, {MAX_PREFIXES} at most "
                f"with {MAX_ANNOUNCED_TOKENS} tokens together"
            )
        asked = params.get("keep")
        keep = None if asked is None else limits.read(asked)
        if asked is not None and keep is None:
            complaints.append(f"keep is {shortened(asked)}, must be {TOOL!r} or seconds, from 0 to {limits.max_s:g}")
        elif keep is not None and mode == Mode.OFF.value and not prefetch:
            complaints.append("keep has nothing to keep of a request that is 'off': none of it is saved")
            keep = None
        if explain not in (None, True, False):
            complaints.append(f"explain is {shortened(explain)}, must be true or false")
            explain = False
        complaints += [
            f"{name} is no key of CacheFlow's: {meant} is" for name in params if (meant := _meant(name)) is not None
        ]
        return cls(
            mode=Mode(mode),
            max_load_tokens=limit,
            keep=keep,
            prefetch=prefetch or (),
            explain=bool(explain),
            complaint="; ".join(complaints),
        )


def _meant(name: Any) -> str | None:  # noqa: ANN401 -- JSON from a client
    """The key of ours that was probably meant by another one; None for what is one, or like none."""
    if not isinstance(name, str) or name in _KEYS or len(name) > _LONGEST_KEY:
        return None
    return next(iter(get_close_matches(name, _KEYS, n=1, cutoff=0.75)), None)


def _prefixes(value: Any) -> tuple[npt.NDArray[np.int64], ...] | None:  # noqa: ANN401 -- JSON from a client
    """Token ids of each prefix; None for what is not understood, or too much."""
    if not isinstance(value, list | tuple) or not all(isinstance(each, list | tuple) for each in value):
        return None
    if len(value) > MAX_PREFIXES or sum(map(len, value)) > MAX_ANNOUNCED_TOKENS:
        return None
    try:
        return tuple(as_token_array(each) for each in value)
    except (PromptError, ValueError, TypeError, OverflowError):  # the others are numpy's
        return None


NOTHING_ASKED = RequestParams()
