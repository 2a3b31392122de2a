"""One response of several choices (``n`` above 1): vLLM makes a request of each, and answers with one's parameters.

It answers with those of the request that ended last. So each one's answer holds what the siblings that ended before it
were told too: the last has all of it, whichever the last is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_CHILD = re.compile(r"(\d+)_(.+)", re.DOTALL)
"""vLLM's id of a choice's request: ``<index>_<id of the response's request>``."""


@dataclass(slots=True)
class _Family:
    members: set[str] = field(default_factory=set)
    joined: int = 0
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)


class Siblings:
    """The requests of responses with several choices. Scheduler's thread alone."""

    def __init__(self) -> None:
        """Start with none."""
        self._families: dict[str, _Family] = {}

    def join(self, request_id: str) -> None:
        """Note that a request has begun."""
        if (match := _CHILD.fullmatch(request_id)) is not None:
            family = self._families.setdefault(match[2], _Family())
            family.members.add(request_id)
            family.joined += 1

    def ended(self, request_id: str, answer: dict[str, Any]) -> dict[str, Any]:
        """A request's answer with those of its siblings that have ended; its own where it has none.

        Args:
            request_id: Of the request that has ended.
            answer: What it is told of itself: ``cacheflow`` (records), ``cacheflow_reason``, ``cacheflow_error``.

        Returns:
            The records of all of them, each with its ``choice_index``; the reason of the first choice where nothing was
            restored for any.
        """
        match = _CHILD.fullmatch(request_id)
        family = None if match is None else self._families.get(match[2])
        if match is None or family is None or request_id not in family.members:
            return answer
        family.answers[int(match[1])] = answer
        family.members.remove(request_id)
        if not family.members:
            del self._families[match[2]]
        return answer if family.joined == 1 else _together(family.answers)


def _together(answers: dict[int, dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for index, answer in sorted(answers.items()):
        for key, value in answer.items():
            if key == "cacheflow":
                merged.setdefault(key, []).extend(record | {"choice_index": index} for record in value)
            else:
                merged.setdefault(key, value)
    if any(record["outcome"] == "done" for record in merged.get("cacheflow", ())):
        merged.pop("cacheflow_reason", None)
    return merged
