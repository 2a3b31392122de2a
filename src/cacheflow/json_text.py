"""JSON from people and from disks: whatever is wrong with a text is one kind of error, with the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cacheflow.errors import ConfigError

MAX_FILE_BYTES = 16 << 20
"""No description of a model, a GPU or a cluster is as long; a device file, or a trace given by mistake, is."""


def parse_json(text: str) -> Any:  # noqa: ANN401 -- JSON is of any type
    """The value that a text spells.

    Raises:
        ConfigError: It is no JSON, is nested too deeply to be read, or holds a whole number of thousands of digits; the
            message names no file.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise ConfigError(f"not JSON: {error.msg} at {place} {error.colno}") from error
    except RecursionError as error:
        raise ConfigError("not readable as JSON: nested too deeply") from error
    except ValueError as error:  # the interpreter's limit on the digits of a number
        raise ConfigError("not readable as JSON: a number has thousands of digits") from error


def read_text(path: Path) -> str:
    """The text of a file that people write by hand; a byte order mark is no part of it.

    Raises:
        ConfigError: It cannot be read, is not UTF-8, or is larger than any such file; the message names no file.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"larger than {MAX_FILE_BYTES:,} bytes")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(str(error.strerror or error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from error
