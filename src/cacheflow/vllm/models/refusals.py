"""What CacheFlow refuses to serve inside vLLM, and why: each reason is a sentence for the user.

Reasons come in two kinds. Those of ``load_refusals`` have no way round but what they name themselves; with those of
``configured_refusals`` KV can still be saved and loaded, which is what ``unsupported_models=load_only`` does.
Imports neither vLLM nor torch, so that ``cacheflow serve`` says the same before vLLM starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cacheflow.errors import UnsupportedModelError
from cacheflow.shapes.hf_config import CacheKind
from cacheflow.vllm.models.kv_groups import DELTA_NET, MAMBA2, is_state_spec, kind_of_states

Config = Any
"""vLLM's configuration objects, whose types this package does not rely on."""

DRAFTERS = ("ngram", "suffix", "eagle", "eagle3", "mtp")
"""How vLLM may draft: from the tokens alone, or with a model whose keys and values are restored as one layer more."""
SUPPORTED_SPECS = ("FullAttentionSpec", "MLAAttentionSpec")
"""vLLM's KV cache specs that are restored: keys and values, or one latent, of every token."""
KDA_ARCHITECTURES = ("BailingMoeV3", "Glm5Next", "KimiK3", "KimiLinear")
"""How the names of architectures with Kimi Delta Attention begin: vLLM counts their states as Gated DeltaNet's."""
DRAFTS_BESIDE_STATES = (
    "it drafts, with running states for every draft: restoration was never tried with those; serve it without drafts"
)
STATES_AT_BLOCK_ENDS, NO_STATES_KEPT = "align", "none"
"""vLLM's modes (``mamba_cache_mode``) of keeping running states with its prefix caching, and without."""
_KIND_OF_SPEC = {
    "SlidingWindowSpec": CacheKind.WINDOW,
}
"""vLLM's KV cache specs that a user knows by another name."""


def require_loadable(reasons: Sequence[str]) -> None:
    """Pass if there are no ``load_refusals``.

    Raises:
        UnsupportedModelError: There are; lists all of them.
    """
    if reasons:
        raise UnsupportedModelError("CacheFlow cannot restore this engine's KV cache: " + "; ".join(reasons))


def require_recomputable(reasons: Sequence[str], *, load_only: bool) -> None:
    """Pass if nothing stands against recomputing, or if loading alone is what the user asked for.

    Raises:
        UnsupportedModelError: There are; lists all of them and says how to load alone.
    """
    if reasons and not load_only:
        raise UnsupportedModelError(
            f"CacheFlow cannot recompute in this engine: {'; '.join(reasons)}. unsupported_models=load_only "
            "(--unsupported-models load_only) restores by loading alone"
        )


def cache_refusal(kind: CacheKind, *, spec: str = "") -> str:
    """Why a KV cache of this kind, vLLM's ``spec`` where that is known, is not restored; empty where it may be."""
    if kind.has_states or kind in (
        CacheKind.FULL,
        CacheKind.MIXED,
        CacheKind.LATENT,
    ):  # vLLM keeps all tokens where only some layers have a window
        return ""
    way_out = ""
    if kind is CacheKind.WINDOW:
        way_out = "; vLLM's --disable-sliding-window keeps every token, of prompts up to the window"
    if kind is CacheKind.RECURRENT:
        way_out = "; of those Gated DeltaNet and Mamba-2 are restored: serve it without CacheFlow"
    if kind is CacheKind.KIMI_DELTA:
        way_out = "; vLLM has its kernels for GPUs alone, where restoring them was never tried"
    return f"the model keeps {kind.value}{f' ({spec})' if spec else ''}{way_out}"


