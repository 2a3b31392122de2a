"""Rounds of a restore study: every policy once, side by side, against bounds from costs measured in the same round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cacheflow.bench.make_record import RunContext, make_record, recompute_seconds
from cacheflow.bench.record import Environment, RestoreRecord
from cacheflow.bench.restore.drop_bound import bound_with_drop
from cacheflow.bench.restore.study import CLEAN, Study, StudyRun, Wrong
from cacheflow.bench.suite import rotated
from cacheflow.plan.bound import Bound, bound
from cacheflow.policies.registry import make_policy
from cacheflow.state.report import RestoreReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One alternation of policies.

    Attributes:
        ratio: Load time over recompute time of the prefix.
        with_suffix: Plan and time for the first token; else for the prefix alone.
        repeat: Number of the alternation; it also rotates the order of the policies.
        policies: Names, in the order of the first repeat.
        bytes_per_s: Bandwidth asked of the link; ``inf`` for as fast as it goes.
        wrong: What the policies are given wrongly.
        perturbation: The same for the record.
        crossover_tokens: For ``cacheflow_v1``; None lets it work the length out.
    """

    ratio: float
    with_suffix: bool
    repeat: int
    policies: tuple[str, ...]
    bytes_per_s: float
    wrong: Wrong = CLEAN
    perturbation: Mapping[str, float] = field(default_factory=dict)
    crossover_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRun:
    """One policy's run in a round: its record, its report and the bounds it is measured against."""

    record: RestoreRecord
    report: RestoreReport
    bound: Bound


def run_round(
    study: Study, round_: Round, *, suite: str, environment: Environment, on_run: Callable[[str], None]
) -> list[RoundRun]:
    """Run every policy of a round once and put the runs on record.

    The bound uses the costs measured when the study was prepared, corrected by how long the round's own ``recompute``
    run took; without one it uses them as they are. A link without a limit counts as fast as one load of the whole
    prefix found it.

    Args:
        study: A prepared study.
        round_: What to run.
        suite: Name of the study for the records.
        environment: For the records.
        on_run: Called with a policy's name before its run.
    """
    runs: dict[str, StudyRun] = {}
    for name in rotated(round_.policies, round_.repeat):
        on_run(name)
        runs[name] = study.run(
            make_policy(name, crossover_tokens=round_.crossover_tokens),
            with_suffix=round_.with_suffix,
            bytes_per_s=round_.bytes_per_s,
            wrong=round_.wrong,
        )
    recompute = runs.get("recompute")
    drift = 1.0 if recompute is None else recompute_seconds(recompute.restored.report) / study.recompute_s()
    delivered_bytes_per_s = study.link_bytes_per_s(round_.bytes_per_s)
    problem = study.problem(with_suffix=round_.with_suffix, bytes_per_s=delivered_bytes_per_s, drift=drift)
    drop = round_.wrong.drop
    least = bound(problem) if drop is None else bound_with_drop(problem, drop)
    context = RunContext(
        suite=suite,
        model=study.model,
        chunk_tokens=study.options.chunk_tokens,
        num_tokens=study.grid.num_tokens,
        suffix_tokens=study.grid.suffix_tokens if round_.with_suffix else 0,
        ratio=round_.ratio,
        bytes_per_s=round_.bytes_per_s,
        repeat=round_.repeat,
        environment=environment,
        perturbation=round_.perturbation,
        layers_per_block=study.options.layers_per_block,
        store=study.store,
    )
    return [
        RoundRun(
            record=make_record(context, runs[name].restored.report, least, correct=runs[name].correct),
            report=runs[name].restored.report,
            bound=least,
        )
        for name in round_.policies
    ]


def is_done(round_: Round, study: Study, records: Sequence[RestoreRecord], *, suite: str) -> bool:
    """Whether a results file already holds every run of a round, so that a study can be taken up again."""
    suffix_tokens = study.grid.suffix_tokens if round_.with_suffix else 0
    done = {
        record.policy
        for record in records
        if _is_of(record, study, suite)
        and (record.suffix_tokens, record.repeat) == (suffix_tokens, round_.repeat)
        and abs(record.load_compute_ratio - round_.ratio) < 1e-9 * max(1.0, round_.ratio)
        and dict(record.perturbation) == dict(round_.perturbation)
    }
    return done >= set(round_.policies)


def ratio_on_record(study: Study, records: Sequence[RestoreRecord], *, suite: str, bytes_per_s: float) -> float | None:
    """The ratio under which a results file has this study's runs over a link of ``bytes_per_s``; None without any."""
    link = bytes_per_s if math.isfinite(bytes_per_s) else None
    ratios = (r.load_compute_ratio for r in records if _is_of(r, study, suite) and r.link_bytes_per_s == link)
    return next(ratios, None)


def _is_of(record: RestoreRecord, study: Study, suite: str) -> bool:
    """Whether a record is of these weights, on this kind of device, with this prefix, these blocks and this store."""
    model, options = study.model, study.options
    wanted = {
        "suite": suite, "model": model.name, "fingerprint": model.fingerprint, "device": model.device.type,
        "dtype": model.shape.dtype, "num_tokens": study.grid.num_tokens, "chunk_tokens": options.chunk_tokens,
        "layers_per_block": options.layers_per_block, "store": study.store,
    }  # fmt: skip
    return all(getattr(record, key) == wanted[key] for key in wanted)
