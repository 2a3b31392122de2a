"""Records of simulations, and the table of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cacheflow.bench.results_file import read_lines
from cacheflow.bench.table import seconds
from cacheflow.commands.simulate_workload import WorkloadSize
from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json
from cacheflow.sim.cluster import ClusterConfig
from cacheflow.sim.costs import ChunkCosts
from cacheflow.sim.policies import EMBEDDED, PLUGIN, SYSTEMS
from cacheflow.sim.results import RunResult, percentiles_s
from cacheflow.sim.run import Run

SUITE = "simulate"
CDF_PERCENTS = (*(float(each) for each in range(101)), 99.5, 99.9)
"""Percentiles of the time to first token that a record keeps, for the picture."""
OUTCOMES = {
    "policy", "order", "objective", "reusable_tokens", "ttft_percentiles_s", "wall_s",
    *(each.name for each in fields(RunResult)),
}  # fmt: skip
"""Fields of a record that do not belong to its setting."""
NEEDED = ("policy", "workload", "model", "costs", "ttft_percentiles_s")
"""Fields that are drawn, and that every record has had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all runs of one command share.

    Attributes:
        workload: Name of the trace or profile.
        costs: What the GPUs take.
        cluster: The cluster.
        objective: What ours minimise.
        seed: Of everything that is drawn.
        max_cells: Cells of a restoration; 0 for exact grids.
        rate_scale: How many times as many requests a second as the workload has by itself.
        shaping: The other options that shape the workload, by name; None for those that were not given.
        inputs_fingerprint: Tells apart models, GPUs and costs of the same names.
        requests_fingerprint: Tells apart traces of the same name, and whatever else makes other requests of them.
        reusable_tokens: Prompt tokens that an earlier prompt began with too.
    """

    workload: str
    costs: ChunkCosts
    cluster: ClusterConfig
    objective: str
    seed: int
    max_cells: int
    rate_scale: float
    shaping: Mapping[str, Any]
    inputs_fingerprint: str
    requests_fingerprint: str = ""
    reusable_tokens: int = 0


def record(setting: Setting, run: Run, *, wall_s: float) -> dict[str, Any]:
    """One line of ``results.jsonl``; but for ``wall_s`` it depends on nothing but the command."""
    cdf = dict(zip(map(str, CDF_PERCENTS), percentiles_s(run.ttfts_s, CDF_PERCENTS), strict=True))
    return {
        "suite": SUITE,
        "policy": run.policy,
        "order": SYSTEMS[run.policy].order,
        "workload": setting.workload,
        "model": setting.costs.model,
        "gpu": setting.costs.gpu,
        "costs": setting.costs.source,
        "objective": setting.objective,
        "seed": setting.seed,
        "max_cells": setting.max_cells,
        "rate_scale": setting.rate_scale,
        **setting.shaping,
        "inputs_fingerprint": setting.inputs_fingerprint,
        "requests_fingerprint": setting.requests_fingerprint,
        "reusable_tokens": setting.reusable_tokens,
        "cluster": {key: _plain(value) for key, value in asdict(setting.cluster).items()},
        **asdict(run.result),
        "ttft_percentiles_s": cdf,
        "wall_s": wall_s,
    }


def read_simulations(path: Path) -> list[dict[str, Any]]:
    """The simulations in a results file, in its order; lines of other suites are skipped.

    Records that do not say their order are of the time when ``cacheflow`` was the embedded engine's: they are named so.

    Raises:
        ConfigError: It cannot be read, or a line is malformed; the message names the line.
    """
    return [each for each in read_lines(path, _parse) if each.get("suite") == SUITE]


def _parse(line: str) -> dict[str, Any]:
    values = parse_json(line)
    if not isinstance(values, dict):
        raise ConfigError(f"a record is a JSON object, not {type(values).__name__}")
    if values.get("suite") == SUITE and (missing := [key for key in NEEDED if key not in values]):
        raise ConfigError(f"a simulation without {', '.join(missing)}")
    if values.get("suite") == SUITE and values["policy"] == PLUGIN and "order" not in values:
        values |= {"policy": EMBEDDED, "order": SYSTEMS[EMBEDDED].order}
    return values


def comparable(
    records: Sequence[Mapping[str, Any]], like: Mapping[str, Any]
) -> tuple[tuple[Mapping[str, Any], ...], int]:
    """What may be compared with a record: the last record of every policy in its setting.

    Returns:
        Those records, in the order of their policies' first runs, and how many records are of other settings.
    """
    wanted = _setting_of(like)
    same = [each for each in records if _setting_of(each) == wanted]
    return tuple({each["policy"]: each for each in same}.values()), len(records) - len(same)


def _setting_of(values: Mapping[str, Any]) -> str:
    """Everything but what came of it, and what is a policy's own."""
    return json.dumps({key: value for key, value in values.items() if key not in OUTCOMES}, sort_keys=True)


_LEGEND = (
    "TTFT: mean time to first token, p50 and p99 of it; TTLT: mean time to last token; in SLO: share of first tokens\n"
    "in time; GPU, link: busy; loaded, recomp: prefix tokens restored from a store, and recomputed"
)


def reuse_line(size: WorkloadSize, names: Sequence[str], *, block_tokens: int) -> str:
    """One line that says how much of a workload could be restored at all, and what it means where that is nothing.

    Args:
        size: The workload.
        names: The systems that are compared.
        block_tokens: Tokens of a block.
    """
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


def _legend(records: Sequence[Mapping[str, Any]]) -> str:
    """What the columns are, and whom each of ours serves first."""
    about = [f"{each['policy']}: {SYSTEMS[each['policy']].about}; order: {each['order']}" for each in records
             if each["policy"] in (PLUGIN, EMBEDDED)]  # fmt: skip
    return "\n".join([_LEGEND, *about])


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
        caption=_legend(records),
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
