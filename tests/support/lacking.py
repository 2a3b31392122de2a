"""What a test needs and this machine lacks: a user's test is skipped, CI's fails."""

import os

import pytest


def lacking(reason):
    """End the test that runs; ``reason`` says what it needs."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; in CI these tests must run")
    pytest.skip(reason)
