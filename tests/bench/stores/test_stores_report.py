"""What records of stores say, from made-up speeds."""

import pytest
from rich.console import Console

from cacheflow.bench.records.stores import StoreReadRecord
from cacheflow.bench.stores.report import HEADS, stores_markdown, stores_tables, summarise_stores
from cacheflow.bench.stores.study import CHECKSUM, OURS, UNVERIFIED
from cacheflow.errors import ConfigError

MIB = 1 << 20
LINK = 1.25e9


def turn(way, gb_per_s, *, repeat=0, link=None, correct=True, store="file", mib=4, **changes):
    values = {
        "store": store, "way": way, "object_bytes": mib * MIB, "num_objects": 32, "reads_in_flight": 3,
        "link_bytes_per_s": link, "repeat": repeat, "read_bytes": int(gb_per_s * 1e9), "read_s": 1.0,
        "correct": correct, "environment": {"cpu": "test processor", "num_cores": 2, "numpy": "2", "hiredis": None},
    }  # fmt: skip
    return StoreReadRecord(**{**values, **changes})


def drifting(way, gb_per_s, **options):
    """Three turns on a machine that gets slower for everybody."""
    return [turn(way, gb_per_s / slow, repeat=repeat, **options) for repeat, slow in enumerate((1.0, 2.0, 4.0))]


def study(**options):
    return [
        *drifting(OURS, 4.0, **options),
        *drifting(UNVERIFIED, 5.0, **options),
        *drifting("preadv", 8.0, **options),
        *drifting("preadv, one thread", 6.0, **options),
        *drifting(CHECKSUM, 25.0, **options),
        *drifting(OURS, 1.25, link=LINK, **options),
        *drifting(UNVERIFIED, 1.2625, link=LINK, **options),
    ]


def test_ratios_are_taken_within_repeats_and_to_the_best_other_way():
    (summary,) = summarise_stores(study())
    assert summary.rival == ("preadv", None, 3)
    assert (summary.over_rival.low, summary.over_rival.high) == (0.5, 0.5)
    assert summary.verification.median == pytest.approx(0.25)
    assert summary.verification_linked.median == pytest.approx(0.01)
    assert summary.checksum_share.low == pytest.approx(0.05)
    assert summary.checksum_share.high == pytest.approx(0.2)


def test_the_other_way_may_have_a_worse_best_turn():
    lucky = [turn("lucky", 9.0), *(turn("lucky", 1.0, repeat=repeat) for repeat in (1, 2))]
    steady = [turn("steady", 3.0, repeat=repeat) for repeat in range(3)]
    (summary,) = summarise_stores([*drifting(OURS, 4.0), *lucky, *steady])
    assert summary.rival[0] == "steady"


def test_a_turn_that_ran_again_counts_once_with_its_last_record():
    (summary,) = summarise_stores([turn(OURS, 1.0), turn("preadv", 4.0), turn(OURS, 2.0)])
    assert summary.over_rival.median == 0.5
    assert summary.num_repeats == 1


def printed(records):
    console = Console(width=200, record=True)
    console.print(stores_tables(records))
    return console.export_text()


def test_tables_name_store_size_and_way():
    shown = printed([*study(), *study(store="redis", mib=1)])
    assert "file store, objects of 4 MiB: 3 runs" in shown
    assert "redis store, objects of 1 MiB: 3 runs" in shown
    assert "cacheflow at 10 Gbit/s" in shown
    ours = next(line for line in shown.splitlines() if line.split()[:2] == [OURS, "3"])
    assert ours.split() == [OURS, "3", "2.00", "1.00–4.00", "0.50", "yes"]
    assert "file, 4 MiB: 2.00 GB/s; 0.50 (0.50 to 0.50) of the best other way (preadv × 3, 4.00 GB/s)" in shown


def test_nothing_is_said_of_a_store_where_somebody_read_something_else():
    records = [*study(), turn("preadv", 8.0, repeat=3, correct=False)]
    markdown = stores_markdown(records)
    assert markdown.splitlines()[2].count("wrong") == len(HEADS) - 2
    assert "GB/s" not in markdown.splitlines()[2]
    shown = printed(records)
    (row,) = [line for line in shown.splitlines() if line.split()[:2] == ["preadv", "3"]]
    assert row.split() == ["preadv", "3", "wrong", "–", "–", "no,", "1", "of", "4"]


def test_a_page_gets_a_row_a_store_and_size():
    lines = stores_markdown([*study(), *study(mib=16), *study(store="memory")[:6]]).splitlines()
    assert lines[0].count("|") == len(HEADS) + 1
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["file", "file", "memory"]
    assert "| preadv × 3, 4.00 GB/s | 0.50 (0.50 to 0.50) | +25% (+25% to +25%) | +1.0% (+1.0% to +1.0%) |" in lines[2]
    assert "–" in lines[4]
    assert "median of 3 alternating turns" in lines[-1]
    assert "hiredis" not in lines[-1]


@pytest.mark.parametrize("changes", [{"read_s": 0.0}, {"object_bytes": 0}, {"way": ""}, {"link_bytes_per_s": -1.0}])
def test_impossible_numbers_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        turn(**{"way": OURS, "gb_per_s": 1.0, **changes})
