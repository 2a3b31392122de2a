"""The budget between two rounds of decoding."""

from __future__ import annotations

import pytest

from cacheflow.errors import ConfigError
from cacheflow.restore.decode_pace import HEADROOM, DecodePace


def test_a_round_is_due_before_work_that_would_exceed_the_budget():
    pace = DecodePace(budget_s=0.05)
    pace.begin(1.0)
    assert not pace.is_due(1.0, next_s=0.04)
    assert not pace.is_due(1.02, next_s=0.02)
    assert pace.is_due(1.02, next_s=0.04)
    pace.note_round(1.03, 1.04)
    assert not pace.is_due(1.04, next_s=0.04)


def test_the_budget_follows_from_the_latency_asked_for():
    pace = DecodePace(budget_s=1.0, itl_slo_s=0.1)
    assert pace.budget_s == 0.0, "nothing is known of a round yet, and the first must be in time too"
    pace.note_round(0.0, 0.05)
    assert pace.budget_s == pytest.approx(HEADROOM * (0.1 - 0.05))
    for _ in range(30):
        pace.note_round(0.0, 0.2)
    assert pace.budget_s == 0.0
    assert pace.is_due(0.2, next_s=1e-6)


@pytest.mark.parametrize("bad", [{"budget_s": 0.0}, {"itl_slo_s": -1.0}])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DecodePace(**bad)
