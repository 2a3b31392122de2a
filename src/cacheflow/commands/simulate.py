"""``cacheflow simulate``: replay a trace on a cluster you do not have, under every policy."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from cacheflow.bench.options import Flags, make_folder, option
from cacheflow.bench.records.simulation import SimulationRecord
from cacheflow.bench.records.suites import append_record, read_records
from cacheflow.bench.results_file import take_up
from cacheflow.bench.suite import new_progress
from cacheflow.commands.simulate_cluster import (
    ClusterFile,
    cluster_config,
    cluster_values,
    find_costs,
    inputs_fingerprint,
)
from cacheflow.commands.simulate_report import comparable, draw_ttft_cdf, outcome, reuse_line, table
from cacheflow.commands.simulate_workload import (
    Workload,
    generated_workload,
    measure,
    restarted,
    shaped,
    trace_workload,
)
from cacheflow.errors import ConfigError
from cacheflow.policies.objective import BatchObjective
from cacheflow.shapes.hardware import find_model
from cacheflow.sim.granularity import MAX_CELLS
from cacheflow.sim.policies import DEFAULT_SYSTEMS, EMBEDDED, PLUGIN, SYSTEMS, make_system
from cacheflow.sim.run import simulate
from cacheflow.workloads.sessions import PROFILES
from cacheflow.workloads.traces import FORMAT_NAMES

RESULTS = "results.jsonl"
PICTURE = "ttft-cdf.png"
OBJECTIVES = tuple(each.value for each in BatchObjective)
OURS = (PLUGIN, EMBEDDED)
"""The systems that have an objective."""
DEFAULT_SESSION_RATE = 0.5
DEFAULT_SESSIONS = 200
GREATEST_FACTOR = 1e6
"""Rates and loads may be this many times more, or less, than one."""
_FACTOR: dict[str, Any] = {"metavar": "X", "at_least": 1 / GREATEST_FACTOR, "at_most": GREATEST_FACTOR}


@dataclass(frozen=True, kw_only=True)
class SimulateFlags(Flags):
    """The options of ``cacheflow simulate``, besides those of ``ClusterFile``."""

    trace: Path | None = option(
        None, "requests to replay (.jsonl, .csv, .parquet; .gz)", metavar="FILE", one_of="workload"
    )
    workload: str | None = option(
        None, f"sessions to generate: {', '.join(PROFILES)}", metavar="NAME", one_of="workload",
        known=("workload", PROFILES),
    )  # fmt: skip
    out: Path = option(help=f"gets {RESULTS} and {PICTURE}", metavar="DIR")
    cluster: Path | None = option(None, ".json or .toml; options override it", metavar="FILE")
    format: str | None = option(
        None, f"of the trace: auto (default), {', '.join(FORMAT_NAMES)}", metavar="NAME",
        known=("trace format", ("auto", *FORMAT_NAMES)),
    )  # fmt: skip
    limit: int | None = option(None, "requests at most", metavar="N", at_least=1)
    duration_s: float | None = option(None, "seconds of arrivals at most", metavar="S", above=0, finite=True)
    rate_scale: float = option(1.0, "X times the load", **_FACTOR)
    repeat: int | None = option(None, "the trace N times over, with fresh prefixes", metavar="N", at_least=1)
    max_tokens: int | None = option(None, "leave out longer prompts", metavar="N", at_least=1)
    sessions: int | None = option(None, f"of --workload (default: {DEFAULT_SESSIONS})", metavar="N", at_least=1)
    session_rate: float | None = option(
        None, f"sessions that start a second, at random (--workload: {DEFAULT_SESSION_RATE}; --trace: as it says)",
        **_FACTOR,
    )  # fmt: skip
    costs: str = option(
        "roofline", "roofline (peaks), published (see --measured), or the file of a cacheflow calibrate profile",
        metavar="SOURCE", shown="",
    )  # fmt: skip
    measured: Path | None = option(None, "folder of LLMServingSim's CSV files", metavar="DIR")
    extrapolate: bool = option(False, "continue published attention beyond what was measured; is recorded")
    policies: tuple[str, ...] = option(
        DEFAULT_SYSTEMS,
        f"of {', '.join(SYSTEMS)} (default: all but {EMBEDDED}, whose order of new prompts no server has)",
        metavar="A,B", shown="", known=("policy", SYSTEMS),
    )  # fmt: skip
    objective: str | None = option(
        None, f"of {' and '.join(OURS)}: {', '.join(OBJECTIVES)} (default: {OBJECTIVES[0]})", metavar="NAME",
        known=("objective", OBJECTIVES),
    )  # fmt: skip
    slo_ttft_s: float = option(2.0, "a first token in time", metavar="S", above=0, finite=True)
    max_cells: int = option(
        MAX_CELLS, f"cells of one restoration (default: {MAX_CELLS}); 0 for every layer and chunk: exact, and slow",
        metavar="N", shown="", at_least=0,
    )  # fmt: skip
    seed: int = option(0, "of everything that is drawn", at_least=0)

    def __post_init__(self) -> None:
        """Check each value, and what says nothing without another.

        Raises:
            ConfigError: Names the option and what is allowed, or which to drop.
        """
        super().__post_init__()
        if self.max_cells == 1:
            raise ConfigError(f"--max-cells is {self.max_cells}, must be 2 or more, or 0 for exact grids")
        common_tokens = PROFILES[self.workload].common_tokens if self.workload is not None else 0
        if self.max_tokens is not None and self.max_tokens <= common_tokens:
            raise ConfigError(
                f"--max-tokens is {self.max_tokens}, must be above the {common_tokens} tokens that all prompts of "
                f"--workload {self.workload} begin with"
            )
        priced = self.costs == "published"
        for given, flag, without in (
            (self.trace is not None and self.sessions is not None, "--sessions", "--workload; a trace has its own"),
            (self.workload is not None and self.format is not None, "--format", "--trace"),
            (
                self.workload is not None and self.repeat is not None,
                "--repeat",
                "--trace; more sessions are --sessions",
            ),
            (not priced and self.measured is not None, "--measured", "--costs published"),
            (not priced and self.extrapolate, "--extrapolate", "--costs published"),
            (
                not set(OURS) & set(self.policies) and self.objective is not None,
                "--objective",
                f"{' or '.join(OURS)} among the --policies",
            ),
        ):
            if given:
                raise ConfigError(f"{flag} says nothing without {without}: drop {flag}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cacheflow simulate``."""
    SimulateFlags.add_flags(parser)
    ClusterFile.add_flags(parser, given_only=True)


