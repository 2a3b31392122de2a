"""Records of ``bench stores`` as tables: how fast each way read, and what that says of the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheflow.bench.records.stores import StoreReadRecord
from cacheflow.bench.spread import Spread, ratio
from cacheflow.bench.stores.study import CHECKSUM, OURS, OWN, UNVERIFIED
from cacheflow.bench.table import NOTHING, WRONG, Row, markdown_table, not_equal, runs, text_table

LINK_GBPS = 10.0
"""The link at which the checksum's share is told."""
LEGEND = (
    "GB/s: payload, median of turns that alternated; of best: over the best other way, in the same repeats;\n"
    "equal: every object that was read is what had been written"
)

WayName = tuple[str, float | None, int]
"""Its name, the link before it, and its reads in flight."""
Runs = Mapping[int, StoreReadRecord]
"""The turns of one way, by repeat."""


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """A store with objects of one size."""

    store: str
    object_bytes: int
    ways: Mapping[WayName, Runs]

    @property
    def num_repeats(self) -> int:
        """Alternations."""
        return max(map(len, self.ways.values()))

    @property
    def is_right(self) -> bool:
        """Whether everybody read what had been written."""
        return all(each.correct for own in self.ways.values() for each in own.values())

    def of(self, name: str, *, linked: bool = False) -> Runs:
        """The turns of a way of ours, over the link or not; empty where it had none."""
        found = (own for (way, link, _), own in self.ways.items() if way == name and (link is not None) == linked)
        return next(found, {})

    @property
    def rival(self) -> WayName | None:
        """Who else read fastest, by the median; None where nobody else did."""
        rates = {way: rate(own) for way, own in self.ways.items() if way[0] not in OWN and rate(own) is not None}
        return max(rates, key=lambda way: _median(rates[way])) if rates else None

    def over(self, own: Runs, other: Runs) -> Spread | None:
        """How many times as fast one way was as another, within repeats."""
        both = own.keys() & other.keys()
        return Spread.of(ratio(own[repeat].bytes_per_s, other[repeat].bytes_per_s) for repeat in sorted(both))

    @property
    def over_rival(self) -> Spread | None:
        """How many times as fast the store was as the best other way."""
        rival = self.rival
        return None if rival is None else self.over(self.of(OURS), self.ways[rival])

    @property
    def verification(self) -> Spread | None:
        """Share by which verification makes reads longer, without a link."""
        return _longer(self.over(self.of(UNVERIFIED), self.of(OURS)))

    @property
    def verification_linked(self) -> Spread | None:
        """The same over the link."""
        return _longer(self.over(self.of(UNVERIFIED, linked=True), self.of(OURS, linked=True)))

    @property
    def checksum_share(self) -> Spread | None:
        """Time of the checksum over the time of the same bytes on a link of ``LINK_GBPS``."""
        return Spread.of(LINK_GBPS * 1e9 / 8 / each.bytes_per_s for each in self.of(CHECKSUM).values())


def _median(spread: Spread | None) -> float:
    return 0.0 if spread is None else spread.median


def _longer(faster: Spread | None) -> Spread | None:
    return None if faster is None else Spread(faster.median - 1, faster.low - 1, faster.high - 1)


def rate(own: Runs) -> Spread | None:
    """Bytes a second of a way's turns; None where one of them was wrong, or there are none."""
    return Spread.of(each.bytes_per_s for each in own.values()) if all(e.correct for e in own.values()) else None


def summarise_stores(records: Sequence[StoreReadRecord]) -> list[StoreSummary]:
    """A summary of each store and size, in the order in which they first ran; a turn that ran again counts once."""
    found: dict[tuple[str, int], dict[WayName, dict[int, StoreReadRecord]]] = {}
    for each in records:
        way = each.way, each.link_bytes_per_s, each.reads_in_flight
        found.setdefault((each.store, each.object_bytes), {}).setdefault(way, {})[each.repeat] = each
    return [StoreSummary(*setting, ways) for setting, ways in found.items()]


def stores_tables(records: Sequence[StoreReadRecord]) -> RenderableType:
    """One table a store and size, and what they say."""
    summaries = summarise_stores(records)
    parts: list[RenderableType] = [_table(summary) for summary in summaries]
    if summaries:
        parts += [Text(LEGEND, style="dim"), *(Text(_in_words(each)) for each in summaries)]
    return Group(*parts)


