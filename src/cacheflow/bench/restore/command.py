"""``cacheflow bench restore``: every policy over every ratio, alternating in one process, checked run by run."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cacheflow.bench.options import (
    add_study_arguments,
    check_study_arguments,
    float_list,
    int_list,
    make_folder,
    name_list,
)
from cacheflow.bench.record import RestoreRecord, append_record, environment, read_records
from cacheflow.bench.results_file import only_run, take_up
from cacheflow.bench.summary import summarise
from cacheflow.bench.table import console_tables
from cacheflow.errors import ConfigError
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy

if TYPE_CHECKING:
    from cacheflow.bench.restore.rounds import Round, RoundRun
    from cacheflow.bench.restore.study import Study, Wrong

SUITE = "restore"
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
OBJECTIVES = ("restore", "ttft")
CUDA_GBPS = (10.0, 40.0, 80.0, float("inf"))
"""Links studied on a GPU unless told otherwise: those of the paper, and no limit."""
PERTURBATIONS = {
    "cost_error=2": {"cost_error": 2.0},
    "cost_error=0.5": {"cost_error": 0.5},
    "bandwidth_error=2": {"bandwidth_error": 2.0},
    "bandwidth_error=0.5": {"bandwidth_error": 0.5},
    "link_drop=0.25": {"link_drop": 0.25},
}
"""Costs or bandwidth told wrongly by 2x either way; the link falling to a quarter half-way through the restoration."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench restore``."""
    add_study_arguments(parser, suffix=256, repeats=3)
    parser.add_argument("--ratios", type=float_list, metavar="R,R,...",
                        help="load time over recompute time (default: 0.25,0.5,1,2,4)")  # fmt: skip
    parser.add_argument("--gbps", type=float_list, metavar="G,G,...",
                        help="link bandwidths in gigabits per second instead of ratios; inf for no limit "
                        "(default with --device cuda: 10,40,80,inf)")  # fmt: skip
    parser.add_argument("--tokens", type=int_list, default=(4096,), metavar="N,N,...", help="prefix (default: 4096)")
    parser.add_argument("--layers-per-block", type=int, default=1, metavar="N")
    parser.add_argument("--policies", type=name_list, default=tuple(RESTORE_POLICIES), metavar="P,P,...",
                        help=f"default: {','.join(RESTORE_POLICIES)}")  # fmt: skip
    parser.add_argument("--objectives", type=name_list, default=OBJECTIVES, metavar=",".join(OBJECTIVES))
    parser.add_argument("--perturb", action="store_true",
                        help="run cacheflow with wrong costs, wrong bandwidth and a falling link instead")  # fmt: skip
    parser.add_argument("--store", choices=("memory", "file"), default="memory", help="where the prefix is saved (CPU)")


def run(args: argparse.Namespace) -> int:
    """Run the study, taking up an earlier one in the same folder; prints the table and draws the figures."""
    _check(args)
    console = Console()
    make_folder("--out", args.out)
    results = args.out / "results.jsonl"
    with only_run(args.out):
        if take_up(results, read_records, tell=partial(console.print, markup=False, soft_wrap=True)):
            console.print(f"going on with {results}: runs that are in it are not run again", markup=False)
        ends_s = float("inf") if args.time_limit_s is None else time.monotonic() + args.time_limit_s
        lengths = [_run_length(args, num_tokens, results, ends_s, console) for num_tokens in args.tokens]
    records = read_records(results) if results.exists() else []
    console.print(console_tables(summarise(records)))
    _draw(results, args.out, console)
    if not all(lengths):
        console.print(f"stopped at the time limit of {args.time_limit_s:.0f} s; run the same command again to go on")
    return 0 if all(record.correct for record in records) else 1


def _check(args: argparse.Namespace) -> None:
    for key, known in (("policies", tuple(RESTORE_POLICIES)), ("objectives", OBJECTIVES)):
        if not getattr(args, key):
            raise ConfigError(f"--{key} is empty; known: {', '.join(known)}")
    for name in args.policies:
        make_policy(name)
    if unknown := sorted(set(args.objectives) - set(OBJECTIVES)):
        raise ConfigError(f"--objectives {unknown} unknown; known: {', '.join(OBJECTIVES)}")
    _check_numbers(args)
    if args.perturb and (args.device != "cpu" or args.gbps):
        raise ConfigError("--perturb needs the throttled store: --device cpu, and --ratios instead of --gbps")
    if args.gbps and args.ratios is not None:
        raise ConfigError("--ratios and --gbps both say how fast the link is: drop one of them")
    if args.device == "cuda" and args.store != "memory":
        raise ConfigError(f"--store {args.store} is of --device cpu; on a GPU the prefix is in pinned memory: drop it")


def _check_numbers(args: argparse.Namespace) -> None:
    check_study_arguments(args)
    if args.layers_per_block < 1:
        raise ConfigError(f"--layers-per-block is {args.layers_per_block}, must be at least 1")
    for key, values in (("tokens", args.tokens), ("ratios", args.ratios or RATIOS), ("gbps", args.gbps or (1.0,))):
        if not all(value > 0 for value in values):
            raise ConfigError(f"--{key} {','.join(map(str, values))} must be above 0")
    if math.inf in (args.ratios or RATIOS):
        raise ConfigError(f"--ratios {args.ratios} must be finite; a link without a limit is --gbps inf")


