"""``cacheflow bench restore``: every policy over every ratio, alternating in one process, checked run by run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cacheflow.bench.chart import draw_results
from cacheflow.bench.environment import accelerator_name, environment
from cacheflow.bench.options import EmbeddedFlags, option
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.suite import OnRun, Suite, SuiteRun, new_progress
from cacheflow.bench.summary import console_tables, summarise
from cacheflow.bench.timeline import Timeline, draw_timelines, read_timelines, write_timelines
from cacheflow.errors import ConfigError
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.shapes.hardware import find_model
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.stores.shared import UNBOUNDED
from cacheflow.stores.url import file_url

if TYPE_CHECKING:
    from cacheflow.bench.restore.rounds import Round, RoundRun
    from cacheflow.bench.restore.study import Study, Wrong

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
OBJECTIVES = ("restore", "ttft")
CUDA_GBPS = (10.0, 40.0, 80.0, float("inf"))
"""Links studied on a GPU unless others are asked for: those of the paper, and no limit."""
LARGE_BYTES = 2e9
"""Weights of this size make a study on a CPU long."""
PERTURBATIONS = {
    "cost_error=2": {"cost_error": 2.0},
    "cost_error=0.5": {"cost_error": 0.5},
    "bandwidth_error=2": {"bandwidth_error": 2.0},
    "bandwidth_error=0.5": {"bandwidth_error": 0.5},
    "link_drop=0.25": {"link_drop": 0.25},
}
"""Costs or bandwidth stated wrongly by 2x either way; the link falling to a quarter half-way through."""


@dataclass(frozen=True, kw_only=True)
class RestoreFlags(EmbeddedFlags):
    """The options of ``bench restore``."""

    ratios: tuple[float, ...] | None = option(
        None, "load time over recompute time (default: 0.25,0.5,1,2,4)", metavar="R,R,...", above=0
    )
    gbps: tuple[float, ...] | None = option(
        None, "link bandwidths in gigabits per second instead of ratios; inf for no limit "
        "(default with --device cuda: 10,40,80,inf)", metavar="G,G,...", above=0,
    )  # fmt: skip
    tokens: tuple[int, ...] = option((4096,), "prefix", metavar="N,N,...", above=0)
    layers_per_block: int | None = option(
        None, "layers of a block (default: 1; of a hybrid model from one attention layer to the next; with --device "
        "cuda as many as keep the link busy)", metavar="N", at_least=1,
    )  # fmt: skip
    policies: tuple[str, ...] = option(
        tuple(RESTORE_POLICIES), metavar="P,P,...", known=("policy", tuple(RESTORE_POLICIES))
    )
    objectives: tuple[str, ...] = option(
        OBJECTIVES, metavar=",".join(OBJECTIVES), known=("objective", OBJECTIVES), shown=""
    )
    perturb: bool = option(False, "run cacheflow with wrong costs, wrong bandwidth and a falling link instead")
    store: tuple[str, ...] | None = option(
        None, "where the prefix is saved: memory, file for a folder in DIR, the URL of a store, or pinned, host memory "
        "without a store; given several times, the fastest first, tiers (default: memory; with --device cuda pinned)",
        words="repeated", metavar="URL",
    )  # fmt: skip
    cost_repeats: int = option(3, "times each chunk is timed", metavar="N", at_least=1)

    def __post_init__(self) -> None:
        """Check each value, and what contradicts another.

        Raises:
            ConfigError: Names the options.
        """
        for name in self.policies:
            make_policy(name)
        if not self.is_pinned:
            self._check_store()
        super().__post_init__()
        if math.inf in (self.ratios or ()):
            raise ConfigError(f"--ratios {self.ratios} must be finite; a link without a limit is --gbps inf")
        if self.perturb and (self.device != "cpu" or self.gbps or self.store == ("pinned",)):
            raise ConfigError(
                "--perturb needs the throttled store: --device cpu, no --store pinned, and --ratios instead of --gbps"
            )
        if self.gbps and self.ratios is not None:
            raise ConfigError("--ratios and --gbps both say how fast the link is: drop one of them")

    def _check_store(self) -> None:
        codecs = [url.codec for url in check_store_url(self.saves_in) if url.codec is not None]
        if any(codec.lossy for codec in codecs):
            raise ConfigError(
                f"--store: with codec {codecs[0].name} restored KV is not the computed one, and only times of exact "
                "restorations stand on record: take zstd, or cacheflow store bench"
            )
        if codecs and self.perturb:
            raise ConfigError("--perturb counts in bytes of KV: give a --store without a codec")

    @property
    def links_gbps(self) -> tuple[float, ...]:
        """Bandwidths to study; none where ratios say how fast the link is."""
        return self.gbps or (CUDA_GBPS if self.device == "cuda" and self.ratios is None else ())

    @property
    def fastest_bytes_per_s(self) -> float:
        """The fastest link of a bandwidth that is known, for which cells have to be large enough; 0 without any."""
        return max((each * 1e9 / 8 for each in self.links_gbps if math.isfinite(each)), default=0.0)

    @property
    def is_pinned(self) -> bool:
        """Whether the prefix is saved in host memory, without a store."""
        return self.store == ("pinned",) or (not self.store and self.device == "cuda")

    @property
    def saves_in(self) -> tuple[str, ...]:
        """The URLs of the store that the prefix is saved in, by tier; ``file`` is a folder beside the results."""
        return tuple(file_url(self.out / "store") if each == "file" else each for each in self.store or ("memory",))

    @property
    def suite(self) -> str:
        """Name of the study on record."""
        return "perturbed" if self.perturb else "restore"


add_arguments = RestoreFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Run the study, taking up an earlier one in the same folder; prints the table and draws the figures."""
    flags = RestoreFlags.of(args)
    suite = Suite(
        out=flags.out,
        kind=RestoreRecord,
        show=lambda records: console_tables(summarise(records)),
        draw=partial(_draw, flags.out),
        time_limit_s=flags.time_limit_s,
        resumes=True,
    )
    return suite.run(partial(_work, flags))


