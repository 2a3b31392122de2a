"""Tables: how they look on a terminal and in Markdown, and how times, sizes and shares are written in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from cacheflow.bench.spread import PolicySummary, R, Spread

LOSES = "▲"
"""Ours is behind its best rival here, within the promise."""
BREAKS = "‼"
"""Ours is further behind than the promise allows."""
WRONG = "wrong"
NOTHING = "–"
DISTURBED = "~: the machine was busy with something else during these runs; measure again on a quiet one"

_WIDTH = 160
"""Characters that the widest table takes at most."""

Row = tuple[Sequence[str], str | None]
"""Cells from left to right, and a style of rich."""


def text_table(
    title: str,
    heads: Sequence[str],
    rows: Iterable[Row],
    *,
    last: Sequence[str] = (),
    caption: str = "",
    padding: int = 0,
) -> Table:
    """A table for the terminal: the first column to the left, the others to the right."""
    table = Table(
        title=title, title_style="bold", title_justify="left", caption=caption or None, caption_style="dim",
        caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, padding), pad_edge=False,
    )  # fmt: skip
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    for cells, style in rows:
        table.add_row(*cells, style=style)
    if last:
        table.add_section()
        table.add_row(*last, style="dim")
    return table


def print_whole(tables: RenderableType) -> None:
    """Print tables for the terminal; one that is narrower than they are wraps lines rather than lose cells."""
    Console(width=max(Console().width, _WIDTH)).print(tables)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a page: the first column to the left, the others to the right."""
    rule = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


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


def busy(policy: PolicySummary[R]) -> str:
    """Median shares of the time in which compute and the link worked."""
    shares = (policy["compute_busy"], policy["io_busy"])
    return "/".join(NOTHING if share is None else f"{share.median:.0%}" for share in shares)


def over(time_s: float, bound_s: float) -> str:
    """A time over its bound."""
    return f"{time_s / bound_s:.2f}" if bound_s > 0 else NOTHING


def median_time(spread: Spread | None) -> str:
    """The median of durations."""
    return NOTHING if spread is None else seconds(spread.median)


def median_ratio(spread: Spread | None) -> str:
    """The median of ratios."""
    return NOTHING if spread is None else f"{spread.median:.2f}"


def median_of(values: Iterable[float | None], shown: Callable[[float], str]) -> str:
    """The median of the values that are known, written by ``shown``."""
    known = [value for value in values if value is not None]
    return shown(median(known)) if known else NOTHING


def not_equal(num_wrong: int, num_runs: int) -> str:
    """Says that runs were wrong."""
    return f"[red]no, {num_wrong} of {num_runs}[/red]"


def runs(num_runs: int) -> str:
    """A number of runs."""
    return f"{num_runs} run{'' if num_runs == 1 else 's'}"
