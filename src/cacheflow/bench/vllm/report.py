"""What ``bench vllm`` shows: a table a setting, and the time to first token over the ratio as a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheflow.bench.chart import draw_bound, draw_line, in_order, label_ratios, new_figure, save_figure
from cacheflow.bench.records.vllm import ITL_SLO_MS, NEIGHBOUR, LoadRecord, VllmRecord
from cacheflow.bench.summary import OURS, RestoreSummary, RunSetting, SettingSummary, flag, summarise
from cacheflow.bench.table import (
    DISTURBED,
    NOTHING,
    WRONG,
    Row,
    median_of,
    median_ratio,
    not_equal,
    seconds,
    size,
    text_table,
)

ABOVE_SLO = " >SLO"
ITL_HEADS = {"ITL mean": "itl_mean_s", "ITL p99": "itl_p99_s", "ITL max": "itl_max_s"}
LEGEND = (
    "TTFT ×: over the lower bound; ×rival: over the best other policy of the same repeat; restored: prefix tokens\n"
    "that vLLM did not prefill itself; equal: greedy tokens equal stock vLLM's answer in every run (a tie: see below)"
)


def vllm_tables(records: Sequence[VllmRecord]) -> RenderableType:
    """One table a setting, best read with one setting per load/compute ratio; a wrong policy shows no time."""
    summaries = summarise(records)
    parts: list[RenderableType] = [
        _table(summary, [record for record in records if RunSetting.of(record) == summary.setting])
        for summary in summaries
    ]
    if parts:
        parts.append(Text(LEGEND, style="dim"))
    if any(summary.disturbed for summary in summaries):
        parts.append(Text(DISTURBED, style="yellow"))
    notes = sorted({f"{record.policy}: {record.note}" for record in records if record.note})
    guards = dict.fromkeys(_guard(record) for record in records if record.guard is not None)
    return Group(*parts, *(Text(note, style="dim") for note in (*notes, *guards)))


def _guard(record: VllmRecord) -> str:
    assert record.guard is not None, "asked for those that have one"
    chosen = f"the guard chose {record.guard.choice} ({record.guard.reason})"
    return f"{record.policy} at {_link(record.link_bytes_per_s)}: {chosen}"


def _link(bytes_per_s: float | None) -> str:
    return "no link" if bytes_per_s is None else f"{bytes_per_s / 1e6:.1f} MB/s"


def _table(summary: SettingSummary, runs: Sequence[VllmRecord]) -> Table:
    setting = summary.setting
    beside = NEIGHBOUR.keys() <= runs[0].perturbation.keys()
    slo_s = runs[0].itl_slo_s
    link = next((record.link_bytes_per_s for record in runs if record.link_bytes_per_s), None)
    title = (
        f"{setting.model} in vLLM on {setting.device}: {setting.lengths}, load/compute {setting.load_compute_ratio:g}"
        f"{'' if link is None else f' ({_link(link)})'}"
        f"{', beside a decoding request' if beside else ''}"
        f"{'' if slo_s is None else f', itl_slo_ms {slo_s * 1e3:g}'}{' ~' if summary.disturbed else ''}"
    )
    spread = ["spread"] if any(policy.num_runs > 1 for policy in summary.policies) else []
    heads = ["policy", "TTFT", *spread, "TTFT ×", "×rival", "restored", *(ITL_HEADS if beside else ["loaded"]), "equal"]
    rows: list[Row] = []
    for policy in summary.policies:
        cells = _cells(policy, [record for record in runs if record.policy == policy.policy])
        style = "bold" if policy.policy == OURS else None
        rows.append(([cells.get(head, NOTHING) for head in heads], style))
    bound_s = summary.bound_ttft_s
    bound = {} if bound_s is None else {"policy": "lower bound", "TTFT": seconds(bound_s), "TTFT ×": "1.00"}
    return text_table(title, heads, rows, last=[bound.get(head, "") for head in heads] if bound else ())


def _cells(policy: RestoreSummary, runs: Sequence[VllmRecord]) -> dict[str, str]:
    """Cells by head."""
    ttft, loaded = policy["ttft_s"], policy["loaded_bytes"]
    if not policy.exact or ttft is None:
        wrong = dict.fromkeys(("TTFT", "spread", "TTFT ×", "×rival"), WRONG)
        return {"policy": policy.policy, **wrong, "equal": not_equal(policy.num_wrong, policy.num_runs)}
    cells = {
        "policy": policy.policy,
        "TTFT": seconds(ttft.median),
        "spread": f"{seconds(ttft.low)}–{seconds(ttft.high)}",
        "TTFT ×": median_ratio(policy["ttft_over_bound"]),
        "×rival": median_ratio(policy.over_rival) + flag(policy),
        "restored": median_of((record.cached_tokens for record in runs), "{:,.0f}".format),
        "loaded": size(loaded.median if loaded else 0),
        "equal": "yes" if all(record.equal_tokens == record.compared_tokens for record in runs) else "tie",
        **{head: median_of((getattr(record, key) for record in runs), seconds) for head, key in ITL_HEADS.items()},
    }
    slo_s, p99_s = runs[0].itl_slo_s, [record.itl_p99_s for record in runs if record.itl_p99_s is not None]
    if slo_s is not None and p99_s and median(p99_s) > slo_s:
        cells["ITL p99"] += ABOVE_SLO
    return cells


def load_table(records: Sequence[LoadRecord]) -> Table:
    """What vLLM's own client measured under load."""
    first = records[0]
    title = (
        f"{first.model} in vLLM: {first.num_requests} requests of multi-turn sessions, {first.rate:g} per second, "
        f"link {first.link_bytes_per_s / 1e6:.1f} MB/s; answers not compared; restored: share of prompt tokens"
    )
    heads = ("policy", "TTFT mean", "p50", "p99", "ITL mean", "p99", "req/s", "tok/s", "restored", "failed")
    rows: list[Row] = []
    for record in records:
        times_s = (
            record.ttft_mean_s, record.ttft_p50_s, record.ttft_p99_s, record.itl_mean_s, record.itl_p99_s,
        )  # fmt: skip
        rates = (f"{record.requests_per_s:.2f}", f"{record.tokens_per_s:.0f}")
        shares = (f"{record.restored_tokens / record.prompt_tokens:.0%}", str(record.num_failed))
        rows.append(((record.policy, *map(seconds, times_s), *rates, *shares), None))
    return text_table(title, heads, rows)


