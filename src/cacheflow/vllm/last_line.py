"""Why CacheFlow ended a start, as one line: in the log of the process that found out, and last on the terminal.

vLLM shows a failure in a worker three times, inside its own stack traces. So the process that fails logs the reason
once, and leaves it in a file that ``cacheflow serve`` names in the environment; the server process, which ends last,
prints it when its interpreter ends. Nothing of vLLM is touched; its signals and its exit status stay its own.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cacheflow.errors import CacheFlowError

logger = logging.getLogger(__name__)

REASON_FILE = "CACHEFLOW_REASON_FILE"
"""Environment variable: the file in which a process of this server leaves why it cannot serve."""


_TRACKER_WARNING = "ignore:resource_tracker:UserWarning"
"""After a failed start Python's resource tracker, which outlives the server, warns of memory it has tidied up."""


def log_beside_vllm() -> None:
    """Give ``cacheflow``'s logger vLLM's handlers and level, unless logging is configured for it, or for all.

    In a worker it is called early: the first ``logging.debug`` of any library configures logging for all, and lines
    below a warning are lost. vLLM's experts on the CPU do that.
    """
    ours, theirs = logging.getLogger("cacheflow"), logging.getLogger("vllm")
    if ours.handlers or ours.level or logging.getLogger().handlers or not theirs.handlers:
        return
    ours.handlers, ours.propagate = list(theirs.handlers), False
    ours.setLevel(theirs.level)


def environment_for_reason(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server that is to end with the reason: nothing that it starts writes after it.

    The file for the reason is named, not made: it comes to be when there is something to say.
    """
    path = Path(tempfile.gettempdir()) / f"cacheflow-{os.getpid()}-{secrets.token_hex(8)}.txt"
    warnings = ",".join(filter(None, (environment.get("PYTHONWARNINGS"), _TRACKER_WARNING)))
    return {**environment, REASON_FILE: str(path), "PYTHONWARNINGS": warnings}


@contextmanager
def reason_left() -> Iterator[None]:
    """Log a ``CacheFlowError`` as one line and leave it for the server process; the error goes on as it came."""
    try:
        yield
    except CacheFlowError as error:
        line = " ".join(str(error).split())
        if _left(line):
            log_beside_vllm()
            logger.error("cacheflow: error: %s", line)
        raise


def _left(line: str) -> bool:
    """Leave the line unless another rank has left one; whether it is the first."""
    path = os.environ.get(REASON_FILE)
    if not path:
        return True
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    except OSError:
        return True
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(line)
    return True


def print_reason_last() -> None:
    """Have the server process print what was left when it ends; does nothing in processes that it starts."""
    if os.environ.get(REASON_FILE) and multiprocessing.parent_process() is None:
        atexit.unregister(_print_reason)
        atexit.register(_print_reason)


def _print_reason() -> None:
    path = Path(os.environ.get(REASON_FILE, ""))
    with suppress(OSError):
        line = path.read_text(encoding="utf-8")
        path.unlink()
        sys.stderr.write(f"cacheflow: error: {line}\n")
        sys.stderr.flush()
