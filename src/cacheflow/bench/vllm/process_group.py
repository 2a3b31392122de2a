"""What the processes of a server use of the machine; Linux."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

KIB = 1024


def group_cpu_s(group: int) -> float:
    """Processor seconds used so far by the living processes of a process group."""
    ticks = sum(int(values[11]) + int(values[12]) for _, values in _processes(group))
    return ticks / os.sysconf("SC_CLK_TCK")


def group_memory(group: int) -> list[int]:
    """Bytes of memory of each living process of a group, in any order; pages that several share count in part (PSS)."""
    found = []
    for process, _ in _processes(group):
        with suppress(OSError):  # it ended meanwhile
            found.append(_kib_of((process / "smaps_rollup").read_text(), "Pss") * KIB)
    return found


def _processes(group: int) -> Iterator[tuple[Path, list[str]]]:
    """The folders in ``/proc`` of a group's processes, and from "state" on what their ``stat`` says."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state ppid pgrp ... utime stime": the name may hold spaces and brackets
            values = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(values[2]) == group:
            yield stat.parent, values


def _kib_of(text: str, key: str) -> int:
    """The value of a line ``key:   123 kB``; 0 where there is none, as for a process that is about to end."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    return 0
