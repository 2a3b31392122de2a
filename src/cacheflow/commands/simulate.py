"""``cacheflow simulate``: replay a trace on a cluster you do not have, under every policy."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cacheflow.bench.options import make_folder
from cacheflow.bench.results_file import append_line, take_up
from cacheflow.commands.simulate_cluster import (
    cluster_config,
    cluster_values,
    find_costs,
    find_shape,
    inputs_fingerprint,
)
from cacheflow.commands.simulate_options import (
    DEFAULT_SESSION_RATE,
    DEFAULT_SESSIONS,
    OBJECTIVES,
    PICTURE,
    RESULTS,
    add_arguments,
    check_arguments,
)
from cacheflow.commands.simulate_report import Setting, comparable, read_simulations, record, reuse_line, table
from cacheflow.commands.simulate_workload import (
    Workload,
    generated_workload,
    measure,
    restarted,
    shaped,
    trace_workload,
)
from cacheflow.errors import ConfigError
from cacheflow.sim.granularity import MAX_CELLS
from cacheflow.sim.policies import make_system
from cacheflow.sim.run import simulate

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Simulate every policy; writes records and a picture, prints the table.

    Raises:
        ConfigError: A value is wrong, or the workload does not fit the cluster.
        CostRangeError: A request needs a cost that was not measured.
    """
    check_arguments(args)
    setting, workload = _prepare(args)
    systems = [
        make_system(name, objective=setting.objective, exact=args.max_cells == 0, max_cells=args.max_cells or MAX_CELLS)
        for name in args.policies
    ]
    size = measure(workload, setting.cluster, setting.costs)
    setting = replace(setting, requests_fingerprint=size.fingerprint, reusable_tokens=size.reusable_tokens)
    make_folder("--out", args.out)
    console = Console(highlight=False, markup=False)
    take_up(args.out / RESULTS, read_simulations, tell=partial(console.print, soft_wrap=True))
    records = []
    with _progress(console) as progress:
        for system in systems:
            task = progress.add_task(system.name, total=size.num_requests)
            start_s = time.perf_counter()
            outcome = simulate(
                workload.read(),
                config=setting.cluster,
                costs=setting.costs,
                policy=system,
                progress=lambda served, task=task: progress.update(task, completed=served),  # type: ignore[misc]
            )
            records.append(record(setting, outcome, wall_s=time.perf_counter() - start_s))
            append_line(args.out / RESULTS, json.dumps(records[-1], allow_nan=False))
    console.print(table(records))
    console.print(reuse_line(size, args.policies, block_tokens=setting.cluster.block_tokens), soft_wrap=True)
    console.print(_draw(args.out, records[-1]), soft_wrap=True)
    return 0


def _prepare(args: argparse.Namespace) -> tuple[Setting, Workload]:
    values = cluster_values(args.cluster, _overrides(args))
    shape = find_shape(values["model"])
    setting = Setting(
        workload=args.workload or args.trace.name,
        costs=find_costs(args.costs, values, shape, measured=args.measured, extrapolate=args.extrapolate),
        inputs_fingerprint=inputs_fingerprint(args.costs, values, shape, measured=args.measured),
        cluster=cluster_config(values, shape, slo_ttft_s=args.slo_ttft_s),
        objective=args.objective or OBJECTIVES[0],
        seed=args.seed,
        max_cells=args.max_cells,
        rate_scale=args.rate_scale,
        shaping={
            "format": args.format,
            "limit": args.limit,
            "duration_s": args.duration_s,
            "repeat": args.repeat,
            "max_tokens": args.max_tokens,
            "num_sessions": args.sessions,
            "session_rate_per_s": args.session_rate,
        },
    )
    return setting, _workload(args, setting.cluster.block_tokens)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_replicas": args.replicas,
        "model": args.model,
        "gpu": args.gpu,
        "bandwidth_gbps": args.bandwidth_gbps,
        "kv_tokens": args.kv_tokens,
    }


def _workload(args: argparse.Namespace, block_tokens: int) -> Workload:
    if args.workload is not None:
        found = generated_workload(
            args.workload,
            num_sessions=args.sessions or DEFAULT_SESSIONS,
            rate_per_s=DEFAULT_SESSION_RATE if args.session_rate is None else args.session_rate,
            seed=args.seed,
            block_tokens=block_tokens,
            max_tokens=args.max_tokens,
        )
    else:
        found = trace_workload(
            args.trace, format=args.format or "auto", block_tokens=block_tokens, repeat=args.repeat or 1
        )
        if args.session_rate is not None:
            found = restarted(found, rate_per_s=args.session_rate, seed=args.seed)
    return shaped(
        found,
        limit=args.limit,
        duration_s=args.duration_s,
        rate_scale=args.rate_scale,
        seed=args.seed,
        max_tokens=args.max_tokens,
    )


def _draw(out: Path, last: Mapping[str, Any]) -> str:
    """Draw the distributions of what has the setting of this run; returns the line that tells the user."""
    if find_spec("matplotlib") is None:
        return "No picture: matplotlib is missing. pip install 'cacheflow-kv[plots]'"
    from cacheflow.bench.chart import draw_ttft_cdf

    try:
        shown, num_others = comparable(read_simulations(out / RESULTS), last)
        line = f"Picture: {draw_ttft_cdf(list(shown), out / PICTURE)}"
        return line + (f" (without {num_others} records of other settings in {out / RESULTS})" if num_others else "")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:14s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
