"""Batch records with chosen times."""

from __future__ import annotations

from msgspec.structs import replace

from cacheflow.bench.records.batch import BatchRecord, BatchRequestRecord, BatchTimes


def batch_record(
    policy: str = "mean_ttft",
    *,
    ttft_s: tuple[float, ...] = (1.0, 3.0),
    simulated_s: tuple[float, ...] | None = None,
    **changes,
) -> BatchRecord:
    """Two requests of 512 and 1,024 tokens that came together, the second one first."""
    arrivals_s = (0.0, 0.0)
    times = BatchTimes.of(arrivals_s, ttft_s)
    requests = tuple(
        BatchRequestRecord(
            num_tokens=num_tokens,
            suffix_tokens=128,
            arrival_s=0.0,
            ttft_s=seconds,
            restore_s=0.9 * seconds,
            deadline_s=2.0,
            recomputed_cells=10,
            loaded_cells=20,
        )
        for num_tokens, seconds in zip((1024, 512), ttft_s, strict=True)
    )
    record = BatchRecord(
        policy=policy,
        model="tiny",
        device="cpu",
        dtype="bfloat16",
        lengths=(512, 1024),
        suffix_tokens=128,
        chunk_tokens=512,
        num_layers=3,
        order=(1, 0),
        arrival_gap_s=0.0,
        load_compute_ratio=1.0,
        link_bytes_per_s=1e6,
        repeat=0,
        seed=0,
        starvation_s=None,
        mean_ttft_s=times.mean_ttft_s,
        p99_ttft_s=times.p99_ttft_s,
        makespan_s=times.makespan_s,
        compute_busy=0.9,
        io_busy=0.8,
        bound_makespan_s=2.5,
        bound_mean_ttft_s=1.5,
        starvation_kept=None,
        compute_drift=1.1,
        correct=True,
        requests=requests,
        simulated=BatchTimes.of(arrivals_s, simulated_s or ttft_s),
        environment={"cpu": "some", "num_cores": 2},
    )
    return replace(record, **changes)
