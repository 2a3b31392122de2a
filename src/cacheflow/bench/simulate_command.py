"""``cacheflow simulate``: replay a trace on a cluster you do not have, under every policy."""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cacheflow.bench.hardware import GPUS, MODEL_SHAPES
from cacheflow.bench.options import make_folder, name_list
from cacheflow.bench.simulate_report import Setting, append, record, table
from cacheflow.bench.simulate_setup import cluster_config, cluster_values, find_costs, find_shape
from cacheflow.bench.simulate_workload import (
    Workload,
    generated_workload,
    measure,
    restarted,
    shaped,
    trace_workload,
)
from cacheflow.errors import ConfigError
from cacheflow.policies.objective import Objective
from cacheflow.sim.granularity import MAX_CELLS, Grain
from cacheflow.sim.policies import SYSTEMS, make_system
from cacheflow.sim.run import simulate
from cacheflow.workloads.sessions import PROFILES
from cacheflow.workloads.traces import FORMAT_NAMES

RESULTS = "results.jsonl"
PICTURE = "ttft-cdf.png"
DEFAULT_SESSION_RATE = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cacheflow simulate``."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", type=Path, metavar="FILE", help="requests to replay (.jsonl, .csv, .parquet; .gz)")
    what.add_argument("--workload", metavar="NAME", help=f"sessions to generate: {', '.join(PROFILES)}")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"gets {RESULTS} and {PICTURE}")
    _add_cluster_arguments(parser)
    _add_workload_arguments(parser)
    parser.add_argument(
        "--costs", default="roofline", metavar="SOURCE",
        help="roofline (peaks), published (see --measured), or the file of a `cacheflow calibrate` profile",
    )  # fmt: skip
    parser.add_argument("--measured", type=Path, metavar="DIR", help="folder of LLMServingSim's CSV files")
    parser.add_argument(
        "--extrapolate", action="store_true", help="continue published attention beyond what was measured; is recorded"
    )
    parser.add_argument(
        "--policies", type=name_list, default=tuple(SYSTEMS), metavar="A,B", help=f"of {', '.join(SYSTEMS)} (all)"
    )
    objectives = ", ".join(each.value for each in Objective)
    parser.add_argument(
        "--objective", default=Objective.MEAN_TTFT.value, metavar="NAME", help=f"of cacheflow: {objectives}"
    )
    parser.add_argument("--slo-ttft-s", type=float, default=2.0, metavar="S", help="a first token in time (default: 2)")
    parser.add_argument(
        "--max-cells", type=int, default=MAX_CELLS, metavar="N",
        help=f"cells of one restoration (default: {MAX_CELLS}); 0 for every layer and chunk: exact, and slow",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")


def _add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", type=Path, metavar="FILE", help=".json or .toml; options override it")
    parser.add_argument("--replicas", type=int, metavar="N", help="engines, a GPU and a link each (default: 8)")
    parser.add_argument("--model", metavar="SHAPE", help=f"{', '.join(MODEL_SHAPES)}, or a .json file of a shape")
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}, or a .json file of peaks")
    parser.add_argument("--bandwidth-gbps", type=float, metavar="G", help="of each link to the store (default: 10)")
    parser.add_argument("--kv-tokens", type=int, metavar="N", help="tokens in GPU memory (default: what it leaves)")


def _add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", default="auto", metavar="NAME", help=f"of the trace: auto, {', '.join(FORMAT_NAMES)}"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="requests at most")
    parser.add_argument("--duration-s", type=float, metavar="S", help="seconds of arrivals at most")
    parser.add_argument("--rate-scale", type=float, default=1.0, metavar="X", help="X times the load (default: 1)")
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="the trace N times over, with fresh prefixes"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="leave out longer prompts")
    parser.add_argument("--sessions", type=int, default=200, metavar="N", help="of --workload (default: 200)")
    parser.add_argument(
        "--session-rate", type=float, metavar="X",
        help=f"sessions that start a second, at random (--workload: {DEFAULT_SESSION_RATE}; --trace: as it says)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Simulate every policy; writes records and a picture, prints the table.

    Raises:
        ConfigError: A value is wrong, or the workload does not fit the cluster.
        CostRangeError: A request needs a cost that was not measured.
    """
    setting, workload = _prepare(args)
    policies = [
        make_system(name, objective=args.objective, exact=args.max_cells == 0, max_cells=args.max_cells or MAX_CELLS)
        for name in args.policies
    ]
    if not policies:
        raise ConfigError(f"--policies names none; known are {', '.join(SYSTEMS)}")
    size = measure(workload, setting.cluster, setting.costs)
    make_folder("--out", args.out)
    console = Console(highlight=False, markup=False)
    records = []
    with _progress(console) as progress:
        for policy in policies:
            task = progress.add_task(policy.name, total=size.num_requests)
            start_s = time.perf_counter()
            outcome = simulate(
                workload.read(),
                config=setting.cluster,
                costs=setting.costs,
                policy=policy,
                progress=lambda served, task=task: progress.update(task, completed=served),  # type: ignore[misc]
            )
            records.append(record(setting, outcome, wall_s=time.perf_counter() - start_s))
            append(args.out / RESULTS, records[-1:])
    console.print(table(records))
    console.print(_draw(args.out), soft_wrap=True)
    return 0


def _prepare(args: argparse.Namespace) -> tuple[Setting, Workload]:
    Grain(max_cells=args.max_cells)
    if not 0 < args.slo_ttft_s < float("inf"):
        raise ConfigError(f"--slo-ttft-s is {args.slo_ttft_s}, must be above 0 and finite")
    if args.seed < 0:
        raise ConfigError(f"--seed is {args.seed}, must be 0 or more")
    values = cluster_values(args.cluster, _overrides(args))
    shape = find_shape(values["model"])
    costs = find_costs(args.costs, values, shape, measured=args.measured, extrapolate=args.extrapolate)
    setting = Setting(
        workload=args.workload or args.trace.name,
        costs=costs,
        cluster=cluster_config(values, shape, slo_ttft_s=args.slo_ttft_s),
        objective=args.objective,
        seed=args.seed,
        max_cells=args.max_cells,
        rate_scale=args.rate_scale,
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
            num_sessions=args.sessions,
            rate_per_s=DEFAULT_SESSION_RATE if args.session_rate is None else args.session_rate,
            seed=args.seed,
            block_tokens=block_tokens,
            max_tokens=args.max_tokens,
        )
    else:
        found = trace_workload(args.trace, format=args.format, block_tokens=block_tokens, repeat=args.repeat)
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


def _draw(out: Path) -> str:
    """Draw the distributions; returns the line that tells the user."""
    if find_spec("matplotlib") is None:
        return "No picture: matplotlib is missing. pip install 'cacheflow-kv[plots]'"
    from cacheflow.bench.plots import draw_ttft_cdf

    try:
        return f"Picture: {draw_ttft_cdf(out / RESULTS, out / PICTURE)}"
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:14s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