def _run_length(args: argparse.Namespace, num_tokens: int, results: Path, ends_s: float, console: Console) -> bool:
    """Study one prefix length; False when the time limit ended it."""
    from cacheflow.bench.restore.rounds import is_done, run_round
    from cacheflow.bench.restore.study import open_study

    if time.monotonic() > ends_s:
        return False
    study = open_study(args, num_tokens)
    try:
        with _progress(console) as progress:
            task = progress.add_task(f"measuring costs, {num_tokens} tokens", total=study.num_cost_steps)
            study.prepare(lambda: progress.advance(task))
            done = read_records(results) if results.exists() else []
            suite = "perturbed" if args.perturb else SUITE
            rounds = [r for r in _rounds(args, study, done, suite) if not is_done(r, study, done, suite=suite)]
            task = progress.add_task("restoring", total=sum(len(r.policies) for r in rounds))
            named = {**environment(accelerator=_accelerator(args.device)), **_timing_check(study)}
            timelines: dict[str, RoundRun] = {}
            finished = False
            for round_ in rounds:
                if time.monotonic() > ends_s:
                    break

                def on_run(name: str, ratio: float = round_.ratio) -> None:
                    progress.update(task, description=f"ratio {ratio:.3g}, {name}", advance=1)

                runs = run_round(study, round_, suite=suite, environment=named, on_run=on_run)
                for each in runs:
                    append_record(results, each.record)
                if round_.with_suffix and not args.perturb:
                    _keep_timelines(timelines, runs)
            else:
                finished = True
            _write_timelines(timelines, args.out, num_tokens)
    finally:
        study.close()
    return finished


def _rounds(args: argparse.Namespace, study: Study, done: Sequence[RestoreRecord], suite: str) -> Iterator[Round]:
    """Every round of a length: repeats outermost, so that a drifting machine hits all ratios alike."""
    from cacheflow.bench.restore.rounds import Round

    for repeat in range(args.repeats):
        for ratio, bytes_per_s in _bandwidths(args, study, done, suite):
            for objective in args.objectives:
                common = {
                    "ratio": ratio,
                    "bytes_per_s": bytes_per_s,
                    "with_suffix": objective == "ttft",
                    "repeat": repeat,
                }
                if not args.perturb:
                    yield Round(policies=tuple(args.policies), **common)
                    continue
                for values in PERTURBATIONS.values():
                    wrong = _wrong(values, study, bytes_per_s)
                    policies = tuple(dict.fromkeys(("recompute", *args.policies)))
                    yield Round(policies=policies, wrong=wrong, perturbation=values, **common)


def _bandwidths(
    args: argparse.Namespace, study: Study, done: Sequence[RestoreRecord], suite: str
) -> Iterator[tuple[float, float]]:
    """``(ratio, bytes per second)`` of every link to study; a bandwidth keeps the ratio it has on record.

    Measured again it would differ in the second digit, and a study that is taken up would begin anew.
    """
    from cacheflow.bench.restore.rounds import ratio_on_record

    prefix_bytes = study.grid.num_tokens * study.model.shape.kv_bytes_per_token
    gbps = args.gbps or (CUDA_GBPS if args.device == "cuda" and args.ratios is None else ())
    if not gbps:
        for ratio in args.ratios or RATIOS:
            yield ratio, study.bytes_per_s(ratio)
    for each in gbps:
        bytes_per_s = each * 1e9 / 8
        ratio = ratio_on_record(study, done, suite=suite, bytes_per_s=bytes_per_s)
        if ratio is None:
            load_s = prefix_bytes / study.link_bytes_per_s(bytes_per_s)
            ratio = float(f"{load_s / study.recompute_s():.2g}")
        yield ratio, bytes_per_s


def _wrong(values: dict[str, float], study: Study, bytes_per_s: float) -> Wrong:
    from cacheflow.bench.restore.link import LinkDrop
    from cacheflow.bench.restore.study import Wrong

    drop = None
    if "link_drop" in values:
        hybrid_s = study.least_restore_s(bytes_per_s)
        drop = LinkDrop(factor=values["link_drop"], after_bytes=int(bytes_per_s * hybrid_s / 2))
    return Wrong(
        cost_error=values.get("cost_error", 1.0), bandwidth_error=values.get("bandwidth_error", 1.0), drop=drop
    )


def _keep_timelines(kept: dict[str, RoundRun], runs: Sequence[RoundRun]) -> None:
    """Keep the first timed repeat of the ratio nearest to 1: where load and compute are worth the same."""
    for run in runs:
        before = kept.get(run.record.policy)
        if before is None or abs(run.record.load_compute_ratio - 1) < abs(before.record.load_compute_ratio - 1):
            kept[run.record.policy] = run


def _write_timelines(kept: dict[str, RoundRun], out: Path, num_tokens: int) -> None:
    from cacheflow.bench.timeline import Timeline, write_timelines

    if kept:
        lines = [Timeline.of(run.report, bound_s=run.bound.ttft_s) for run in kept.values()]
        write_timelines(out / f"timelines-{num_tokens}.json", lines)


def _draw(results: Path, out: Path, console: Console) -> None:
    """Draw what can be drawn; says how to install matplotlib when it is missing."""
    from cacheflow.bench.chart import draw_results
    from cacheflow.bench.timeline import draw_timelines, read_timelines

    try:
        written = draw_results(results, out) if results.exists() else []
        for path in sorted(out.glob("timelines-*.json")):
            written.append(draw_timelines(read_timelines(path), path.with_suffix(".png")))
    except ConfigError as error:
        console.print(f"no figures: {error}", markup=False)
        return
    for path in written:
        console.print(f"drew {path}", markup=False)
    console.print(f"records in {results}", markup=False)


def _timing_check(study: Study) -> dict[str, float]:
    """On CUDA, device time between events over wall time of the cost measurements; nothing on the CPU."""
    return {} if study.events_over_wall is None else {"events_over_wall": round(study.events_over_wall, 4)}


def _accelerator(device: str) -> str | None:
    if device != "cuda":
        return None
    import torch

    return str(torch.cuda.get_device_name())


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