def _work(flags: RestoreFlags, suite: SuiteRun[RestoreRecord]) -> bool:
    if not flags.is_pinned:  # costs take minutes to measure: a store that is not there is said before
        open_store(flags.saves_in, capacity_bytes=UNBOUNDED, only_look=True).close()
    if flags.shape is not None and flags.device == "cpu":
        num_bytes = find_model(flags.shape).weight_bytes
        if num_bytes > LARGE_BYTES:
            suite.say(
                f"random weights of {flags.shape}: {num_bytes / 1e9:.0f} GB. On a CPU a study of them can take hours; "
                "--time-limit-s ends it early, and the same command goes on"
            )
    return all([_run_length(flags, num_tokens, suite) for num_tokens in flags.tokens])  # noqa: C419 -- every length


def _run_length(flags: RestoreFlags, num_tokens: int, suite: SuiteRun[RestoreRecord]) -> bool:
    """Study one prefix length; False when the time limit ended it."""
    from cacheflow.bench.restore.rounds import is_done, run_round

    if suite.is_over:
        return False
    study, timelines = open_study(flags, num_tokens), dict[str, "RoundRun"]()
    try:
        with new_progress(suite.console) as progress:
            task = progress.add_task(f"measuring costs, {num_tokens} tokens", total=study.num_cost_steps)
            study.prepare(lambda: progress.advance(task))
            done = suite.records
            rounds = [r for r in _rounds(flags, study, done) if not is_done(r, study, done, suite=flags.suite)]
            named = {**environment(accelerator=accelerator_name(flags.device)), **study.device_notes}

            def measure(round_: Round, on_run: OnRun) -> list[RestoreRecord]:
                runs = run_round(study, round_, suite=flags.suite, environment=named, on_run=on_run)
                if round_.with_suffix and not flags.perturb:
                    _keep_timelines(timelines, runs)
                return [each.record for each in runs]

            finished = suite.run_rounds(progress, rounds, measure, lambda round_: f"ratio {round_.ratio:.3g}")
        if timelines:
            lines = [Timeline.of(each.report, bound_s=each.bound.ttft_s) for each in timelines.values()]
            write_timelines(flags.out / f"timelines-{num_tokens}.json", lines)
    finally:
        study.close()
    return finished


