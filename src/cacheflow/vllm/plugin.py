"""vLLM's entry point into CacheFlow: remembers each worker once its model is loaded.

vLLM calls ``register`` in every process, before it knows any configuration. So nothing of vLLM is imported here: the
worker's class is wrapped when vLLM itself imports its module, in memory, and the wrapper does nothing unless
CacheFlow's connector is configured.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from cacheflow.vllm.last_line import print_reason_last

WORKER_MODULE = "vllm.v1.worker.gpu_worker"
"""Its ``Worker`` is the base of the CPU worker too."""

CONNECTOR_MODULE = "cacheflow.vllm.connector"

_MARK = "_cacheflow_remembers"


def register() -> None:
    """Arrange for ``Worker.load_model`` to remember its worker; calling it again does nothing."""
    print_reason_last()
    module = sys.modules.get(WORKER_MODULE)
    if module is not None and hasattr(module, "Worker"):
        _wrap(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def uses_cacheflow(vllm_config: Any) -> bool:  # noqa: ANN401 -- vLLM's VllmConfig
    """Whether this engine has CacheFlow's connector, alone or as a child of a ``MultiConnector``."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and (
        transfer.kv_connector_module_path == CONNECTOR_MODULE
        or CONNECTOR_MODULE in str(transfer.kv_connector_extra_config)
    )


class _AfterImport(MetaPathFinder):
    """Finds the worker's module as everybody else would, and wraps its class once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Only the worker's module, once."""
        if fullname != WORKER_MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _run_after(spec.loader, _wrap)
        return spec


def _run_after(loader: Loader, action: Callable[[ModuleType], None]) -> None:
    """Have this one loader call ``action`` with the module it has executed."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        action(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _wrap(module: ModuleType) -> None:
    load_model = module.Worker.load_model
    if hasattr(load_model, _MARK):
        return

    @functools.wraps(load_model)
    def remembering(worker: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- whatever this vLLM passes
        result = load_model(worker, *args, **kwargs)
        if uses_cacheflow(worker.vllm_config):
            from cacheflow.vllm.model_access import remember

            remember(worker)
        return result

    setattr(remembering, _MARK, True)
    module.Worker.load_model = remembering
