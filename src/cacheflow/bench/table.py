"""Summaries as tables: rich for the terminal, Markdown for the README. Losing cells are flagged, wrong ones blank."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheflow.bench.record import Environment
from cacheflow.bench.summary import OURS, Metric, PolicySummary, SettingSummary, Spread

LOSES = "▲"
"""Ours is behind its best rival here, within the promise."""
BREAKS = "‼"
"""Ours is further behind than the promise allows."""
WRONG = "wrong"
NOTHING = "–"
_CHECKED = "the KV cache and the tokens of the reference, bit for bit"
_CHECKED_BY_CLIENT = "the tokens of stock vLLM"
DISTURBED = "~: the machine was busy with something else during these runs; measure again on a quiet one"
LEGEND = (
    "×: over the lower bound; ×rival: over the best other policy; busy C/IO: compute and link while restoring;\n"
    "equal: KV cache, logits and tokens equal the reference bit for bit, in every run"
)


def console_tables(summaries: Sequence[SettingSummary]) -> RenderableType:
    """One table a setting, with a legend when something in them needs one."""
    parts: list[RenderableType] = [_console_table(summary) for summary in summaries]
    if parts:
        parts.append(Text(LEGEND, style="dim"))
    if any(summary.disturbed for summary in summaries):
        parts.append(Text(DISTURBED, style="yellow"))
    if any(flag(policy) for summary in summaries for policy in summary.policies):
        parts.append(Text(f"{LOSES} behind the best rival   {BREAKS} by more than 2 % + 5 ms", style="dim"))
    return Group(*parts)


def markdown_table(summaries: Sequence[SettingSummary]) -> str:
    """One Markdown table: a row a policy, a column a load/compute ratio, a cell ``time (over the bound)``.

    The last row is the bound. Settings must differ in the ratio alone.

    Raises:
        ValueError: No settings, or two with the same ratio.
    """
    ratios = [summary.setting.load_compute_ratio for summary in summaries]
    if not ratios or len(set(ratios)) != len(ratios):
        raise ValueError(f"one setting for each load/compute ratio is needed, got ratios {ratios}")
    metric = summaries[0].metric
    names = list(dict.fromkeys(policy.policy for summary in summaries for policy in summary.policies))
    head = ["load time / compute time", *(f"{ratio:g}" for ratio in ratios)]
    rows = [_markdown_row(name, [(summary, summary.of(name)) for summary in summaries], metric) for name in names]
    bounds = [summary.bound_ttft_s if metric == "ttft" else summary.bound_restore_s for summary in summaries]
    rows.append(["*lower bound*", *(NOTHING if bound is None else f"*{seconds(bound)}*" for bound in bounds)])
    rule = ["---", *["--:"] * len(ratios)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def markdown_caption(summaries: Sequence[SettingSummary], environment: Environment) -> str:
    """What the table above shows and where it was measured, in one paragraph."""
    setting, metric = summaries[0].setting, summaries[0].metric
    runs = [policy.num_runs for summary in summaries for policy in summary.policies]
    what = "Time to first token" if metric == "ttft" else "Restoration time"
    repeats = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    flags = {flag(policy) for summary in summaries for policy in summary.policies} - {""}
    legend = "".join(
        f" {mark}: {text}."
        for mark, text in ((LOSES, "behind its best rival"), (BREAKS, "behind it by more than 2 % + 5 ms"))
        if mark in flags
    )
    device = str(environment.get("accelerator") or environment.get("cpu") or setting.device)
    threads = f" ({environment['num_threads']} threads)" if environment.get("num_threads") else ""
    return (
        f"{what}, median of {repeats} alternating runs, and in brackets its ratio to the lower bound. "
        f"{setting.model}, {setting.dtype}, {setting.num_tokens:,} cached and {setting.suffix_tokens:,} new tokens, "
        f"on {device}{threads}, {_versions(environment)}. Every run shown gave "
        f"{_CHECKED_BY_CLIENT if environment.get('vllm') else _CHECKED}.{legend}"
    )


def _versions(environment: Environment) -> str:
    names = ("torch", "vllm" if environment.get("vllm") else "transformers")
    return ", ".join(f"{name} {environment.get(name)}" for name in names)


def flag(policy: PolicySummary) -> str:
    """The mark of a policy of ours that lost to its best rival; empty for rivals and where ours won."""
    if policy.policy != OURS or policy.over_rival is None:
        return ""
    if policy.breaks_promise:
        return BREAKS
    return LOSES if policy.over_rival.median > 1.0 else ""


def seconds(time_s: float) -> str:
    """A duration with three significant digits, in s or ms."""
    if time_s >= 9.995:
        return f"{time_s:.1f} s"
    if time_s >= 0.9995:
        return f"{time_s:.2f} s"
    return f"{time_s * 1e3:#.3g} ms" if time_s < 0.0995 else f"{time_s * 1e3:.0f} ms"


def size(num_bytes: float) -> str:
    """A size in MB or GB (powers of ten)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _console_table(summary: SettingSummary) -> Table:
    setting = summary.setting
    title = (
        f"{setting.model} {setting.dtype} on {setting.device}: {setting.num_tokens:,} cached + "
        f"{setting.suffix_tokens:,} new tokens, load/compute {setting.load_compute_ratio:g}"
    )
    if setting.perturbation != "{}":
        title += f", {setting.perturbation}"
    title += f", {setting.layers_per_block} layers a block" if setting.layers_per_block > 1 else ""
    title += f", {setting.store} store" if setting.store != "memory" else ""
    num_runs = max((policy.num_runs for policy in summary.policies), default=0)
    title += f", {num_runs} run{'' if num_runs == 1 else 's'}{' ~' if summary.disturbed else ''}"
    columns = _columns(summary, with_spread=num_runs > 2)
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for head in columns[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    for policy in summary.policies:
        row = _console_row(policy, summary.metric)
        table.add_row(*(row[head] for head in columns), style="bold" if policy.policy == OURS else None)
    bounds = {"restore": summary.bound_restore_s, "TTFT": summary.bound_ttft_s}
    shown = {head: seconds(bound_s) for head, bound_s in bounds.items() if bound_s is not None}
    table.add_section()
    row = {"policy": "lower bound", **shown, **{f"{head} ×": "1.00" for head in shown}}
    table.add_row(*(row.get(head, "") for head in columns), style="dim")
    return table


def _columns(summary: SettingSummary, *, with_spread: bool) -> list[str]:
    """Heads of a console table; those that would say nothing are left out, so that most fit 80 characters."""
    times = ["restore", "restore ×", "TTFT", "TTFT ×"] if summary.metric == "ttft" else ["restore", "restore ×"]
    return ["policy", *times, *(["spread"] if with_spread else []), "×rival", "busy C/IO", "loaded", "equal"]


def _console_row(policy: PolicySummary, metric: Metric) -> dict[str, str]:
    """Cells by head."""
    if not policy.exact:
        heads = ("restore", "restore ×", "TTFT", "TTFT ×", "spread", "×rival")
        equal = f"[red]no, {policy.num_wrong} of {policy.num_runs}[/red]"
        blank = {**dict.fromkeys(heads, WRONG), "busy C/IO": NOTHING, "loaded": NOTHING}
        return {"policy": policy.policy, **blank, "equal": equal}
    rival = NOTHING if policy.over_rival is None else f"{policy.over_rival.median:.2f}{flag(policy)}"
    return {
        "policy": policy.policy,
        "restore": _time(policy.restore_s),
        "restore ×": _ratio(policy.restore_over_bound),
        "TTFT": _time(policy.ttft_s),
        "TTFT ×": _ratio(policy.ttft_over_bound),
        "spread": _span(policy.over_bound(metric)),
        "×rival": rival,
        "busy C/IO": f"{_percent(policy.compute_busy)}/{_percent(policy.io_busy)}",
        "loaded": NOTHING if policy.loaded_bytes is None else size(policy.loaded_bytes),
        "equal": "yes",
    }


def _markdown_row(name: str, cells: list[tuple[SettingSummary, PolicySummary | None]], metric: Metric) -> list[str]:
    shown = [_markdown_cell(policy, metric) for _, policy in cells]
    ours = name == OURS
    return [f"**{name}**" if ours else name, *(f"**{cell}**" if ours and cell != NOTHING else cell for cell in shown)]


def _markdown_cell(policy: PolicySummary | None, metric: Metric) -> str:
    if policy is None:
        return NOTHING
    if not policy.exact:
        return f"{WRONG} ({policy.num_wrong} of {policy.num_runs})"
    time_s, ratio = policy.time_s(metric), policy.over_bound(metric)
    if time_s is None:
        return NOTHING
    bracket = f" ({ratio.median:.2f}×)" if ratio else ""
    mark = flag(policy)
    return f"{seconds(time_s.median)}{bracket}{' ' + mark if mark else ''}"


def _time(spread: Spread | None) -> str:
    return seconds(spread.median) if spread else NOTHING


def _ratio(spread: Spread | None) -> str:
    return NOTHING if spread is None else f"{spread.median:.2f}"


def _span(spread: Spread | None) -> str:
    return NOTHING if spread is None else f"{spread.low:.2f}–{spread.high:.2f}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"
