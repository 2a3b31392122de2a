"""vLLM's server options as a user typed them, read without vLLM: only what is certain is answered."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

SHORT = {
    "-dcp": "--decode-context-parallel-size",
    "-dp": "--data-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-sc": "--speculative-config",
    "-tp": "--tensor-parallel-size",
}
"""vLLM's short forms of the options that matter here."""
_READABLE = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_FACTORS = {"": 1, "k": 1000, "K": 1 << 10, "m": 1_000_000, "M": 1 << 20}


class ServerFlags:
    """Options by their long names with hyphens; the last one given counts, as for vLLM."""

    def __init__(self, words: Sequence[str]) -> None:
        self._values: dict[str, str] = {}
        for index, word in enumerate(words):
            name, equals, value = word.partition("=")
            name = SHORT.get(name, name)
            if not name.startswith("--"):
                continue
            name, dot, key = name.partition(".")
            name = name.replace("_", "-") + dot + key
            follower = words[index + 1] if index + 1 < len(words) else ""
            if not equals:
                value = "" if re.match(r"-+[a-zA-Z]", follower) else follower
            self._values.pop(name, None)  # the last one given is the last one held
            self._values[name] = value

    def given(self, name: str) -> bool:
        """Whether the option was given, whole or a key of it (``--name.key``)."""
        return any(each == name or each.startswith(f"{name}.") for each in self._values)

    def text(self, name: str) -> str | None:
        """Its value; None where it was not given, or only keys of it, which are ``--name.key``."""
        return self._values.get(name)

    def on(self, name: str) -> bool:
        """Whether a switch is on; ``--no-name`` turns it off again when it comes later."""
        words = list(self._values)
        off = "--no-" + name.removeprefix("--")
        return name in words and not (off in words and words.index(off) > words.index(name))

    def number(self, name: str) -> int | None:
        """Its value as a whole number, ``16k`` and ``16K`` as vLLM reads them; None where it is none."""
        match = _READABLE.fullmatch(self._values.get(name, "").strip())
        return None if match is None else int(float(match[1]) * _FACTORS[match[2]])

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Its JSON value; empty where it is none, or was given key by key."""
        try:
            value = json.loads(self._values.get(name, ""))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}
