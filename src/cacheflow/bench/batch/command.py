"""``cacheflow bench batch``: concurrent restorations under every batch policy, alternating, checked and simulated."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cacheflow.bench.batch.policies import CONTENDERS, find_contender
from cacheflow.bench.batch.record import BatchRecord, append_batch_record, read_batch_records
from cacheflow.bench.batch.summary import BatchSummary, simulator_agreement, summarise_batches
from cacheflow.bench.batch.table import batch_tables
from cacheflow.bench.options import (
    add_study_arguments,
    check_study_arguments,
    float_list,
    int_list,
    make_folder,
    name_list,
)
from cacheflow.bench.record import environment
from cacheflow.bench.results_file import only_run, take_up
from cacheflow.errors import ConfigError

if TYPE_CHECKING:
    from cacheflow.bench.batch.rounds import BatchRound
    from cacheflow.bench.batch.study import BatchStudy

LEAST_RATIO = 0.001
LENGTHS = (512, 1024, 1024, 2048, 2048, 3072, 4096, 6144)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench batch``."""
    add_study_arguments(parser, suffix=128, repeats=2)
    parser.add_argument("--policies", type=name_list, default=tuple(CONTENDERS), metavar="P,P,...",
                        help=f"default: {','.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--lengths", type=int_list, default=LENGTHS, metavar="N,N,...",
                        help=f"prefix tokens of each request (default: {','.join(map(str, LENGTHS))})")  # fmt: skip
    parser.add_argument("--ratios", type=float_list, default=(0.5, 1.0, 2.0), metavar="R,R,...",
                        help="load time over recompute time of all prefixes (default: 0.5,1,2)")  # fmt: skip
    parser.add_argument("--arrivals", type=_arrival_gap_s, default=0.0, metavar="together|GAP_S",
                        help="all together (the default), or so many seconds apart")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the orders of arrival (default: 0)")
    parser.add_argument("--starvation-s", type=float, metavar="S",
                        help="nobody is passed any more after waiting this long (default: no bound)")  # fmt: skip
    parser.add_argument("--slo-factor", type=float, default=2.0, metavar="F",
                        help="deadline, in times of what a request needs alone (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the study, taking up an earlier one in the same folder; prints the tables and draws the figure."""
    _check(args)
    console = Console()
    make_folder("--out", args.out)
    results = args.out / "results.jsonl"
    with only_run(args.out):
        done = take_up(results, read_batch_records, tell=partial(console.print, markup=False, soft_wrap=True))
        if done:
            console.print(f"going on with {results}: rounds that are in it are not run again", markup=False)
        finished = _run_rounds(args, results, done, console)
    records = read_batch_records(results) if results.exists() else []
    summaries = summarise_batches(records)
    console.print(batch_tables(summaries, simulator_agreement(records)))
    _draw(summaries, args.out, console)
    if not finished:
        console.print(f"stopped at the time limit of {args.time_limit_s:.0f} s; run the same command again to go on")
    return 0 if all(record.correct for record in records) else 1


def _arrival_gap_s(text: str) -> float:
    if text == "together":
        return 0.0
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'together' nor a number of seconds") from error


def _check(args: argparse.Namespace) -> None:
    if not args.policies:
        raise ConfigError(f"--policies is empty; known: {', '.join(CONTENDERS)}")
    for name in args.policies:
        find_contender(name)
    check_study_arguments(args)
    for key, values in (
        ("lengths", args.lengths),
        ("ratios", args.ratios),
        ("starvation-s", (1.0 if args.starvation_s is None else args.starvation_s,)),
        ("slo-factor", (args.slo_factor,)),
    ):
        if not all(0 < value < float("inf") for value in values):
            raise ConfigError(f"--{key} {','.join(map(str, values))} must be above 0 and finite")
    if not 0 <= args.arrivals < float("inf"):
        raise ConfigError(f"--arrivals is {args.arrivals}, must be 'together' or 0 or more seconds")
    if not LEAST_RATIO <= min(args.ratios) <= max(args.ratios) <= 1 / LEAST_RATIO:
        raise ConfigError(
            f"--ratios {','.join(map(str, args.ratios))} must be between {LEAST_RATIO} and {1 / LEAST_RATIO:g}: "
            "beyond it one side has nothing to do"
        )


def _run_rounds(args: argparse.Namespace, results: Path, done: Sequence[BatchRecord], console: Console) -> bool:
    """Run what is not on record yet; False when the time limit ended it."""
    from cacheflow.bench.batch.rounds import run_batch_round

    ends_s = float("inf") if args.time_limit_s is None else time.monotonic() + args.time_limit_s
    study = _open_study(args)
    try:
        rounds = [each for each in _rounds(args) if not _is_done(each, study, done)]
        if not rounds:
            return True
        with _progress(console) as progress:
            _prepare(study, progress)
            named = environment(accelerator=_accelerator(args.device))
            task = progress.add_task("restoring", total=sum(len(each.policies) for each in rounds))
            for round_ in rounds:
                if time.monotonic() > ends_s:
                    return False

                def on_run(name: str, round_: BatchRound = round_) -> None:
                    text = f"ratio {round_.ratio:.3g}, repeat {round_.repeat + 1}, {name}"
                    progress.update(task, description=text, advance=1)

                for record in run_batch_round(study, round_, environment=named, on_run=on_run):
                    append_batch_record(results, record)
    finally:
        study.close()
    return True


def _open_study(args: argparse.Namespace) -> BatchStudy:
    from cacheflow.bench.batch.study import BatchStudy, BatchStudyOptions
    from cacheflow.bench.setup import open_model, prompt_tokens

    options = BatchStudyOptions(lengths=tuple(args.lengths), suffix_tokens=args.suffix, chunk_tokens=args.chunk)
    model = open_model(args.model, shape=args.shape, device=args.device, dtype=args.dtype)
    return BatchStudy(model, prompt_tokens(model, options.num_tokens), options=options)


def _prepare(study: BatchStudy, progress: Progress) -> None:
    task = progress.add_task("measuring costs", total=None)

    def on_step(what: str, done: int, total: int) -> None:
        progress.update(task, description=what, completed=done, total=total)

    study.prepare(on_step)


def _rounds(args: argparse.Namespace) -> Iterator[BatchRound]:
    """Every round: repeats outermost, so that a drifting machine hits all ratios alike."""
    from cacheflow.bench.batch.rounds import BatchRound

    for repeat in range(args.repeats):
        for ratio in args.ratios:
            yield BatchRound(
                ratio=ratio,
                repeat=repeat,
                policies=tuple(args.policies),
                arrival_gap_s=args.arrivals,
                seed=args.seed,
                starvation_s=float("inf") if args.starvation_s is None else args.starvation_s,
                slo_factor=args.slo_factor,
            )


def _is_done(round_: BatchRound, study: BatchStudy, records: Sequence[BatchRecord]) -> bool:
    """Whether a results file already holds every run of a round."""
    starvation_s = None if round_.starvation_s == float("inf") else round_.starvation_s
    done = {
        record.policy
        for record in records
        if (record.model, record.fingerprint) == (study.model.name, study.model.fingerprint)
        and record.device == study.model.device.type
        and record.dtype == study.model.shape.dtype
        and (record.lengths, record.suffix_tokens) == (study.options.lengths, study.options.suffix_tokens)
        and record.chunk_tokens == study.options.chunk_tokens
        and (record.load_compute_ratio, record.arrival_gap_s) == (round_.ratio, round_.arrival_gap_s)
        and (record.repeat, record.seed, record.starvation_s) == (round_.repeat, round_.seed, starvation_s)
        and record.slo_factor == round_.slo_factor
    }
    return done >= set(round_.policies)


def _draw(summaries: Sequence[BatchSummary], out: Path, console: Console) -> None:
    """One figure for all ratios of a study; says how to install matplotlib when it is missing."""
    from cacheflow.bench.batch.plot import draw_batches

    studies: dict[object, list[BatchSummary]] = {}
    for summary in summaries:
        studies.setdefault(replace(summary.setting, load_compute_ratio=0.0), []).append(summary)
    for number, study in enumerate(studies.values(), start=1):
        try:
            path = draw_batches(study, out / ("batch.png" if len(studies) == 1 else f"batch-{number}.png"))
        except ConfigError as error:
            console.print(f"no figure: {error}", markup=False)
            return
        console.print(f"drew {path}", markup=False)


def _accelerator(device: str) -> str | None:
    if device != "cuda":
        return None
    import torch

    return str(torch.cuda.get_device_name())


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
