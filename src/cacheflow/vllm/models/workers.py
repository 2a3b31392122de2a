"""The workers of this process that have loaded a model: vLLM gives a connector the KV cache, but not the model.

``plugin`` wraps ``Worker.load_model``, which then calls ``remember``; ``worker_of`` finds the worker again. Imports
neither vLLM nor torch, because vLLM loads its plugins before it knows any configuration.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from cacheflow.errors import ConfigError

_workers: list[weakref.ref[Any]] = []
"""The newest last."""


def remember(worker: Any) -> None:  # noqa: ANN401 -- a vLLM worker
    """Note a worker that has loaded its model; it is forgotten when it ends."""
    _workers[:] = [weakref.ref(each) for each in reversed(list(remembered())) if each is not worker]
    _workers.append(weakref.ref(worker))


def remembered() -> Iterator[Any]:
    """The workers of this process that have loaded their model and live, the newest first."""
    return (worker for reference in reversed(_workers) if (worker := reference()) is not None)


def worker_of(vllm_config: Any) -> Any:  # noqa: ANN401 -- vLLM's objects
    """The worker that runs the engine of this configuration.

    A child of vLLM's ``MultiConnector`` is given a shallow copy of the configuration, so the two are not one object.
    What they share is the dictionary in which the attention layers of the engine's model have entered themselves: no
    two models of a process can share that, since their layers would have the same names.

    Raises:
        ConfigError: No such worker loaded a model after the plugin was registered.
    """
    layers = vllm_config.compilation_config.static_forward_context
    for worker in remembered():
        if worker.vllm_config.compilation_config.static_forward_context is layers:
            return worker
    raise ConfigError(
        "CacheFlow does not know this worker's model: its vLLM plugin did not run before the model was loaded. "
        "Install CacheFlow in the environment of every vLLM process (entry point vllm.general_plugins: cacheflow) "
        "and, where VLLM_PLUGINS is set, name `cacheflow` in it"
    )
