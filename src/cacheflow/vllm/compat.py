"""What CacheFlow relies on in vLLM, checked once at start with the name of what is missing.

0.32 is proved: the suite runs on it. 0.33 was compared with it in source, file by file: what is used here is the same
there; nothing was run. Any other version is probed, warned about, and must pass the self-test.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from cacheflow.errors import ConfigError

logger = logging.getLogger(__name__)

PROVED_VERSIONS = ("0.32",)
READ_VERSIONS = ("0.33",)

_CONNECTOR_METHODS = (
    "bind_connector_metadata", "build_connector_meta", "build_connector_worker_meta", "build_kv_connector_stats",
    "build_prom_metrics", "clear_connector_metadata", "get_block_ids_with_load_errors", "get_finished",
    "get_handshake_metadata", "get_kv_connector_stats", "get_num_new_matched_tokens", "handle_preemptions",
    "on_new_request", "register_kv_caches", "request_finished", "save_kv_layer",
    "set_xfer_handshake_metadata_pp_aware", "shutdown", "start_load_kv", "take_events", "update_connector_output",
    "update_state_after_alloc", "wait_for_layer_load", "wait_for_save",
)  # fmt: skip
_RUNNER_ATTRIBUTES = (
    "attn_groups", "device", "get_draft_model", "get_model", "kv_cache_config", "model", "supports_mm_inputs",
    "vllm_config",
)  # fmt: skip
_GROUP_ATTRIBUTES = (
    "backend", "build_metadata", "create_metadata_builders", "kernel_block_stride", "kv_cache_group_id",
    "kv_cache_spec", "layer_names",
)  # fmt: skip
_METADATA_FIELDS = (
    "block_table_tensor", "causal", "is_prefilling", "max_query_len", "max_seq_len", "num_actual_tokens", "num_reqs",
    "positions", "query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "slot_mapping",
)  # fmt: skip
_CONTEXT_ARGUMENTS = ("attn_metadata", "num_tokens", "slot_mapping", "vllm_config")


class RunnerKind(Enum):
    """Which generation of vLLM's model runner a worker has."""

    V1 = "v1"
    V2 = "v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmVersion:
    """The installed vLLM.

    Attributes:
        text: Its version.
        known: CacheFlow's suite ran on this minor version, or its source was read.
    """

    text: str
    known: bool


def vllm_version() -> VllmVersion:
    """Which vLLM this is, and what we know of it."""
    import vllm

    text = str(vllm.__version__)
    minor = ".".join(text.split(".")[:2])
    return VllmVersion(text=text, known=minor in PROVED_VERSIONS + READ_VERSIONS)


def check_version() -> None:
    """Check, on either side, that vLLM has what CacheFlow relies on; warns of a version that is not known.

    Raises:
        ConfigError: vLLM lacks something; names it.
    """
    version = vllm_version()
    if not version.known:
        logger.warning(
            "vLLM %s is neither proved (%s) nor known (%s) to CacheFlow; leave self_test on",
            version.text, ", ".join(PROVED_VERSIONS), ", ".join(READ_VERSIONS),
        )  # fmt: skip
    require_vllm(version.text)


def require_vllm(version: str) -> None:
    """Probe the classes and functions CacheFlow uses.

    Raises:
        ConfigError: Something is missing; lists all of it.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.forward_context import set_forward_context
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.utils import AttentionGroup

    missing = [f"KVConnectorBase_V1.{name}" for name in _CONNECTOR_METHODS if not hasattr(KVConnectorBase_V1, name)]
    group_names = {*dir(AttentionGroup), *(each.name for each in fields(AttentionGroup))}
    missing += [f"AttentionGroup.{name}" for name in _GROUP_ATTRIBUTES if name not in group_names]
    metadata_names = {each.name for each in fields(CommonAttentionMetadata)}
    missing += [f"CommonAttentionMetadata.{name}" for name in _METADATA_FIELDS if name not in metadata_names]
    arguments = inspect.signature(set_forward_context).parameters
    missing += [f"set_forward_context({name}=)" for name in _CONTEXT_ARGUMENTS if name not in arguments]
    if missing:
        raise ConfigError(f"vLLM {version} lacks {', '.join(missing)}; CacheFlow supports 0.32 and 0.33")


def missing_for_local_states(kv_cache_manager: Any) -> list[str]:  # noqa: ANN401 -- vLLM's KVCacheManager
    """What a KV cache manager lacks of what it takes to hold running states of vLLM's own prefix cache."""
    pool = getattr(kv_cache_manager, "block_pool", None)
    missing = [] if hasattr(kv_cache_manager, "get_computed_blocks") else ["get_computed_blocks"]
    return missing + [f"block_pool.{name}" for name in ("touch", "free_blocks") if not hasattr(pool, name)]


def require_runner(runner: Any) -> None:  # noqa: ANN401 -- a vLLM model runner
    """Check a model runner once its KV cache is registered.

    Raises:
        ConfigError: It lacks something CacheFlow relies on; lists all of it.
    """
    missing = [name for name in _RUNNER_ATTRIBUTES if not hasattr(runner, name)]
    if missing:
        raise ConfigError(
            f"vLLM {vllm_version().text}: {type(runner).__name__} lacks {', '.join(missing)}; CacheFlow supports 0.32 "
            "and 0.33"
        )


def runner_kind(runner: Any) -> RunnerKind:  # noqa: ANN401 -- a vLLM model runner
    """Which generation this runner is.

    Raises:
        ConfigError: Neither.
    """
    modules = {cls.__module__ for cls in type(runner).__mro__}
    if "vllm.v1.worker.gpu_model_runner" in modules:
        return RunnerKind.V1
    if "vllm.v1.worker.gpu.model_runner" in modules:
        return RunnerKind.V2
    raise ConfigError(f"{type(runner).__name__} is no model runner CacheFlow knows; it is defined in {sorted(modules)}")


def is_compiled(vllm_config: Any) -> bool:  # noqa: ANN401 -- vLLM's VllmConfig
    """Whether the model's forward goes through ``torch.compile``."""
    from vllm.config import CompilationMode

    mode = vllm_config.compilation_config.mode
    return mode is not None and CompilationMode(mode) is not CompilationMode.NONE
