"""A multi-turn coding session over real source text: modules of Python's own standard library.

Every Python installation has the text, so the same session can be played anywhere without a download. What a turn
shows and asks is fixed; how much of each file it shows follows from the budget, so that sessions of any length exist.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cacheflow.errors import ConfigError

MODULES = (
    "textwrap", "heapq", "bisect", "queue", "shlex", "fnmatch", "glob", "graphlib", "sched", "string", "tempfile",
    "csv", "configparser", "argparse", "calendar", "difflib", "dataclasses", "functools", "statistics", "tarfile",
)  # fmt: skip
"""Standard library modules shown, in this order; together about 190,000 tokens of a 49K vocabulary."""

QUESTIONS = (
    "Explain in two sentences what this module is for and which function a caller should start with.",
    "Which of the functions above raises an exception on bad input, and which exception is it?",
    "Name one edge case that the code above handles on purpose and show the line that handles it.",
    "If I had to add a unit test for the code above, what should it check first?",
)

SYSTEM = "You are a careful senior Python engineer. Answer briefly, and only about the code you were shown."


@dataclass(frozen=True, slots=True)
class CodingTurn:
    """One user turn: source files pasted into the chat, then a question about them."""

    files: tuple[tuple[str, str], ...]
    question: str

    @property
    def content(self) -> str:
        """The user's message as one string."""
        shown = "\n".join(f"# file: {name}.py\n{text}" for name, text in self.files)
        return f"{shown}\n\n{self.question}" if shown else self.question


def stdlib_source(module: str) -> str:
    """Source text of a top-level standard library module.

    Raises:
        ConfigError: The running Python has no such source file.
    """
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"no source text for standard library module {module!r}: {error}") from error


def source_text() -> Iterator[str]:
    """All modules' sources one after the other, each headed by its file name; about 0.7 MB."""
    for module in MODULES:
        yield f"# file: {module}.py\n{stdlib_source(module)}\n"


def coding_session(chars_per_turn: tuple[int, ...]) -> tuple[CodingTurn, ...]:
    """A session whose turn ``i`` shows about ``chars_per_turn[i]`` characters of source (0 for a question alone).

    Raises:
        ConfigError: A budget is negative, or the turns ask for more source than there is.
    """
    if any(chars < 0 for chars in chars_per_turn):
        raise ConfigError(f"chars_per_turn {chars_per_turn} must be 0 or more")
    pool = iter(MODULES)
    turns = []
    for index, budget in enumerate(chars_per_turn):
        files = []
        while budget > 0:
            module = next(pool, None)
            if module is None:
                raise ConfigError(f"chars_per_turn {chars_per_turn} asks for more source than {len(MODULES)} modules")
            text = stdlib_source(module)[:budget]
            files.append((module, text))
            budget -= len(text)
        turns.append(CodingTurn(files=tuple(files), question=QUESTIONS[index % len(QUESTIONS)]))
    return tuple(turns)


def byte_tokens(vocab_size: int) -> list[int]:
    """The source text as token ids made from its bytes, for models that read no text."""
    return [(a * 256 + b) % vocab_size for a, b in pairwise("".join(source_text()).encode())]