def load_refusals(vllm_config: Config, kv_cache_config: Config) -> list[str]:
    """Why blocks cannot even be saved and loaded; empty when they can. Works in the scheduler and in workers."""
    reasons = [*_cache_refusals(kv_cache_config), *engine_refusals(vllm_config)]
    recurrent = any(is_state_spec(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups)
    if str(getattr(vllm_config.model_config, "architecture", "")).startswith(KDA_ARCHITECTURES):
        reasons.append(cache_refusal(CacheKind.KIMI_DELTA))
    if recurrent and vllm_config.speculative_config is not None:
        reasons.append(DRAFTS_BESIDE_STATES)
    return reasons


def _cache_refusals(kv_cache_config: Config) -> Iterator[str]:
    groups = kv_cache_config.kv_cache_groups
    states = [group.kv_cache_spec for group in groups if is_state_spec(group.kv_cache_spec)]
    others = [group for group in groups if not is_state_spec(group.kv_cache_spec)]
    yield from dict.fromkeys(reason for spec in states for reason in _state_refusals(spec))
    if len(others) != 1:
        yield (
            f"its layers keep keys and values in {len(others)} groups of KV cache, one is supported: beside "
            "CacheFlowConnector vLLM makes one group of layers with windows and without"
        )
        return
    for spec in dict.fromkeys(type(spec) for group in others for spec in layer_specs(group.kv_cache_spec)):
        if spec.__name__ not in SUPPORTED_SPECS:
            kind = _KIND_OF_SPEC.get(spec.__name__)
            unnamed = f"its KV cache is of kind {spec.__name__}; {' and '.join(SUPPORTED_SPECS)} are supported"
            yield unnamed if kind is None else cache_refusal(kind, spec=spec.__name__)


def _state_refusals(spec: Any) -> Iterator[str]:  # noqa: ANN401 -- vLLM's MambaSpec
    """Why running states are not restored."""
    kind = kind_of_states(spec)
    if kind not in (DELTA_NET, MAMBA2):
        supported = f"{DELTA_NET} and {MAMBA2}"
        yield f"the model keeps {CacheKind.RECURRENT.value} (of kind {kind}); of those {supported} are supported"
    if spec.mamba_cache_mode != STATES_AT_BLOCK_ENDS:
        yield states_elsewhere(spec.mamba_cache_mode)


def states_elsewhere(mode: str) -> str:
    """Why running states that vLLM keeps in another mode than ``STATES_AT_BLOCK_ENDS`` are not restored."""
    return (
        f"running states are kept in mode {mode!r}, not where blocks end ({STATES_AT_BLOCK_ENDS!r}): leave vLLM's "
        "prefix caching on (--enable-prefix-caching)"
    )


def layer_specs(kv_cache_spec: Any) -> list[Any]:  # noqa: ANN401 -- vLLM's KVCacheSpec
    """What the layers of a group keep: one specification, or one of each where their heads differ."""
    return list(getattr(kv_cache_spec, "kv_cache_specs", {}).values()) or [kv_cache_spec]


def engine_refusals(vllm_config: Config) -> Iterator[str]:
    """Why an engine that is configured like this restores nothing, whatever its KV cache."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if getattr(model, "runner_type", "generate") == "pooling":
        yield (
            "it is a pooling engine (embedding, classifying, scoring): each prompt is computed once and no reply "
            "follows, so there is nothing to restore; serve it without CacheFlow"
        )
    if model.is_encoder_decoder:
        yield "it is an encoder-decoder model: cross-attention KV depends on more than the tokens"
    if vllm_config.speculative_config is not None:
        yield from _drafter_refusals(str(vllm_config.speculative_config.method))
    if getattr(cache, "use_replayssm", False):
        yield "use_replayssm is on: running states are then kept as what it takes to compute them again"
    if getattr(cache, "calculate_kv_scales", False):
        yield "calculate_kv_scales is on: quantised KV then depends on what was served before"
    if getattr(cache, "kv_sharing_fast_prefill", False):
        yield "kv_sharing_fast_prefill is on: prefill leaves out layers"
    for key in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, key, 1) > 1:
            yield f"{key} is {getattr(parallel, key)}: a rank's KV blocks then hold other tokens than their ids say"


def _drafter_refusals(method: str) -> Iterator[str]:
    if method in DRAFTERS:
        return
    yield (
        f"speculative decoding drafts by {method!r}, with which restoration was never tried; "
        f"{', '.join(DRAFTERS[:-1])} and {DRAFTERS[-1]} work"
    )


def configured_refusals(vllm_config: Config) -> Iterator[str]:
    """Why an engine that is configured like this is not recomputed in, whatever its model."""
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1 and getattr(parallel, "is_moe_model", None) is not False:
        yield "data parallelism with experts: every forward is a collective of all replicas"
    if getattr(parallel, "enable_eplb", False):
        yield "expert load balancing is on: experts move between forwards"
    if getattr(parallel, "use_ubatching", False):
        yield "dual-batch overlap is on: forwards are split into micro-batches"
