"""Engines of the vLLM suite: one start for each family, shared by the tests of that family."""

import os

import pytest

from support import v2_runner
from support.scheduler_cases import OPEN_CASES

if v2_runner.WANTED:
    v2_runner.interpret_triton()

ENGINES = {
    "qwen3-bf16": ("qwen3", "bfloat16"),
    "llama-fp32": ("llama", "float32"),
    "qwen2-bf16": ("qwen2", "bfloat16"),
    "mistral-fp32": ("mistral", "float32"),
    "qwen3_moe-bf16": ("qwen3_moe", "bfloat16"),
}
SECOND_RUNNER = list(ENGINES)[:2]
"""Of both dtypes. Partial forwards are of a model's layers, which the runners share: one family shows that they equal
what the second one's prefill leaves. ``test_models.py`` has more families on it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("vllm"):
            # vLLM, torch and their dependencies warn about each other; those warnings are not ours to fail on.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def _no_case_outlives_its_test():
    """Threads of a scheduler side and its store end with the test that made them."""
    yield
    while OPEN_CASES:
        OPEN_CASES.pop().close()


@pytest.fixture(scope="session")
def _single_process_vllm():
    """Engines run in this process, so that tests reach the model; set before vLLM is imported."""
    for key, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(key, value)


@pytest.fixture(scope="module")
def rank_host(tmp_path_factory):
    """Serves the engines of several ranks of a file."""
    from support.rank_host import RankHost

    with RankHost(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture(scope="session", params=SECOND_RUNNER if v2_runner.WANTED else list(ENGINES))
def tiny(request, tmp_path_factory, _single_process_vllm):
    """One engine; pytest runs all tests of one before it starts the next. Ask for a certain one indirectly."""
    from support.vllm_models import tiny_engine, write_model

    family, dtype = ENGINES[request.param]
    folder = write_model(tmp_path_factory.mktemp(request.param), family)
    with tiny_engine(folder, dtype=dtype) as engine:
        yield engine
