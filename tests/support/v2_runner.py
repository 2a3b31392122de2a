"""vLLM's second-generation model runner, its default on GPUs, on the CPU: Triton's interpreter runs its kernels.

``VLLM_USE_V2_MODEL_RUNNER=1`` asks for it. vLLM looks for a backend of Triton's that compiles for the CPU, which
Triton's wheels do not have; interpreted kernels need none, so it is shown one that says what it is. What runs is vLLM's
own runner, more slowly.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

WANTED = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
NUM_TOKENS = 8 if WANTED else 32
"""Of an answer, unless a test asks for more: each takes a step, in which a dozen kernels are interpreted."""
first_runner = pytest.mark.skipif(WANTED, reason="the second runner's kernels are interpreted: a few tests show it")


def interpret_triton() -> None:
    """Call before anything imports Triton or vLLM, in every process of an engine."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False), compiler=None))
