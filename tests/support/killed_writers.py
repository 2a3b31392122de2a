"""Writers that are killed in the middle of a write. A program of its own: a process with threads should not fork.

::

    python killed_writers.py SOURCES URL STAGING NUM_KILLS

ends when so many of them left a half-written record in the folder STAGING; the others were between two writes.
"""

import importlib
import os
import random
import signal
import sys
import time
from pathlib import Path

RECORD_BYTES = 4 << 20
NUM_KEYS = 6
CAPACITY = 1 << 26
MAX_TRIES = 20
"""Writers for each kill in mid-write, at most."""


def write_for_ever(url, seed):
    import numpy as np

    from cacheflow.stores.opening import open_store
    from support.store_objects import TIMEOUT_S, put_request

    generator = np.random.default_rng(seed)
    with open_store(url, capacity_bytes=CAPACITY) as store:
        while True:
            data = generator.integers(0, 256, RECORD_BYTES, dtype=np.uint8)
            request = put_request(int(generator.integers(NUM_KEYS)), data, replace=True)
            store.submit_put([request]).wait(TIMEOUT_S)


def half_written(staging, pid):
    return sorted(staging.glob(f"{pid}-*"))


def kill_one(url, staging, number):
    """The half-written records that a killed writer left."""
    pid = os.fork()
    if pid == 0:
        try:
            write_for_ever(url, number)
        finally:
            os._exit(1)
    for _ in range(number % 4 + 1):  # the first write it began, or a later one
        while not half_written(staging, pid):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "a writer ended by itself"
        time.sleep(random.Random(number).random() * 2e-4)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return half_written(staging, pid)


def main(url, staging, num_kills):
    num_left = 0
    for number in range(MAX_TRIES * num_kills):
        left = kill_one(url, staging, number)
        num_left += bool(left)
        for path in left:
            os.utime(path, (0, 0))  # long ago: the next writer removes it
        if num_left == num_kills:
            return
    sys.exit(f"{num_left} of {MAX_TRIES * num_kills} writers were killed in the middle of a write")


if __name__ == "__main__":
    sys.path[:0] = sys.argv[1].split(os.pathsep)
    for module in ("cacheflow.stores.opening", "support.store_objects"):  # once, before the forks
        importlib.import_module(module)

    main(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
