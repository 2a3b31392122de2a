"""vLLM's entry point into CacheFlow: remembers workers, hears of changed weights, and makes the connector known.

vLLM calls ``register`` in every process, before it knows any configuration. So nothing of vLLM is imported here: its
modules are changed when vLLM itself imports them, in memory. Of a worker no more than a weak reference is kept, and
only where a KV connector is configured: which class that is, and whether it stands alone, shows when it asks. A fault
of vLLM is mended that keeps models from starting beside a KV connector: see ``_add_sharing_with_specs``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from cacheflow.vllm.last_line import log_beside_vllm, print_reason_last
from cacheflow.vllm.models.workers import remember

WORKER_MODULE = "vllm.v1.worker.gpu_worker"
"""Its ``Worker`` is the base of the CPU worker too."""

FACTORY_MODULE = "vllm.distributed.kv_transfer.kv_connector.factory"
"""Its ``KVConnectorFactory`` finds connectors by name, also for the statistics of a ``MultiConnector``'s children."""

RUNNER_MODULE, GROUPS_MODULE = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils"
"""Where the runners of both generations add layers that use another layer's KV to the KV cache groups."""

ADD_SHARING = "add_kv_sharing_layers_to_kv_cache_groups"

CONNECTOR, HYBRID_CONNECTOR = "CacheFlowConnector", "CacheFlowHybridConnector"
CONNECTORS = {CONNECTOR: "cacheflow.vllm.connector", HYBRID_CONNECTOR: "cacheflow.vllm.hybrid_connector"}
"""Connectors by name, and the module of each; the second is for models with recurrent layers."""

WEIGHT_METHODS = ("apply_model", "reload_weights", "start_weight_update", "update_weights", "finish_weight_update")
"""Of vLLM's worker: each may leave other weights. ``apply_model`` may only look, which cannot be seen from here."""

_MARK = "_cacheflow_remembers"


def register() -> None:
    """Arrange for ``Worker.load_model`` to remember its worker, and for the connector's name to be known.

    Calling it again does nothing.
    """
    print_reason_last()
    for name, (public, action) in _CHANGES.items():
        module = sys.modules.get(name)
        if module is not None and hasattr(module, public):
            action(module)
        elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, action))


def _announce(worker_class: Any, name: str) -> None:  # noqa: ANN401 -- vLLM's Worker
    """Have a method of the worker announce that it may have changed the weights, also where it fails half-way."""
    change = getattr(worker_class, name, None)
    if change is None or hasattr(change, _MARK):
        return

    @functools.wraps(change)
    def announcing(worker: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- whatever this vLLM passes
        try:
            return change(worker, *args, **kwargs)
        finally:
            from cacheflow.vllm.worker.weights_watch import announce_change

            announce_change(worker.model_runner, name)

    setattr(announcing, _MARK, True)
    setattr(worker_class, name, announcing)


class _AfterImport(MetaPathFinder):
    """Finds a module of vLLM as any finder would, and changes it once it has run."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self._action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Only the one module, once."""
        if fullname != self.name:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _run_after(spec.loader, self._action)
        return spec


def _run_after(loader: Loader, action: Callable[[ModuleType], None]) -> None:
    """Have this one loader call ``action`` with the module it has executed."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        action(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _wrap(module: ModuleType) -> None:
    for name in WEIGHT_METHODS:
        _announce(module.Worker, name)
    load_model = module.Worker.load_model
    if hasattr(load_model, _MARK):
        return

    @functools.wraps(load_model)
    def remembering(worker: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- whatever this vLLM passes
        connected = worker.vllm_config.kv_transfer_config is not None
        if connected:
            log_beside_vllm()  # before the model: what it loads may log through logging's own functions
        result = load_model(worker, *args, **kwargs)
        if connected:
            remember(worker)
        return result

    setattr(remembering, _MARK, True)
    module.Worker.load_model = remembering


def _add_sharing_with_specs(module: ModuleType) -> None:
    """Have a runner find what a layer keeps that uses another's KV, in a group whose layers have other heads.

    vLLM 0.32 adds such a layer's name to the group and not its specification, for which it asks next (``KeyError``).
    """
    add = getattr(module, ADD_SHARING, None)
    if add is None or hasattr(add, _MARK):
        return

    @functools.wraps(add)
    def adding(sharing: Mapping[str, str], groups: Sequence[Any], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        add(sharing, groups, *args, **kwargs)
        for group in groups:
            specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
            specs.update({name: specs[owner] for name, owner in sharing.items() if owner in specs})

    setattr(adding, _MARK, True)
    setattr(module, ADD_SHARING, adding)


def _name_connector(module: ModuleType) -> None:
    for name, path in CONNECTORS.items():
        with contextlib.suppress(ValueError):  # registered before
            module.KVConnectorFactory.register_connector(name, path, name)


_CHANGES: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    WORKER_MODULE: ("Worker", _wrap),
    FACTORY_MODULE: ("KVConnectorFactory", _name_connector),
    RUNNER_MODULE: (ADD_SHARING, _add_sharing_with_specs),
    GROUPS_MODULE: (ADD_SHARING, _add_sharing_with_specs),
}
"""By module: the name by which it is known to have run, and what is done to it."""
