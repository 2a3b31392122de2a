"""Commands that tests of bad input give, and what marks those that import torch."""

from __future__ import annotations

import pytest

CAPACITY = 1 << 24
PLAN = ("plan", "--model", "Llama-3.1-8B", "--gpu", "H100")
torch_test = pytest.mark.torch


def bench(model_folder, out, *options):
    return (
        "bench", "restore", "--model", model_folder, "--out", out, "--tokens", 64, "--chunk", 32, "--suffix", 8,
        "--repeats", 1, "--ratios", 1, "--policies", "load", *options,
    )  # fmt: skip
