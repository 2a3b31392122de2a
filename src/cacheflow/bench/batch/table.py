"""Batches as tables for the terminal: policies against the bounds, and the simulator against what happened."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheflow.bench.batch.policies import OURS
from cacheflow.bench.batch.summary import CLEARLY, Agreement, BatchSummary, ContenderSummary
from cacheflow.bench.summary import Spread
from cacheflow.bench.table import LOSES, NOTHING, WRONG, seconds

HEADS = ("mean", "×", "p99", "last", "×", "late", "busy C/IO", "×rival", "equal")
LEGEND = (
    "mean, p99: time to first token; last: the last first token; ×: over its bound;\n"
    "late: requests past their deadline, median; busy C/IO: compute and link until\n"
    "all prefixes were restored; ×rival: what the policy minimises (slo: one more\n"
    "than are late) over the best of those that are not ours; equal: KV and logits\n"
    "equal the reference bit for bit"
)


def batch_tables(summaries: Sequence[BatchSummary], agreement: Agreement | None) -> RenderableType:
    """A table for each setting, then the simulator's, with legends."""
    parts: list[RenderableType] = [_table(summary) for summary in summaries]
    if parts:
        parts.append(Text(LEGEND, style="dim"))
    if any(policy.loses for summary in summaries for policy in summary.policies):
        parts.append(Text(f"{LOSES} a rival does better by what the policy minimises", style="dim"))
    if agreement is not None:
        parts.append(agreement_table(agreement))
    return Group(*parts)


def agreement_table(agreement: Agreement) -> Table:
    """The simulator against what happened."""
    table = _new_table(f"simulator against reality, {agreement.num_requests} requests")
    table.add_column("what")
    table.add_column("median error", justify="right")
    table.add_column("greatest error", justify="right")
    table.add_row("TTFT of a request", f"{agreement.median_error:.1%}", f"{agreement.max_error:.1%}")
    table.add_row("mean TTFT of a batch", f"{agreement.mean_ttft_error:.1%}", "")
    table.add_row("makespan of a batch", f"{agreement.makespan_error:.1%}", "")
    ranked = f"{agreement.num_ranked_alike} of {agreement.num_pairs}" if agreement.num_pairs else NOTHING
    table.add_row(f"pairs more than {CLEARLY - 1:.0%} apart ranked alike", ranked, "")
    return table


def _new_table(title: str) -> Table:
    return Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _table(summary: BatchSummary) -> Table:
    setting = summary.setting
    num_runs = max(policy.num_runs for policy in summary.policies)
    due = f"due after {setting.slo_factor:g} × alone, " if setting.slo_factor else ""
    arrivals = f"{setting.arrival_gap_s:g} s apart" if setting.arrival_gap_s else "together"
    table = _new_table(
        f"{setting.model} {setting.dtype} on {setting.device}: {len(setting.lengths)} requests {arrivals}, "
        f"{sum(setting.lengths):,} cached + {setting.suffix_tokens} new tokens each, "
        f"load/compute {setting.load_compute_ratio:g}, "
        f"{due}{num_runs} run{'' if num_runs == 1 else 's'}"
    )
    heads = (*HEADS, "starved") if setting.starvation_s != float("inf") else HEADS
    table.add_column("policy", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for policy in summary.policies:
        style = "bold" if policy.policy in OURS else None
        table.add_row(*_row(policy, starvation=len(heads) > len(HEADS)), style=style)
    table.add_section()
    bounds = [seconds(summary.bound_mean_ttft_s), "1.00", "", seconds(summary.bound_makespan_s), "1.00"]
    table.add_row("lower bound", *bounds, style="dim")
    return table


def _row(policy: ContenderSummary, *, starvation: bool) -> list[str]:
    if policy.num_wrong:
        row = [policy.policy, *[WRONG] * 6, NOTHING, NOTHING, f"[red]no, {policy.num_wrong} of {policy.num_runs}[/red]"]
    else:
        rival = NOTHING if policy.over_rival is None else f"{policy.over_rival.median:.2f}{LOSES * policy.loses}"
        row = [
            policy.policy,
            _time(policy.mean_ttft_s),
            _ratio(policy.mean_over_bound),
            _time(policy.p99_ttft_s),
            _time(policy.makespan_s),
            _ratio(policy.makespan_over_bound),
            NOTHING if policy.num_late is None else f"{policy.num_late.median:g}",
            f"{_percent(policy.compute_busy)}/{_percent(policy.io_busy)}",
            rival,
            "yes",
        ]
    kept = {True: "kept", False: "[red]broken[/red]", None: NOTHING}
    return [*row, kept[policy.starvation_kept]] if starvation else row


def _time(spread: Spread | None) -> str:
    return NOTHING if spread is None else seconds(spread.median)


def _ratio(spread: Spread | None) -> str:
    return NOTHING if spread is None else f"{spread.median:.2f}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"
