"""Records of simulations, and the table of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cacheflow.bench.table import seconds
from cacheflow.errors import ConfigError
from cacheflow.sim.cluster import ClusterConfig
from cacheflow.sim.costs import ChunkCosts
from cacheflow.sim.results import percentiles_s
from cacheflow.sim.run import Run

SUITE = "simulate"
CDF_PERCENTS = (*(float(each) for each in range(101)), 99.5, 99.9)
"""Percentiles of the time to first token that a record keeps, for the picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all runs of one command share.

    Attributes:
        workload: Name of the trace or profile.
        costs: What the GPUs take.
        cluster: The cluster.
        objective: What ``cacheflow`` minimises.
        seed: Of everything that is drawn.
        max_cells: Cells of a restoration; 0 for exact grids.
        rate_scale: How many times as many requests a second as the workload has by itself.
    """

    workload: str
    costs: ChunkCosts
    cluster: ClusterConfig
    objective: str
    seed: int
    max_cells: int
    rate_scale: float


def record(setting: Setting, run: Run, *, wall_s: float) -> dict[str, Any]:
    """One line of ``results.jsonl``; but for ``wall_s`` it depends on nothing but the command."""
    cdf = dict(zip(map(str, CDF_PERCENTS), percentiles_s(run.ttfts_s, CDF_PERCENTS), strict=True))
    return {
        "suite": SUITE,
        "policy": run.policy,
        "workload": setting.workload,
        "model": setting.costs.model,
        "gpu": setting.costs.gpu,
        "costs": setting.costs.source,
        "objective": setting.objective,
        "seed": setting.seed,
        "max_cells": setting.max_cells,
        "rate_scale": setting.rate_scale,
        "cluster": {key: _plain(value) for key, value in asdict(setting.cluster).items()},
        **asdict(run.result),
        "ttft_percentiles_s": cdf,
        "wall_s": wall_s,
    }


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a results file.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(each, allow_nan=False) + "\n" for each in records)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def read_simulations(path: Path) -> list[dict[str, Any]]:
    """The simulations in a results file, in its order.

    Raises:
        ConfigError: It cannot be read, or holds none.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    found = [each for each in records if isinstance(each, dict) and each.get("suite") == SUITE and "policy" in each]
    if not found:
        raise ConfigError(f"{path} holds no simulation; run `cacheflow simulate --out` first")
    return found


_LEGEND = (
    "TTFT: mean time to first token, p50 and p99 of it; TTLT: mean time to last token; in SLO: share of first tokens\n"
    "in time; GPU, link: busy; loaded, recomp: prefix tokens restored from a store, and recomputed"
)


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Policies side by side, best mean first to the eye: in bold."""
    first = records[0]
    title = (
        f"{first['workload']}: {first['num_requests']:,} requests, {first['model']} on "
        f"{first['cluster']['num_replicas']} x {first['gpu']}, "
        f"{first['cluster']['nic_bytes_per_s'] * 8 / 1e9:.4g} Gbit/s each; costs: {first['costs']}; "
        f"prompts {first['hit_tokens'] / 1e6:.1f}M tokens in GPU memory, {first['new_tokens'] / 1e6:.1f}M new"
    )
    shown = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        caption=_LEGEND,
        caption_style="dim",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    shown.add_column("policy", no_wrap=True)
    for name in ("TTFT", "p50", "p99", "TTLT", "in SLO", "GPU", "link", "loaded", "recomp"):
        shown.add_column(name, justify="right", no_wrap=True)
    best_s = min(each["ttft_mean_s"] for each in records)
    for each in records:
        cells = [
            *(seconds(each[key]) for key in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "ttlt_mean_s")),
            *(f"{each[key]:.0%}" for key in ("in_time_share", "compute_busy", "link_busy")),
            *(f"{each[key] / 1e6:.1f}M" for key in ("loaded_tokens", "recomputed_tokens")),
        ]
        shown.add_row(each["policy"], *cells, style="bold" if each["ttft_mean_s"] == best_s else None)
    return shown


def _plain(value: object) -> object:
    """JSON has no infinity."""
    return None if isinstance(value, float) and math.isinf(value) else value
