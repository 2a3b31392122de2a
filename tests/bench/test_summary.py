import pytest

from cacheflow.bench.spread import Spread
from cacheflow.bench.summary import breaks_promise, summarise
from support.sample_records import sample_record, sample_sweep


def test_ratios_are_taken_within_a_repeat_so_that_drift_cancels():
    summary = summarise(sample_sweep())[1]
    ours = summary.of("cacheflow")
    assert ours.rival == "cake"
    # A ratio of medians across repeats would show the drift of 3x in its spread.
    assert ours.over_rival.low == pytest.approx(1.2 / 1.4)
    assert ours.over_rival.high == pytest.approx(1.2 / 1.4)
    assert not breaks_promise(ours)


def test_settings_ascend_by_ratio_and_carry_the_bound():
    summaries = summarise(sample_sweep()[::-1])
    assert [s.setting.load_compute_ratio for s in summaries] == [0.5, 1.0, 2.0]
    assert summaries[0].bound_restore_s == 1.0
    assert summaries[0].bound_ttft_s == 1.15


def test_a_policy_with_one_wrong_run_shows_no_time_at_all():
    records = [sample_record(repeat=0), sample_record(repeat=1, correct=False), sample_record(policy="cake")]
    ours = summarise(records)[0].of("cacheflow")
    assert not ours.exact
    assert (ours.num_wrong, ours.num_runs) == (1, 2)
    assert ours["ttft_s"] is None
    assert ours["ttft_over_bound"] is None


def test_a_wrong_policy_is_nobodys_rival():
    records = [sample_record(), sample_record(policy="load", ttft_s=0.1, correct=False), sample_record(policy="cake")]
    assert summarise(records)[0].of("cacheflow").rival == "cake"


@pytest.mark.parametrize(
    ("ours_s", "breaks"),
    [pytest.param(1.024, False, id="2 % and 4 ms"), pytest.param(1.026, True, id="2 % and 6 ms")],
)
def test_the_promise_is_two_percent_plus_five_milliseconds(ours_s: float, breaks: bool):
    records = [sample_record(ttft_s=ours_s), sample_record(policy="cake", ttft_s=1.0)]
    assert breaks_promise(summarise(records)[0].of("cacheflow")) is breaks


def test_without_a_suffix_restoration_is_what_counts():
    plain = {"suffix_tokens": 0, "ttft_s": None, "bound_ttft_s": None}
    records = [sample_record(**plain, restore_s=1.1), sample_record(policy="cake", **plain, restore_s=1.0)]
    summary = summarise(records)[0]
    assert summary.metric == "restore"
    assert summary.of("cacheflow").over_rival == Spread(1.1, 1.1, 1.1)
    assert summary.bound_ttft_s is None


def test_a_repeat_that_ran_again_counts_once_with_its_last_record():
    records = [sample_record(ttft_s=9.0), sample_record(ttft_s=1.2)]
    ours = summarise(records)[0].of("cacheflow")
    assert ours.num_runs == 1
    assert ours["ttft_s"].median == 1.2


def test_perturbed_runs_are_a_setting_of_their_own():
    assert len(summarise([sample_record(), sample_record(perturbation={"cost_error": 2.0})])) == 2
