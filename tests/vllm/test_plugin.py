"""The entry point, with a package in vLLM's place, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

WORKER = """
class Worker:
    model_runner = "the runner"
    def apply_model(self, func):
        return func("the model")
    def update_weights(self, update_info):
        raise RuntimeError("half-way")
    def __init__(self, vllm_config):
        self.vllm_config = vllm_config
    def load_model(self, *, load_dummy_weights=False):
        import logging
        logging.debug("as the experts do on the CPU")
        self.loaded = load_dummy_weights
"""
FACTORY = """
class KVConnectorFactory:
    registered = {}
    @classmethod
    def register_connector(cls, name, module_path, class_name):
        if name in cls.registered:
            raise ValueError(name)
        cls.registered[name] = module_path, class_name
"""
SHARING = """
def add_kv_sharing_layers_to_kv_cache_groups(sharing, groups, runner_only=None):
    for name, owner in sharing.items():
        next(group for group in groups if owner in group.layer_names).layer_names.append(name)
"""
RUNNER = """
from vllm.v1.worker.utils import add_kv_sharing_layers_to_kv_cache_groups
def start(sharing, groups):
    add_kv_sharing_layers_to_kv_cache_groups(sharing, groups, runner_only=set())
"""
PRELUDE = """
import copy
import sys
from types import SimpleNamespace
from cacheflow.vllm.plugin import register

def config(path, extra=None):
    transfer = SimpleNamespace(kv_connector_module_path=path, kv_connector_extra_config=extra or {})
    return SimpleNamespace(
        kv_transfer_config=transfer, compilation_config=SimpleNamespace(static_forward_context={})
    )

def known(vllm_config):
    from cacheflow.errors import ConfigError
    from cacheflow.vllm.models.workers import worker_of
    try:
        return worker_of(vllm_config).model_runner
    except ConfigError as error:
        assert "vllm.general_plugins" in str(error)
        return None
"""


@pytest.fixture
def run(tmp_path):
    modules = {
        "v1/worker/gpu_worker": WORKER, "distributed/kv_transfer/kv_connector/factory": FACTORY,
        "v1/worker/utils": SHARING, "v1/worker/gpu_model_runner": RUNNER, "v1/worker/gpu/attn_utils": RUNNER,
    }  # fmt: skip
    for name, text in modules.items():
        module = (tmp_path / "vllm" / name).with_suffix(".py")
        module.parent.mkdir(parents=True, exist_ok=True)
        for folder in module.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").write_text("")
        module.write_text(text)
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


def test_a_workers_log_is_vllms_although_a_model_configures_logging(run):
    """``logging.debug`` gives the root logger a handler and no level, and what is below a warning would be lost."""
    run("""
import io
import logging
theirs, seen = logging.getLogger("vllm"), io.StringIO()
theirs.addHandler(logging.StreamHandler(seen))
theirs.setLevel("INFO")
register()
from vllm.v1.worker.gpu_worker import Worker
worker = Worker(config("cacheflow.vllm.connector"))
worker.load_model()
from cacheflow.vllm.last_line import log_beside_vllm
log_beside_vllm()
logging.getLogger("cacheflow.vllm.startup").info("self-test passed")
assert seen.getvalue() == "self-test passed\\n"
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


@pytest.mark.parametrize("runner", ["gpu_model_runner", "gpu.attn_utils"])
@pytest.mark.parametrize("late", [False, True])
def test_layers_that_use_the_kv_of_others_have_a_specification_in_their_group(run, runner, late):
    """Of a group that has one for each layer; of others nothing changes."""
    imported = f"from vllm.v1.worker.{runner} import start"
    run(f"""
{imported if late else ""}
register()
register()
{imported}
several = SimpleNamespace(layer_names=["a", "b"], kv_cache_spec=SimpleNamespace(kv_cache_specs={{"a": 1, "b": 2}}))
alike = SimpleNamespace(layer_names=["c"], kv_cache_spec=SimpleNamespace())
start({{"d": "b", "e": "c"}}, [several, alike])
assert several.layer_names == ["a", "b", "d"] and alike.layer_names == ["c", "e"]
assert several.kv_cache_spec.kv_cache_specs == {{"a": 1, "b": 2, "d": 2}}
assert vars(alike.kv_cache_spec) == {{}}
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


def test_ways_to_change_weights_tell_whoever_watches_them_also_where_they_fail(run):
    """A vLLM that lacks one of them is left as it is."""
    run("""
register()
import types
told = []
watch = types.ModuleType("cacheflow.vllm.worker.weights_watch")
watch.announce_change = lambda runner, how: told.append((runner, how))
sys.modules["cacheflow.vllm.worker.weights_watch"] = watch
from vllm.v1.worker.gpu_worker import Worker
worker = Worker(config("cacheflow.vllm.connector"))
assert worker.apply_model(str.upper) == "THE MODEL"
try:
    worker.update_weights({})
except RuntimeError as error:
    assert str(error) == "half-way"
else:
    raise AssertionError("the error was swallowed")
assert told == [("the runner", "apply_model"), ("the runner", "update_weights")]
assert not hasattr(Worker, "reload_weights")
""")


def test_an_engine_without_a_connector_is_left_alone(run):
    run("""
register()
from cacheflow.vllm.models import workers
from vllm.v1.worker.gpu_worker import Worker
worker = Worker(SimpleNamespace(kv_transfer_config=None))
worker.load_model()
assert list(workers.remembered()) == []
assert "cacheflow.vllm.models.model_access" not in sys.modules
""")


def test_a_worker_is_found_whichever_way_its_connector_is_reached(run):
    """By a module of the user's, and by the shallow copy of the configuration that MultiConnector gives a child."""
    run("""
register()
from vllm.v1.worker.gpu_worker import Worker
theirs = config("somebody.else")
worker = Worker(theirs)
worker.load_model()
child = copy.copy(theirs)
child.kv_transfer_config = config("cacheflow.vllm.connector").kv_transfer_config
assert known(theirs) == known(child) == "the runner"
""")


def test_two_engines_of_a_process_are_told_apart(run):
    run("""
register()
from vllm.v1.worker.gpu_worker import Worker
configs = [config("cacheflow.vllm.connector") for _ in range(2)]
workers = [Worker(each) for each in configs]
for name, worker in zip("ab", workers):
    worker.model_runner = name
    worker.load_model()
    worker.load_model()
assert [known(copy.copy(each)) for each in configs] == ["a", "b"]
assert known(config("cacheflow.vllm.connector")) is None
""")


def test_the_dead_are_not_taken_for_the_living(run):
    """An engine that ended, and another whose configuration may lie at the same address."""
    run("""
register()
from cacheflow.vllm.models import workers
from vllm.v1.worker.gpu_worker import Worker
for _ in range(100):
    ours = config("cacheflow.vllm.connector")
    assert known(ours) is None
    Worker(ours).load_model()
    assert known(ours) is None
assert len(workers._workers) == 1
""")


@pytest.mark.parametrize("first", ["register()", "import vllm.distributed.kv_transfer.kv_connector.factory"])
def test_the_connector_is_known_by_its_name(run, first):
    run(
        first
        + """
register()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
register()
assert KVConnectorFactory.registered == {
    "CacheFlowConnector": ("cacheflow.vllm.connector", "CacheFlowConnector"),
    "CacheFlowHybridConnector": ("cacheflow.vllm.hybrid_connector", "CacheFlowHybridConnector"),
}
"""
    )
