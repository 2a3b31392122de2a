"""What ``cacheflow simulate`` puts on record and shows of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from cacheflow.bench.records.simulation import SimulationRecord
from cacheflow.bench.table import Row, seconds, text_table
from cacheflow.commands.simulate_workload import WorkloadSize
from cacheflow.sim.cluster import ClusterConfig
from cacheflow.sim.policies import EMBEDDED, PLUGIN, SYSTEMS
from cacheflow.sim.results import RunResult, percentiles_s
from cacheflow.sim.run import Run

CDF_PERCENTS = (*(float(each) for each in range(101)), 99.5, 99.9)
"""Percentiles of the time to first token that a record keeps, for the picture."""
OUTCOMES = {
    "policy", "order", "objective", "reusable_tokens", "ttft_percentiles_s", "wall_s",
    *(each.name for each in fields(RunResult)),
}  # fmt: skip
"""Fields of a record that do not belong to its setting."""


def outcome(run: Run, config: ClusterConfig) -> dict[str, Any]:
    """What a record says of one run; depends on nothing but the command."""
    return {
        **asdict(run.result),
        "policy": run.policy,
        "order": SYSTEMS[run.policy].order,
        "cluster": {key: _plain(value) for key, value in asdict(config).items()},
        "ttft_percentiles_s": dict(zip(map(str, CDF_PERCENTS), percentiles_s(run.ttfts_s, CDF_PERCENTS), strict=True)),
    }


def _plain(value: object) -> object:
    """JSON has no infinity."""
    return None if isinstance(value, float) and math.isinf(value) else value


def comparable(records: Sequence[SimulationRecord], like: SimulationRecord) -> tuple[tuple[SimulationRecord, ...], int]:
    """What may be compared with a record: the last record of every policy in its setting.

    Returns:
        Those records, in the order of their policies' first runs, and how many records are of other settings.
    """
    wanted = _setting_of(like)
    same = [each for each in records if _setting_of(each) == wanted]
    return tuple({each.policy: each for each in same}.values()), len(records) - len(same)


def _setting_of(record: SimulationRecord) -> dict[str, Any]:
    """Everything but what came of it, and what is a policy's own."""
    return {key: value for key, value in msgspec.structs.asdict(record).items() if key not in OUTCOMES}


_LEGEND = (
    "TTFT: mean time to first token, p50 and p99 of it; TTLT: mean time to last token; in SLO: share of first tokens\n"
    "in time; GPU, link: busy; loaded, recomp: prefix tokens restored from a store, and recomputed"
)


def reuse_line(size: WorkloadSize, names: Sequence[str], *, block_tokens: int) -> str:
    """One line that says how much of a workload could be restored at all, and what it means where that is nothing."""
    if size.reusable_tokens:
        return (
            f"reuse: {size.reusable_share:.1%} of the prompt tokens ({size.reusable_tokens:,} of "
            f"{size.input_tokens:,}) stand in blocks of {block_tokens} with which an earlier prompt began"
        )
    differs = f"but {EMBEDDED}, which serves new prompts in another order" if EMBEDDED in names else "at all"
    return (
        f"reuse: none. No prompt of this workload begins with a full block of {block_tokens} tokens of an earlier one: "
        f"nothing can be restored, and no row differs {differs}"
    )


def table(records: Sequence[SimulationRecord]) -> Table:
    """Policies side by side, best mean first to the eye: in bold."""
    first = records[0]
    cluster = first.cluster or {}
    title = (
        f"{first.workload}: {first.num_requests:,} requests, {first.model} on "
        f"{cluster['num_replicas']} x {first.gpu}, {cluster['nic_bytes_per_s'] * 8 / 1e9:.4g} Gbit/s each; "
        f"costs: {first.costs}; "
        f"prompts {(first.hit_tokens or 0) / 1e6:.1f}M tokens in GPU memory, {(first.new_tokens or 0) / 1e6:.1f}M new"
    )
    best_s = min(each.ttft_mean_s or 0.0 for each in records)
    rows: list[Row] = []
    for each in records:
        values = msgspec.structs.asdict(each)
        cells = [
            each.policy,
            *(seconds(values[key]) for key in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "ttlt_mean_s")),
            *(f"{values[key]:.0%}" for key in ("in_time_share", "compute_busy", "link_busy")),
            *(f"{values[key] / 1e6:.1f}M" for key in ("loaded_tokens", "recomputed_tokens")),
        ]
        rows.append((cells, "bold" if each.ttft_mean_s == best_s else None))
    heads = ("policy", "TTFT", "p50", "p99", "TTLT", "in SLO", "GPU", "link", "loaded", "recomp")
    about = [f"{each.policy}: {SYSTEMS[each.policy].about}; order: {each.order}" for each in records
             if each.policy in (PLUGIN, EMBEDDED)]  # fmt: skip
    return text_table(title, heads, rows, caption="\n".join([_LEGEND, *about]))


def draw_ttft_cdf(records: Sequence[SimulationRecord], path: Path) -> Path:
    """Distributions of the time to first token, one of each policy, all of one setting.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    from cacheflow.bench.chart import draw_distributions

    first = records[0]
    title = f"{first.workload}: {first.model}, costs {first.costs}"
    return draw_distributions({each.policy: each.ttft_percentiles_s for each in records}, path, title=title,
                              dashed=EMBEDDED)  # fmt: skip
