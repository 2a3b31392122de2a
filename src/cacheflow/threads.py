"""Threads that a process may have to do without."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread
from typing import Any

logger = logging.getLogger(__name__)

_refused: set[str] = set()


def start_thread(target: Callable[..., object], *, name: str, args: tuple[Any, ...] = ()) -> Thread | None:
    """Start a daemon thread: a store that hangs in one must not keep the process from ending.

    Returns:
        The thread; None where the process may have no more, which is said once for each name.
    """
    thread = Thread(target=target, name=name, args=args, daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        if name not in _refused:
            _refused.add(name)
            logger.warning(
                "thread %s could not be started (%s); it is tried again when it is needed. Is there a bound on the "
                "threads or the memory of this process or container (ulimit -u, pids.max)?", name, error,
            )  # fmt: skip
        return None
    return thread
