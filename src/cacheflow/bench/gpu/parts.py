"""The parts of the study, in the sequence of what must be known first; each is left out where its time is not left.

0 what the device can do at best, 1 whether bits are right, 2 what layers, kernels and decoded tokens cost, 3 what the
I/O loop moves, 4 the main table, 5 other cells, 6 a short prefix and real stores, 8 the longest prefix. Of stores in
memory part 6 says what share of a plain copy they reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cacheflow.bench import setup
from cacheflow.bench.gpu.costs import measure_ceilings, measure_layers
from cacheflow.bench.gpu.exactness import EXACTNESS, check_exactness
from cacheflow.bench.gpu.flags import GpuFlags
from cacheflow.bench.gpu.io_loop import measure_loop
from cacheflow.bench.gpu.memory_stores import memory_stores
from cacheflow.bench.gpu.study import GpuStudy
from cacheflow.bench.gpu.tables import longest, main_table, other_cells, short_and_stored
from cacheflow.bench.records.base import BenchRecord
from cacheflow.bench.suite import SuiteRun


@dataclass(frozen=True, slots=True)
class Part:
    """A part, and the seconds it should take on an H100 with an 8B model; it is not begun with less time left."""

    number: int
    least_s: float
    run: Callable[[GpuStudy], bool]


PARTS = (
    Part(0, 30.0, measure_ceilings),
    Part(EXACTNESS, 42.0, check_exactness),
    Part(2, 60.0, measure_layers),
    Part(3, 30.0, measure_loop),
    Part(4, 60.0, main_table),
    Part(5, 60.0, other_cells),
    Part(6, 60.0, lambda study: memory_stores(study) and short_and_stored(study)),
    Part(8, 100.0, longest),
)
"""Least times are of a useful part: rounds watch the clock too."""


def run_parts(flags: GpuFlags, suite: SuiteRun[BenchRecord]) -> bool:
    """Run what is asked for, is not on record, and has its time; False when something was left out."""
    complete = True
    setup.open_model(flags)  # a missing device or shape is one line, before anything is measured
    study = GpuStudy(flags, suite)
    for part in PARTS:
        if part.number not in flags.parts or study.has(part.number, "done"):
            continue
        least_s = part.least_s / flags.pace
        if least_s > suite.left_s:
            suite.say(f"part {part.number} is left out: it needs {least_s:.0f} s, {suite.left_s:.0f} s are left")
            complete = False
            continue
        began_s = time.monotonic()
        try:
            finished = part.run(study)
        except Exception as error:  # noqa: BLE001 -- what was measured is to be shown, and other parts may have their time
            study.put(part.number, "failed", {"error": f"{type(error).__name__}: {error}"[:500]})
            suite.say(f"part {part.number} failed: {type(error).__name__}: {error}")
            study.free()
            complete = False
            continue
        if finished:
            study.put(part.number, "done", {"seconds": time.monotonic() - began_s})
        elif part.number == EXACTNESS:
            suite.say("bits differ: no time is worth measuring, the study ends here")
            return True
        else:
            complete = False
    study.free()
    return complete