def open_study(flags: RestoreFlags, num_tokens: int) -> Study:
    """A study of one prefix length, not prepared yet.

    Raises:
        ConfigError: The model cannot be loaded, the device is missing, or the prompt is too long.
    """
    from cacheflow.bench import setup
    from cacheflow.bench.restore.link import PinnedStudyLink, StoreStudyLink
    from cacheflow.bench.restore.study import Study, StudyOptions
    from cacheflow.plan.cell_sizes import READS_IN_FLIGHT, layers_of_cell
    from cacheflow.restore.options import ExecutorOptions

    model = setup.open_model(flags)
    chunk_tokens = flags.chunk_tokens
    options = StudyOptions(
        num_tokens=num_tokens,
        suffix_tokens=flags.suffix,
        chunk_tokens=chunk_tokens,
        layers_per_block=layers_of_cell(
            model.shape,
            device_type=flags.device,
            chunk_tokens=chunk_tokens,
            bytes_per_s=flags.fastest_bytes_per_s,
            asked=flags.layers_per_block,
        ),
        cost_repeats=flags.cost_repeats,
        executor=ExecutorOptions(least_reads_in_flight=READS_IN_FLIGHT[flags.device]),
    )
    namespace = setup.namespace_of(model, chunk_tokens)
    link = PinnedStudyLink() if flags.is_pinned else StoreStudyLink(namespace, urls=flags.saves_in)
    return Study(model, setup.prompt_tokens(model, num_tokens + flags.suffix), options=options, link=link)


def _rounds(flags: RestoreFlags, study: Study, done: Sequence[RestoreRecord]) -> Iterator[Round]:
    """Every round of a length: repeats outermost, so that a drifting machine hits all ratios alike."""
    from cacheflow.bench.restore.rounds import Round

    for repeat in range(flags.repeats):
        for ratio, bytes_per_s in _bandwidths(flags, study, done):
            for objective in flags.objectives:
                clean = Round(
                    policies=flags.policies,
                    ratio=ratio,
                    bytes_per_s=bytes_per_s,
                    with_suffix=objective == "ttft",
                    repeat=repeat,
                )
                if not flags.perturb:
                    yield clean
                    continue
                policies = tuple(dict.fromkeys(("recompute", *flags.policies)))
                for values in PERTURBATIONS.values():
                    wrong = _wrong(values, study, bytes_per_s)
                    yield replace(clean, policies=policies, wrong=wrong, perturbation=values)


def _bandwidths(flags: RestoreFlags, study: Study, done: Sequence[RestoreRecord]) -> Iterator[tuple[float, float]]:
    """``(ratio, bytes per second)`` of every link to study; a bandwidth keeps the ratio it has on record.

    Measured again it would differ in the second digit, and a study that is taken up would begin anew.
    """
    from cacheflow.bench.restore.rounds import ratio_on_record

    gbps = flags.links_gbps
    if not gbps:
        for ratio in flags.ratios or RATIOS:
            yield ratio, study.bytes_per_s(ratio)
    for each in gbps:
        bytes_per_s = each * 1e9 / 8
        on_record = ratio_on_record(study, done, suite=flags.suite, bytes_per_s=bytes_per_s)
        if on_record is None:
            load_s = study.prefix_bytes / study.link_bytes_per_s(bytes_per_s)
            on_record = float(f"{load_s / study.recompute_s():.2g}")
        yield on_record, bytes_per_s


def _wrong(values: Mapping[str, float], study: Study, bytes_per_s: float) -> Wrong:
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


def _draw(out: Path, records: Sequence[RestoreRecord]) -> list[Path]:
    written = draw_results(records, out) if records else []
    for path in sorted(out.glob("timelines-*.json")):
        written.append(draw_timelines(read_timelines(path), path.with_suffix(".png")))
    return written
