"""Records of ``bench vllm`` as tables for the terminal; a wrong policy shows no time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheflow.bench.summary import OURS, PolicySummary, Setting, SettingSummary, summarise
from cacheflow.bench.table import DISTURBED, NOTHING, WRONG, flag, seconds, size
from cacheflow.bench.vllm.record import NEIGHBOUR, VllmRecord

ABOVE_SLO = " >SLO"
LEGEND = (
    "TTFT ×: over the lower bound; ×rival: over the best other policy of the same repeat; restored: prefix tokens\n"
    "that vLLM did not prefill itself; equal: greedy tokens equal stock vLLM's answer in every run (a tie: see below)"
)


def vllm_tables(records: Sequence[VllmRecord]) -> RenderableType:
    """One table a setting, best read with one setting per load/compute ratio."""
    parts: list[RenderableType] = []
    summaries = summarise(records)
    for summary in summaries:
        runs = [record for record in records if Setting.of(record) == summary.setting]
        parts.append(_table(summary, runs))
    if parts:
        parts.append(Text(LEGEND, style="dim"))
    if any(summary.disturbed for summary in summaries):
        parts.append(Text(DISTURBED, style="yellow"))
    notes = sorted({f"{record.policy}: {record.note}" for record in records if record.note})
    parts.extend(Text(note, style="dim") for note in notes)
    return Group(*parts)


def _table(summary: SettingSummary, runs: Sequence[VllmRecord]) -> Table:
    setting = summary.setting
    beside = bool(runs) and NEIGHBOUR.keys() <= runs[0].perturbation.keys()
    slo_s = runs[0].itl_slo_s if runs else None
    link = next((record.link_bytes_per_s for record in runs if record.link_bytes_per_s), None)
    title = (
        f"{setting.model} in vLLM on {setting.device}: {setting.num_tokens:,} cached + {setting.suffix_tokens:,} new "
        f"tokens, load/compute {setting.load_compute_ratio:g}"
        f"{'' if link is None else f' ({link / 1e6:.1f} MB/s)'}"
        f"{', beside a decoding request' if beside else ''}"
        f"{'' if slo_s is None else f', itl_slo_ms {slo_s * 1e3:g}'}{' ~' if summary.disturbed else ''}"
    )
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    spread = ["spread"] if any(policy.num_runs > 1 for policy in summary.policies) else []
    heads = ["TTFT", *spread, "TTFT ×", "×rival", "restored", *(_ITL_HEADS if beside else ["loaded"]), "equal"]
    table.add_column("policy", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for policy in summary.policies:
        cells = _row(policy, [record for record in runs if record.policy == policy.policy])
        table.add_row(policy.policy, *(cells.get(head, NOTHING) for head in heads), style=_style(policy))
    if summary.bound_ttft_s is not None:
        table.add_section()
        bound = {"TTFT": seconds(summary.bound_ttft_s), "TTFT ×": "1.00"}
        table.add_row("lower bound", *(bound.get(head, "") for head in heads), style="dim")
    return table


_ITL_HEADS = ("ITL mean", "ITL p99", "ITL max")


def _row(policy: PolicySummary, runs: Sequence[VllmRecord]) -> dict[str, str]:
    """Cells by head."""
    if not policy.exact or policy.ttft_s is None:
        heads = ("TTFT", "spread", "TTFT ×", "×rival")
        return {**dict.fromkeys(heads, WRONG), "equal": f"[red]no, {policy.num_wrong} of {policy.num_runs}[/red]"}
    ttft, over = policy.ttft_s, policy.ttft_over_bound
    cells = {
        "TTFT": seconds(ttft.median),
        "spread": f"{seconds(ttft.low)}–{seconds(ttft.high)}",
        "restored": f"{median(record.cached_tokens for record in runs):,.0f}",
        "loaded": size(policy.loaded_bytes or 0),
        "equal": "yes" if all(record.equal_tokens == record.compared_tokens for record in runs) else "tie",
    }
    if over is not None:
        cells["TTFT ×"] = f"{over.median:.2f}"
    if policy.over_rival is not None:
        cells["×rival"] = f"{policy.over_rival.median:.2f}{flag(policy)}"
    for head, key in zip(_ITL_HEADS, ("itl_mean_s", "itl_p99_s", "itl_max_s"), strict=True):
        values = [value for record in runs if (value := getattr(record, key)) is not None]
        if values:
            cells[head] = seconds(median(values))
    slo_s, p99_s = runs[0].itl_slo_s, [record.itl_p99_s for record in runs if record.itl_p99_s is not None]
    if slo_s is not None and p99_s and median(p99_s) > slo_s:
        cells["ITL p99"] += ABOVE_SLO
    return cells


def _style(policy: PolicySummary) -> str | None:
    return "bold" if policy.policy == OURS else None
