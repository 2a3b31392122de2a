"""Rounds of a restore study: every policy once, side by side, against bounds from costs measured in the same round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cacheflow.bench.make_record import make_record, of_model, recompute_seconds
from cacheflow.bench.records.base import Environment
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.restore.drop_bound import bound_with_drop
from cacheflow.bench.restore.study import CLEAN, Study, StudyRun, Wrong
from cacheflow.bench.suite import rotated
from cacheflow.plan.bound import Bound, bound
from cacheflow.plan.report import RestoreReport
from cacheflow.policies.registry import make_policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One alternation of policies.

    Attributes:
        ratio: Load time over recompute time of the prefix.
        repeat: Number of the alternation; it also rotates the order of the policies.
        bytes_per_s: Bandwidth asked of the link; ``inf`` for as fast as it goes.
        wrong: What the policies are given wrongly.
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
    run took; without one it uses them as they are. A link without a limit counts as fast as loads of the whole
    prefix found it.
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
    context = {
        **of_model(study.model),
        "suite": suite,
        "chunk_tokens": study.options.chunk_tokens,
        "layers_per_block": study.options.layers_per_block,
        "store": study.store,
        "load_compute_ratio": round_.ratio,
        "repeat": round_.repeat,
        "perturbation": dict(round_.perturbation),
        "environment": environment,
    }
    found = []
    for name in round_.policies:
        run, report = runs[name], runs[name].restored.report
        record = make_record(
            report, least, problem.grid, bytes_per_s=round_.bytes_per_s, correct=run.correct, **context
        )
        found.append(RoundRun(record=record, report=report, bound=least))
    return found


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
    wanted = {
        **of_model(study.model), "suite": suite, "num_tokens": study.grid.num_tokens, "store": study.store,
        "chunk_tokens": study.options.chunk_tokens, "layers_per_block": study.options.layers_per_block,
    }  # fmt: skip
    return all(getattr(record, key) == wanted[key] for key in wanted)
