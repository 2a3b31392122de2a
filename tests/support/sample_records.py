"""Records that a benchmark could have written, for tests of what reads them."""

from typing import Any

from cacheflow.bench.records.restore import RestoreRecord


def sample_record(**changes: Any) -> RestoreRecord:
    """A plausible checked record, with fields changed."""
    values: dict[str, Any] = {
        "suite": "restore",
        "policy": "cacheflow",
        "model": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "num_tokens": 4096,
        "suffix_tokens": 256,
        "chunk_tokens": 512,
        "num_layers": 30,
        "link_bytes_per_s": 1e8,
        "load_compute_ratio": 1.0,
        "repeat": 0,
        "restore_s": 1.02,
        "ttft_s": 1.2,
        "bound_restore_s": 1.0,
        "bound_ttft_s": 1.15,
        "compute_busy": 0.97,
        "io_busy": 0.98,
        "recomputed_cells": 120,
        "loaded_cells": 120,
        "wasted_bytes": 0,
        "correct": True,
        "environment": {"cpu": "test processor", "num_threads": 2, "torch": "2.13.0", "transformers": "5.23.0"},
    }
    return RestoreRecord(**{**values, **changes})


def sample_sweep(*, ours_s: float = 1.0, rival_s: float = 1.2, repeats: int = 3) -> list[RestoreRecord]:
    """Two policies over three ratios; machine drift makes later repeats slower for both alike."""
    return [
        sample_record(
            policy=policy,
            load_compute_ratio=ratio,
            repeat=repeat,
            restore_s=time_s * drift,
            ttft_s=(time_s + 0.2) * drift,
        )
        for repeat, drift in zip(range(repeats), (1.0, 1.5, 3.0), strict=False)
        for ratio in (0.5, 1.0, 2.0)
        for policy, time_s in (("cake", rival_s), ("cacheflow", ours_s))
    ]
