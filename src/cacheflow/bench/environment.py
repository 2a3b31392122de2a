"""Where a benchmark ran: what a reader needs to judge a time."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path


def environment(*, accelerator: str | None = None, num_threads: int | None = None) -> dict[str, str | int | None]:
    """Processor, threads, versions; never a host name, user or path.

    Args:
        accelerator: Name of the device that computed, when it was not the CPU.
        num_threads: Compute threads; asked from torch when it is loaded and this is None.
    """
    torch = sys.modules.get("torch")
    if num_threads is None and torch is not None:
        num_threads = torch.get_num_threads()
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": num_threads,
        "accelerator": accelerator,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cacheflow": _version("cacheflow-kv"),
        **{name: _version(name) for name in ("numpy", "torch", "transformers")},
    }


def accelerator_name(device: str) -> str | None:
    """The name of the CUDA device that torch uses; None for ``"cpu"``."""
    if device != "cuda":
        return None
    import torch

    return str(torch.cuda.get_device_name())


def available_memory() -> int:
    """Bytes that new processes can take without driving others out; Linux."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
