"""The entry point, with a package in vLLM's place, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

WORKER = """
class Worker:
    model_runner = "the runner"
    def __init__(self, vllm_config):
        self.vllm_config = vllm_config
    def load_model(self, *, load_dummy_weights=False):
        self.loaded = load_dummy_weights
"""
PRELUDE = """
import sys
from types import SimpleNamespace
from cacheflow.vllm.plugin import register

def config(path, extra=None):
    transfer = SimpleNamespace(kv_connector_module_path=path, kv_connector_extra_config=extra or {})
    return SimpleNamespace(kv_transfer_config=transfer)

def known(vllm_config):
    from cacheflow.errors import ConfigError
    from cacheflow.vllm.model_access import runner_of
    try:
        return runner_of(vllm_config)
    except ConfigError as error:
        assert "vllm.general_plugins" in str(error)
        return None
"""


@pytest.fixture
def run(tmp_path):
    package = tmp_path / "vllm" / "v1" / "worker"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    (package / "gpu_worker.py").write_text(WORKER)
    source = Path(__file__).parents[2] / "src"

    def script(body):
        environment = {"PYTHONPATH": f"{tmp_path}:{source}", "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + body], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    return script


def test_registering_imports_neither_vllm_nor_torch(run):
    run("""
register()
assert not [name for name in sys.modules if name.startswith(("vllm", "torch"))]
""")


def test_a_worker_is_remembered_once_its_model_is_loaded(run):
    run("""
register()
register()
from vllm.v1.worker.gpu_worker import Worker
ours = config("cacheflow.vllm.connector")
worker = Worker(ours)
assert known(ours) is None
worker.load_model(load_dummy_weights=True)
assert worker.loaded is True
assert known(ours) == "the runner"
del worker
assert known(ours) is None
""")


def test_a_module_that_is_there_already_is_wrapped_once(run):
    run("""
from vllm.v1.worker.gpu_worker import Worker
original = Worker.load_model
register()
wrapped = Worker.load_model
register()
assert Worker.load_model is wrapped is not original
assert wrapped.__wrapped__ is original
""")


def test_other_engines_are_left_alone(run):
    run("""
register()
from vllm.v1.worker.gpu_worker import Worker
for other in (config("somebody.else"), SimpleNamespace(kv_transfer_config=None)):
    Worker(other).load_model()
assert "cacheflow.vllm.model_access" not in sys.modules
child = {"connectors": [{"kv_connector_module_path": "cacheflow.vllm.connector"}]}
multi = config(None, child)
worker = Worker(multi)
worker.load_model()
assert known(multi) == "the runner"
""")