def _table(summary: StoreSummary) -> Table:
    rows: list[Row] = []
    for (name, link, num_reads), own in summary.ways.items():
        num_wrong, speed = sum(not each.correct for each in own.values()), rate(own)
        cells = (WRONG, NOTHING) if speed is None else (_gb(speed.median), f"{_gb(speed.low)}–{_gb(speed.high)}")
        compared = speed is not None and link is None and name not in OWN[1:]
        over = _over_best(summary, own) if compared else None
        shown = name if link is None else f"{name} at {link * 8 / 1e9:g} Gbit/s"
        equal = not_equal(num_wrong, len(own)) if num_wrong else "yes"
        row = (shown, str(num_reads), *cells, NOTHING if over is None else f"{over.median:.2f}", equal)
        rows.append((row, "bold" if name == OURS and link is None else None))
    title = f"{summary.store} store, objects of {_mib(summary.object_bytes)}: {runs(summary.num_repeats)}"
    return text_table(title, ("way", "reads", "GB/s", "from–to", "of best", "equal"), rows, padding=1)


def _in_words(summary: StoreSummary) -> str:
    store, size, speed, rival, of_it, *verification = _said(summary)
    added, linked, share = verification
    return (
        f"{store}, {size}: {speed}; {of_it} of the best other way ({rival}); verification adds {added}, over the link "
        f"{linked}; the checksum takes {share} of the time of {LINK_GBPS:g} Gbit/s"
    )


def _over_best(summary: StoreSummary, own: Runs) -> Spread | None:
    return None if summary.rival is None else summary.over(own, summary.ways[summary.rival])


def _gb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):g} MiB"


HEADS = (
    "store", "objects of", "read", "best other way", "of it", "verification adds", "... over the link",
    f"checksum at {LINK_GBPS:g} Gbit/s",
)  # fmt: skip


def _said(summary: StoreSummary) -> list[str]:
    """Cells under ``HEADS``."""
    heads = [summary.store, _mib(summary.object_bytes)]
    speed = rate(summary.of(OURS))
    if not summary.is_right or speed is None:
        return [*heads, *[WRONG] * (len(HEADS) - len(heads))]
    rival = summary.rival
    shown = NOTHING if rival is None else f"{rival[0]} × {rival[2]}, {_speed(rate(summary.ways[rival]))}"
    return [
        *heads,
        _speed(speed),
        shown,
        _spread(summary.over_rival, "{:.2f}".format),
        _spread(summary.verification, "{:+.0%}".format),
        _spread(summary.verification_linked, "{:+.1%}".format),
        _spread(summary.checksum_share, "{:.1%}".format),
    ]


def _speed(speed: Spread | None) -> str:
    return NOTHING if speed is None else f"{_gb(speed.median)} GB/s"


def _spread(spread: Spread | None, shown: Callable[[float], str]) -> str:
    return NOTHING if spread is None else f"{shown(spread.median)} ({shown(spread.low)} to {shown(spread.high)})"


def stores_markdown(records: Sequence[StoreReadRecord]) -> str:
    """A table and its caption for a page.

    Raises:
        ValueError: There is no record.
    """
    if not records:
        raise ValueError("there is no record of a store")
    summaries = summarise_stores(records)
    table = markdown_table(HEADS, [*map(_said, summaries)])
    last, links = records[-1], {each.link_bytes_per_s for each in records if each.link_bytes_per_s is not None}
    link = " or ".join(f"{each * 8 / 1e9:g} Gbit/s" for each in sorted(links))
    versions = ", ".join(f"{name} {last.environment[name]}" for name in PACKAGES if last.environment.get(name))
    return (
        f"{table}\n\n"
        "Payload bytes a second into memory that is used again, median of "
        f"{max(each.num_repeats for each in summaries)} alternating turns, in brackets the lowest and the highest. "
        "The other way reads the same records, looks at no byte of them, has no deadline, and nobody can cancel it. "
        "× N: by so many threads or connections. "
        "What verification adds is the time of the same reads with it over that without, less 1; "
        f"over the link of {link}, it runs while the next bytes arrive. The checksum is that of one thread which does "
        f"nothing else, over the time that {LINK_GBPS:g} Gbit/s take for the bytes. Every object that was read is what "
        f"had been written. On {last.environment.get('cpu')}, {last.environment.get('num_cores')} cores, {versions}."
    )


PACKAGES = ("numpy", "xxhash", "redis", "hiredis")
