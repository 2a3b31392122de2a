from pathlib import Path

import pytest

from cacheflow.bench.timeline import Timeline, draw_timelines, read_timelines, write_timelines
from cacheflow.errors import ConfigError
from cacheflow.plan.report import Lane, Span, SpanKind


def span(kind: SpanKind, start_s: float, end_s: float, *, chunk: int = 0, blocks: tuple[int, int] = (0, 1)) -> Span:
    lane = Lane.IO if kind in {SpanKind.LOAD, SpanKind.FAILED, SpanKind.WASTED} else Lane.COMPUTE
    return Span(lane=lane, kind=kind, start_s=start_s, end_s=end_s, chunk=chunk, block_lo=blocks[0], block_hi=blocks[1])


def timeline(*spans: Span) -> Timeline:
    return Timeline(label="cacheflow", spans=spans, num_chunks=2, num_blocks=3, restore_s=2.0, ttft_s=2.5, bound_s=2.2)


def test_the_last_span_that_restored_a_cell_counts():
    outcomes = timeline(
        span(SpanKind.REPAIR, 1.0, 1.5, chunk=1, blocks=(0, 2)),
        span(SpanKind.LOAD, 0.0, 0.5, chunk=1, blocks=(0, 1)),
        span(SpanKind.FAILED, 0.5, 0.9, chunk=1, blocks=(1, 2)),
        span(SpanKind.RECOMPUTE, 0.0, 1.0, chunk=0, blocks=(0, 3)),
        span(SpanKind.SUFFIX, 2.0, 2.5, chunk=-1, blocks=(0, 3)),
    ).outcomes()
    assert outcomes[1, 0] is SpanKind.REPAIR
    assert outcomes[1, 1] is SpanKind.REPAIR
    assert (1, 2) not in outcomes
    assert {outcomes[0, block] for block in range(3)} == {SpanKind.RECOMPUTE}
    assert min(chunk for chunk, _ in outcomes) == 0


def test_timelines_come_back_as_they_were_written(tmp_path: Path):
    kept = [timeline(span(SpanKind.LOAD, 0.0, 1.0), span(SpanKind.SUFFIX, 1.0, 2.5, chunk=-1)), timeline()]
    write_timelines(tmp_path / "timelines.json", kept)
    assert read_timelines(tmp_path / "timelines.json") == kept


def test_a_malformed_timelines_file_is_an_error_of_ours(tmp_path: Path):
    path = tmp_path / "timelines.json"
    for text in ("[{]", '[{"label": "x"}]', "3"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_timelines(path)


def test_a_thousand_spans_are_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    kinds = list(SpanKind)
    spans = [
        span(kinds[i % len(kinds)], i * 0.002, i * 0.002 + 0.002, chunk=i % 2, blocks=(i % 3, 3)) for i in range(1000)
    ]
    path = draw_timelines([timeline(*spans), timeline()], tmp_path / "deep" / "timeline.png", title="two")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no timelines"):
        draw_timelines([], tmp_path / "x.png")
