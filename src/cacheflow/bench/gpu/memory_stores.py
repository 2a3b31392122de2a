"""What the stores in memory bring to the device, beside one plain copy of as many bytes from pinned memory.

Cells are as large as an engine takes them for that copy's speed. The store's threads, the I/O loop and compute's end
are in the time; a link of their own there is none.
"""

from __future__ import annotations

import os
import shutil
import statistics
import uuid

from cacheflow.bench import setup
from cacheflow.bench.gpu.study import GpuStudy
from cacheflow.bench.restore.link import StoreStudyLink
from cacheflow.plan.cell_sizes import layers_of_cell
from cacheflow.policies.registry import make_policy
from cacheflow.profiling.ceilings import upload_bytes_per_s
from cacheflow.stores.shm import SHARED_MEMORY

NO_LIMIT_BYTES_PER_S = 1e12
REPEATS = 3
"""Loads of the prefix after two that are shown by themselves: first uses, and of shared memory what is copied, and what
is page-locked."""


def memory_stores(study: GpuStudy) -> bool:
    """Load the short prefix alone, as fast as it goes, from each store in memory."""
    study.free()
    for name, url in (
        ("memory", "memory"),
        ("memory, every read verified", "memory?verify=always"),
        ("shared memory", f"shm://bench-{os.getpid()}-{uuid.uuid4().hex[:8]}"),
    ):
        if not study.has(6, name):
            _load(study, name, url)
    return True


def _load(study: GpuStudy, name: str, url: str) -> None:
    flags, shape = study.flags, setup.open_model(study.flags).shape
    num_bytes = flags.short_tokens * shape.kv_bytes_per_token
    link = StoreStudyLink(setup.namespace_of(setup.open_model(flags), flags.chunk_tokens), urls=url)
    if link.store == "shm" and (missing := _missing_bytes(num_bytes)):
        study.put(6, name, {"left_out": f"{SHARED_MEMORY} lacks {missing} bytes"})
        return
    copied = upload_bytes_per_s(study.streams, study.device, num_bytes=num_bytes)
    layers_per_block = layers_of_cell(shape, device_type="cuda", chunk_tokens=flags.chunk_tokens, bytes_per_s=copied)
    ground = study.study(
        flags.short_tokens,
        chunk_tokens=flags.chunk_tokens,
        layers_per_block=layers_per_block,
        link=link,
        cost_repeats=1,
    )
    runs, num_lent = [], []
    for _ in range(2 + REPEATS):
        runs.append(ground.run(make_policy("load"), with_suffix=False, bytes_per_s=NO_LIMIT_BYTES_PER_S))
        num_lent.append(link.num_lent)
    rates = [run.restored.report.loaded_bytes / run.restored.report.restore_s for run in runs]
    loaded = statistics.median(rates[2:])
    num_reads = REPEATS * ground.grid.num_chunks * ground.grid.num_blocks
    study.put(
        6,
        name,
        {
            "layers_per_block": layers_per_block,
            "first_bytes_per_s": rates[0],
            "second_bytes_per_s": rates[1],
            "bytes_per_s": loaded,
            "copy_bytes_per_s": copied,
            "of_copy": loaded / copied,
            "lent_share": (num_lent[-1] - num_lent[1]) / num_reads,
        },
        correct=all(run.correct for run in runs),
    )
    ground.close()
    del ground, runs
    study.collect()


def _missing_bytes(num_bytes: int) -> int:
    """What shared memory has too little for so many, with a quarter to spare; 0 where it has enough."""
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    return max(0, num_bytes * 5 // 4 - free_bytes)
