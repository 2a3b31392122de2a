"""What can be known before vLLM starts, said in one line instead of minutes later inside a stack trace.

The reasons are those that connector and workers give (``refusals``, ``ConnectorOptions``), asked of what the command
line and a ``config.json`` on this machine say. What they do not say is left to vLLM: no answer here is no promise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from cacheflow.errors import ConfigError
from cacheflow.shapes.hf_config import CacheKind, cache_kind, text_config
from cacheflow.vllm.models.refusals import (
    DRAFTS_BESIDE_STATES,
    NO_STATES_KEPT,
    cache_refusal,
    configured_refusals,
    engine_refusals,
    require_loadable,
    require_recomputable,
    states_elsewhere,
)
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.startup.installed import InstalledVllm
from cacheflow.vllm.startup.local_config import local_config
from cacheflow.vllm.startup.server_flags import ServerFlags

_ANOTHER_CONFIG = ("--config-format", "--hf-config-path", "--model-impl")
"""With one of these a ``config.json`` does not say what vLLM will run."""
_OVERRIDES = "--hf-overrides"
"""With these it does not say all of it, but still what kind of layers there are."""
_MAX_LEN_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class _Given(SimpleNamespace):
    """A part of vLLM's configuration; what was not given is None."""

    def __getattr__(self, name: str) -> None:
        return None


def check_start(
    model: str | None,
    options: ConnectorOptions,
    flags: ServerFlags,
    *,
    installed: InstalledVllm | None,
    environment: Mapping[str, str],
) -> CacheKind:
    """Pass unless vLLM with these options is sure to be refused once it has started.

    ``model`` is a name or folder, as vLLM takes it, and None where only a configuration is printed; ``installed`` is
    None where it is not known which vLLM would run.

    Returns:
        What the model's layers keep; ``FULL`` where nothing says it.

    Raises:
        ConfigError: It would be; with the reason that the connector or a worker would give.
    """
    config = {} if model is None else _config_of(model, flags, environment)
    kind = certain = _cache_kind(flags, config, environment)
    if flags.given(_OVERRIDES):
        config, certain = {}, CacheKind.FULL
    _check_store(options, flags, installed, environment)
    _check_chunks(options, flags, max_tokens=_max_tokens(flags, config), recurrent=kind.has_states)
    view = _view(flags, config)
    reasons = [cache_refusal(certain), *engine_refusals(view), *(_state_refusals(flags) if certain.has_states else ())]
    require_loadable([reason for reason in reasons if reason])
    require_recomputable(list(configured_refusals(view)), load_only=options.unsupported_models == "load_only")
    return kind


def _state_refusals(flags: ServerFlags) -> Iterator[str]:
    """Why the running states of a hybrid are not restored with these options."""
    if flags.given("--speculative-config"):
        yield DRAFTS_BESIDE_STATES
    if flags.given("--no-enable-prefix-caching") and not flags.on("--enable-prefix-caching"):
        yield states_elsewhere(NO_STATES_KEPT)


def _check_chunks(options: ConnectorOptions, flags: ServerFlags, *, max_tokens: int | None, recurrent: bool) -> None:
    block_size, serving = flags.number("--block-size"), options.for_engine()
    if recurrent and options.chunk_tokens is None:
        if not block_size:
            return  # a chunk will be a block, whose size vLLM works out
        serving = options.for_engine(block_size)  # or larger
    if max_tokens is not None:
        serving.require_chunk_in_prompt(max_tokens)
    if block_size:
        serving.require_block_size(block_size)


def _config_of(model: str, flags: ServerFlags, environment: Mapping[str, str]) -> Mapping[str, Any]:
    if any(flags.given(name) for name in _ANOTHER_CONFIG) or flags.text("--load-format") == "gguf":
        return {}
    return local_config(model, revision=flags.text("--revision"), environment=environment) or {}


def _check_store(
    options: ConnectorOptions, flags: ServerFlags, installed: InstalledVllm | None, environment: Mapping[str, str]
) -> None:
    executor = flags.text("--distributed-executor-backend")
    if executor is None:
        ranks = [flags.number(f"--{axis}-parallel-size") or 1 for axis in ("tensor", "pipeline")]
        executor = "mp" if max(ranks) > 1 else "uni"
    on_cpu = installed is not None and installed.on_cpu
    if on_cpu and executor == "uni" and environment.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1":
        executor = "mp"  # as vLLM's CPU platform does
    if options.uses_memory and executor != "uni" and on_cpu:
        raise ConfigError(
            "store is 'memory', but vLLM on the CPU runs its worker in a process of its own, which the scheduler "
            "cannot look into: give --store-path DIR (a folder in /dev/shm stays in memory), or shm://name"
        )
    options.require_reachable_store(executor)


def _max_tokens(flags: ServerFlags, config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest prompt; None where it is not certain."""
    given = flags.number("--max-model-len")
    if given:
        return given
    text = text_config(config)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default":
        return None  # stretched beyond what the keys below say
    lengths = [text[key] for key in _MAX_LEN_KEYS if isinstance(text.get(key), int) and text[key] > 0]
    return min(lengths, default=None)


def _cache_kind(flags: ServerFlags, config: Mapping[str, Any], environment: Mapping[str, str]) -> CacheKind:
    """What layers keep in vLLM; ``FULL`` where it is not certain."""
    text = text_config(config)
    kind = cache_kind(text)
    if kind is CacheKind.WINDOW and flags.on("--disable-sliding-window"):
        return CacheKind.FULL
    if kind is CacheKind.LATENT:
        # vLLM runs some models with such keys as plain attention.
        certain = str(text.get("model_type")).startswith("deepseek_v") and not environment.get("VLLM_MLA_DISABLE")
        return kind if certain else CacheKind.FULL
    return kind


def _view(flags: ServerFlags, config: Mapping[str, Any]) -> SimpleNamespace:
    """As much of vLLM's configuration as ``refusals`` asks for, from what was typed."""
    pooling = flags.text("--runner") == "pooling" or flags.text("--convert") not in (None, "auto", "none")
    encodes = bool(config.get("is_encoder_decoder") or text_config(config).get("is_encoder_decoder"))
    sizes = {
        f"{axis}_parallel_size": flags.number(f"--{axis.replace('_', '-')}-parallel-size") or 1
        for axis in ("decode_context", "prefill_context", "pipeline", "tensor")
    }
    return SimpleNamespace(
        model_config=_Given(
            is_encoder_decoder=encodes, is_multimodal_model=False, runner_type="pooling" if pooling else "generate"
        ),
        cache_config=_Given(
            cache_dtype=flags.text("--kv-cache-dtype") or "auto",
            calculate_kv_scales=flags.on("--calculate-kv-scales"),
            kv_sharing_fast_prefill=flags.on("--kv-sharing-fast-prefill"),
        ),
        parallel_config=_Given(
            **sizes,
            data_parallel_size=1,  # whether the model has experts is vLLM's to say
            enable_eplb=flags.on("--enable-eplb"),
            use_ubatching=flags.on("--enable-dbo"),
        ),
        speculative_config=_drafting(flags),
        lora_config=_Given() if flags.on("--enable-lora") else None,
    )


def _drafting(flags: ServerFlags) -> _Given | None:
    """How drafts are made; None where vLLM works the method out itself."""
    config = flags.mapping("--speculative-config")
    method = flags.text("--speculative-config.method") or config.get("method")
    return None if method is None else _Given(**{**config, "method": method})
