"""Reads that are never late: on a machine that does other things one may take a second, which is no failing store."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from support.waiting import PATIENCE_S

PATIENT = ExecutorOptions(deadline=ReadDeadline(floor_s=PATIENCE_S))


@contextmanager
def no_late_reads() -> Iterator[None]:
    """No read of this process is late meanwhile, whatever deadline its engines were made with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadDeadline, "allowed_s", lambda *_: PATIENCE_S)
        yield
