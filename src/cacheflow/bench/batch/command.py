"""``cacheflow bench batch``: concurrent restorations under every batch policy, alternating, checked and simulated."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cacheflow.bench.batch.policies import CONTENDERS
from cacheflow.bench.batch.report import batch_tables, draw_batches
from cacheflow.bench.environment import accelerator_name, environment
from cacheflow.bench.options import EmbeddedFlags, option
from cacheflow.bench.records.batch import BatchRecord
from cacheflow.bench.suite import Suite, SuiteRun, new_progress
from cacheflow.errors import ConfigError

if TYPE_CHECKING:
    from cacheflow.bench.batch.rounds import BatchRound
    from cacheflow.bench.batch.study import BatchStudy

LEAST_RATIO = 0.001
LENGTHS = (512, 1024, 1024, 2048, 2048, 3072, 4096, 6144)


def _arrival_gap_s(text: str) -> float:
    if text == "together":
        return 0.0
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'together' nor a number of seconds") from error


@dataclass(frozen=True, kw_only=True)
class BatchFlags(EmbeddedFlags):
    """The options of ``bench batch``."""

    suffix: int = option(128, "new tokens", metavar="N", at_least=1)
    repeats: int = option(2, "alternations", metavar="N", at_least=1)
    policies: tuple[str, ...] = option(tuple(CONTENDERS), metavar="P,P,...", known=("policy", CONTENDERS))
    lengths: tuple[int, ...] = option(LENGTHS, "prefix tokens of each request", metavar="N,N,...", above=0, finite=True)
    ratios: tuple[float, ...] = option(
        (0.5, 1.0, 2.0), "load time over recompute time of all prefixes", metavar="R,R,...", above=0, finite=True
    )
    arrivals: float = option(
        0.0, "all together (the default), or so many seconds apart", metavar="together|GAP_S", parse=_arrival_gap_s,
        shown="", at_least=0, finite=True,
    )  # fmt: skip
    seed: int = option(0, "of the orders of arrival", metavar="N")
    starvation_s: float | None = option(
        None, "nobody is passed any more after waiting this long (default: no bound)", metavar="S", above=0, finite=True
    )
    slo_factor: float = option(
        2.0, "deadline, in times of what a request needs alone", metavar="F", above=0, finite=True
    )

    def __post_init__(self) -> None:
        """Check each value, and that both sides have something to do.

        Raises:
            ConfigError: Names the option.
        """
        super().__post_init__()
        if not LEAST_RATIO <= min(self.ratios) <= max(self.ratios) <= 1 / LEAST_RATIO:
            raise ConfigError(
                f"--ratios {','.join(map(str, self.ratios))} must be between {LEAST_RATIO} and {1 / LEAST_RATIO:g}: "
                "beyond it one side has nothing to do"
            )


add_arguments = BatchFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Run the study, taking up an earlier one in the same folder; prints the tables and draws the figure."""
    flags = BatchFlags.of(args)
    suite = Suite(
        out=flags.out,
        kind=BatchRecord,
        show=batch_tables,
        draw=lambda records: draw_batches(records, flags.out),
        time_limit_s=flags.time_limit_s,
        resumes=True,
    )
    return suite.run(partial(_work, flags))


def _work(flags: BatchFlags, suite: SuiteRun[BatchRecord]) -> bool:
    """Run what is not on record yet; False when the time limit ended it."""
    from cacheflow.bench.batch import rounds

    study = _open_study(flags)
    try:
        todo = [each for each in _rounds(flags) if not _is_done(each, study, suite.done)]
        if not todo:
            return True
        with new_progress(suite.console) as progress:
            task = progress.add_task("measuring costs", total=None)
            study.prepare(
                lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
            )
            named = environment(accelerator=accelerator_name(flags.device))
            return suite.run_rounds(
                progress,
                todo,
                lambda each, on_run: rounds.run_batch_round(study, each, environment=named, on_run=on_run),
                lambda each: f"ratio {each.ratio:.3g}, repeat {each.repeat + 1}",
            )
    finally:
        study.close()


def _open_study(flags: BatchFlags) -> BatchStudy:
    from cacheflow.bench.batch.study import BatchStudy, BatchStudyOptions
    from cacheflow.bench.setup import open_model, prompt_tokens
    from cacheflow.plan.cell_sizes import READS_IN_FLIGHT
    from cacheflow.restore.options import ExecutorOptions

    executor = ExecutorOptions(least_reads_in_flight=READS_IN_FLIGHT[flags.device])
    options = BatchStudyOptions(
        lengths=flags.lengths, suffix_tokens=flags.suffix, chunk_tokens=flags.chunk_tokens, executor=executor
    )
    model = open_model(flags)
    return BatchStudy(model, prompt_tokens(model, options.num_tokens), options=options)


def _rounds(flags: BatchFlags) -> list[BatchRound]:
    """Every round: repeats outermost, so that a drifting machine hits all ratios alike."""
    from cacheflow.bench.batch.rounds import BatchRound

    return [
        BatchRound(
            ratio=ratio,
            repeat=repeat,
            policies=flags.policies,
            arrival_gap_s=flags.arrivals,
            seed=flags.seed,
            starvation_s=flags.starvation_s,
            slo_factor=flags.slo_factor,
        )
        for repeat in range(flags.repeats)
        for ratio in flags.ratios
    ]


def _is_done(round_: BatchRound, study: BatchStudy, records: Sequence[BatchRecord]) -> bool:
    """Whether a results file already holds every run of a round."""
    from cacheflow.bench.make_record import of_model

    wanted = {
        **of_model(study.model), "lengths": study.options.lengths,
        "suffix_tokens": study.options.suffix_tokens, "chunk_tokens": study.options.chunk_tokens,
        "load_compute_ratio": round_.ratio, "arrival_gap_s": round_.arrival_gap_s, "repeat": round_.repeat,
        "seed": round_.seed, "starvation_s": round_.starvation_s, "slo_factor": round_.slo_factor,
    }  # fmt: skip
    done = {record.policy for record in records if all(getattr(record, key) == wanted[key] for key in wanted)}
    return done >= set(round_.policies)
