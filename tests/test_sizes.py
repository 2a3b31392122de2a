import pytest

from cacheflow.sizes import bytes_of


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("1000000", 10**6),
        ("500MB", 500 * 10**6),
        ("500 mb", 500 * 10**6),
        ("4GiB", 4 << 30),
        ("4Gi", 4 << 30),
        ("1.5G", 1_500_000_000),
        ("0.5KiB", 512),
        ("2TB", 2 * 10**12),
        ("7b", 7),
    ],
)
def test_sizes(text, num_bytes):
    assert bytes_of(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.5", "-1", "much", "4 bytes", "4iB", "4PB", "1e9", "inf", "nan", "9" * 400, "4\u212ab", "\u0664MB"],
)
def test_what_is_no_size(text):
    assert bytes_of(text) is None
