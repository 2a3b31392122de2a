"""Records of ``bench codecs`` as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from cacheflow.bench.codecs.setting import CodecSetting
from cacheflow.bench.records.codecs import CodecRecord
from cacheflow.bench.table import WRONG, markdown_table, median_of, text_table

HEADS = ("codec", "stored", "GB/s", "off by", "at most", "same", "KL")
EXPLAINED = (
    "GB/s: encoding, decoding, in bytes of keys and values over the CPU time of one thread. Off by: keys, values, norm "
    "(Frobenius) of the error over that of the numbers. At most: error of one number over the largest number. Same: "
    "share of the next tokens, each fed with the text as it goes on, that are the ones after exact keys and values. "
    "KL: Kullback-Leibler divergence of their distributions, in nats."
)


def by_setting(records: Sequence[CodecRecord]) -> dict[CodecSetting, dict[str, dict[int, CodecRecord]]]:
    """Records by setting, codec and excerpt; an excerpt that was measured again counts once, with its last record."""
    found: dict[CodecSetting, dict[str, dict[int, CodecRecord]]] = {}
    for each in records:
        found.setdefault(CodecSetting.of(each), {}).setdefault(each.codec, {})[each.excerpt] = each
    return found


def codec_tables(records: Sequence[CodecRecord]) -> RenderableType:
    """One table a setting."""
    settings = by_setting(records)
    parts: list[RenderableType] = [
        text_table(str(setting), HEADS, [(_cells(name, list(own.values())), None) for name, own in codecs.items()])
        for setting, codecs in settings.items()
    ]
    return Group(*parts, Text(EXPLAINED, style="dim")) if parts else Group()


def codecs_markdown(records: Sequence[CodecRecord]) -> str:
    """A table and its caption for a page.

    Raises:
        ValueError: There is no record, or they are of several settings.
    """
    settings = by_setting(records)
    if len(settings) != 1:
        raise ValueError(f"records of codecs are of {len(settings)} settings, a table has one")
    ((setting, codecs),) = settings.items()
    rows = [_cells(f"`{name}`", list(own.values())) for name, own in codecs.items()]
    num_excerpts = max(map(len, codecs.values()))
    where = records[-1].environment
    return (
        f"{markdown_table(HEADS, rows)}\n\n"
        f"{setting}; {num_excerpts} excerpts of source text: the mean of the last two columns, else the median. "
        f"{EXPLAINED} On {where.get('cpu')}, torch {where.get('torch')}, numpy {where.get('numpy')}."
    )


def _cells(name: str, own: Sequence[CodecRecord]) -> list[str]:
    """Cells under ``HEADS``."""
    if not all(each.is_good for each in own):
        return [name, *[WRONG] * (len(HEADS) - 1)]
    return [
        name,
        median_of([each.stored_bytes / each.raw_bytes for each in own], "{:.0%}".format),
        f"{_speed([each.encode_bytes_per_s for each in own])}, {_speed([each.decode_bytes_per_s for each in own])}",
        f"{_error([each.keys_error for each in own])}, {_error([each.values_error for each in own])}",
        f"{_error([each.keys_largest_error for each in own])}, {_error([each.values_largest_error for each in own])}",
        f"{sum(each.same_tokens for each in own) / len(own):.1%}",
        f"{sum(each.divergence for each in own) / len(own):.2g}",
    ]


def _speed(bytes_per_s: Sequence[float | None]) -> str:
    return median_of(bytes_per_s, lambda value: f"{value / 1e9:.2f}")


def _error(values: Sequence[float | None]) -> str:
    return median_of(values, "{:.2g}".format)
