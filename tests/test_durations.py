import pytest

from cacheflow.durations import seconds_of, text_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800), ("1.5 H", 5400), ("0s", 0)],
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "7", "d", "-1d", "a week", "1w", "1h30m", "7d ", "1e3s", "\u0667d", "9" * 400 + "d"]
)
def test_what_is_no_duration(text):
    assert seconds_of(text) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0, "0 s"),
        (1.4, "1 s"),
        (119, "119 s"),
        (120, "2 m"),
        (7200, "2 h"),
        (86_400, "24 h"),
        (604_800, "7 d"),
    ],
)
def test_durations_are_shown_in_the_largest_unit_of_which_there_are_two(seconds, text):
    assert text_of(seconds) == text