def run(args: argparse.Namespace) -> int:
    """Simulate every policy; writes records and a picture, prints the table.

    Raises:
        ConfigError: A value is wrong, or the workload does not fit the cluster.
        CostRangeError: A request needs a cost that was not measured.
    """
    flags = SimulateFlags.of(args)
    values = cluster_values(flags.cluster, {key: value for key, value in vars(args).items() if key in _CLUSTER_FLAGS})
    shape = find_model(values.model)
    config = cluster_config(values, shape, slo_ttft_s=flags.slo_ttft_s)
    costs = find_costs(flags.costs, values, shape, measured=flags.measured, extrapolate=flags.extrapolate)
    workload, objective = _workload(flags, config.block_tokens), flags.objective or OBJECTIVES[0]
    systems = [
        make_system(name, objective=objective, exact=flags.max_cells == 0, max_cells=flags.max_cells or MAX_CELLS)
        for name in flags.policies
    ]
    size = measure(workload, config, costs)
    setting: dict[str, Any] = {
        **{name: getattr(flags, name) for name in _ON_RECORD},
        "workload": flags.workload or (flags.trace or Path()).name,
        "model": costs.model,
        "gpu": costs.gpu,
        "costs": costs.source,
        "objective": objective,
        "num_sessions": flags.sessions,
        "session_rate_per_s": flags.session_rate,
        "inputs_fingerprint": inputs_fingerprint(flags.costs, values, shape, measured=flags.measured),
        "requests_fingerprint": size.fingerprint,
        "reusable_tokens": size.reusable_tokens,
    }
    make_folder("--out", flags.out)
    console, results = Console(highlight=False, markup=False), flags.out / RESULTS
    take_up(results, lambda path: read_records(path, SimulationRecord), tell=partial(console.print, soft_wrap=True))
    records = []
    with new_progress(console) as progress:
        for system in systems:
            task = progress.add_task(f"{system.name:14s}", total=size.num_requests)
            start_s = time.perf_counter()
            done = simulate(
                workload.read(),
                config=config,
                costs=costs,
                policy=system,
                progress=lambda served, task=task: progress.update(task, completed=served),  # type: ignore[misc]
            )
            wall_s = time.perf_counter() - start_s
            records.append(SimulationRecord(**setting, **outcome(done, config), wall_s=wall_s))
            append_record(results, records[-1])
    console.print(table(records))
    console.print(reuse_line(size, flags.policies, block_tokens=config.block_tokens), soft_wrap=True)
    console.print(_draw(flags.out, records[-1]), soft_wrap=True)
    return 0


_CLUSTER_FLAGS = ("num_replicas", "model", "gpu", "bandwidth_gbps", "kv_tokens")
_ON_RECORD = ("format", "limit", "duration_s", "repeat", "max_tokens", "seed", "max_cells", "rate_scale")


def _workload(flags: SimulateFlags, block_tokens: int) -> Workload:
    if flags.workload is not None:
        found = generated_workload(
            flags.workload,
            num_sessions=flags.sessions or DEFAULT_SESSIONS,
            rate_per_s=flags.session_rate or DEFAULT_SESSION_RATE,
            seed=flags.seed,
            block_tokens=block_tokens,
            max_tokens=flags.max_tokens,
        )
    else:
        assert flags.trace is not None, "one of both is required"
        found = trace_workload(
            flags.trace, format=flags.format or "auto", block_tokens=block_tokens, repeat=flags.repeat or 1
        )
        if flags.session_rate is not None:
            found = restarted(found, rate_per_s=flags.session_rate, seed=flags.seed)
    return shaped(
        found,
        limit=flags.limit,
        duration_s=flags.duration_s,
        rate_scale=flags.rate_scale,
        seed=flags.seed,
        max_tokens=flags.max_tokens,
    )


def _draw(out: Path, last: SimulationRecord) -> str:
    """Draw the distributions of what has the setting of this run; returns the line that says so."""
    if find_spec("matplotlib") is None:
        return "No picture: matplotlib is missing. pip install 'cacheflow-kv[plots]'"
    try:
        shown, num_others = comparable(read_records(out / RESULTS, SimulationRecord), last)
        line = f"Picture: {draw_ttft_cdf(shown, out / PICTURE)}"
        return line + (f" (without {num_others} records of other settings in {out / RESULTS})" if num_others else "")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error