def draw_vllm(records: Sequence[VllmRecord], out_dir: Path) -> list[Path]:
    """Draw one figure per model, length and neighbour; returns the files written.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    sweeps: dict[str, list[SettingSummary]] = {}
    for summary in summarise(records):
        setting = summary.setting
        slo_ms = json.loads(setting.perturbation).get(ITL_SLO_MS)
        beside = "" if setting.perturbation == "{}" else "-neighbour" + (f"-slo{slo_ms:g}" if slo_ms else "")
        name = f"vllm-{setting.model}-{setting.num_tokens}-{setting.suffix_tokens}{beside}".replace("/", "-")
        sweeps.setdefault(name, []).append(summary)
    return [_draw(sweep, out_dir / f"{name}.png") for name, sweep in sweeps.items()]


def _draw(sweep: Sequence[SettingSummary], path: Path) -> Path:
    figure, (axes,) = new_figure(num_panels=1, num_columns=1, panel_size=(6.4, 4.4))
    for name in in_order(policy.policy for summary in sweep for policy in summary.policies):
        # One that is wrong everywhere has no points: no time of it may be shown.
        draw_line(axes, name, [
            (summary.setting.load_compute_ratio, spread)
            for summary in sweep
            if (policy := summary.of(name)) is not None and (spread := policy["ttft_s"]) is not None
        ])  # fmt: skip
    ratios = [summary.setting.load_compute_ratio for summary in sweep]
    draw_bound(axes, [(summary.setting.load_compute_ratio, summary.bound_ttft_s) for summary in sweep])
    axes.set_yscale("log")
    label_ratios(axes, ratios, x_label="time to load everything / time vLLM needs to prefill it",
                 y_label="time to first token [s]")  # fmt: skip
    low, high = axes.get_ylim()
    marks = [mark for mark in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= mark <= high]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    setting = sweep[0].setting
    beside = "" if setting.perturbation == "{}" else ", beside a decoding request"
    axes.set_title(f"{setting.model} in vLLM on {setting.device}: {setting.lengths}{beside}", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
