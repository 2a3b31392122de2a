"""How many examples a property gets."""

from hypothesis import settings

USUAL = 100
"""What hypothesis' own default is, and that of `make test`."""


def examples(count: int) -> int:
    """``count`` in `make test`; in `make test-long`, whose profile asks for more than the usual, in proportion."""
    return count * settings.default.max_examples // USUAL
