"""Loading a model: weights, tokenizer, shape and fingerprint, from a folder or by the bundled model's name.

Nothing here opens a network connection: paths are read from disk, hub names only from what is already in the local
Hugging Face cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cacheflow.engine.attention import ATTENTION_NAME, FLASH3_ATTENTION_NAME
from cacheflow.engine.cuda_attention import AttentionKernel, default_kernel, require_flash3
from cacheflow.engine.families import check_supported, parse_dtype, shape_of
from cacheflow.engine.smollm2 import SMOLLM2_NAME, quiet_transformers, smollm2_folder
from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape
from cacheflow.tensors.fingerprint import weights_fingerprint

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: What it was loaded by.
        module: The transformers causal LM in evaluation mode, its attention ours.
        tokenizer: The transformers tokenizer; None if the folder has none.
        shape: Layers, heads, sizes.
        fingerprint: Hex digest over configuration, dtype and weights; part of every store key.
        max_tokens: Longest sequence the position embeddings allow.
        dtype: Dtype of weights, activations and KV.
        device: Where it runs.
        attention: The kernel of its attention.
    """

    name: str
    module: Any
    tokenizer: Any | None
    shape: ModelShape
    fingerprint: str
    max_tokens: int
    dtype: torch.dtype
    device: torch.device
    attention: AttentionKernel


def load_model(
    path_or_name: str | Path, *, device: str = "cpu", dtype: str | torch.dtype = "bfloat16", flash3: bool = False
) -> LoadedModel:
    """Load a model from a folder (or ``"smollm2-135m"``) onto a device.

    Args:
        path_or_name: Where it is.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of weights, activations and KV.
        flash3: Compute attention by FlashAttention-3 (CUDA, package ``fa3-fwd``).

    Raises:
        ConfigError: The folder has no readable model, the bundled model's package is missing, or see
            ``require_flash3``.
        UnsupportedModelError: The family, rope type, quantisation, device or dtype is not allowed.
    """
    torch_dtype = parse_dtype(dtype)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    name = str(path_or_name)
    folder = str(smollm2_folder()) if name == SMOLLM2_NAME else name
    if Path(folder).is_file():
        raise ConfigError(f"model {name!r} is a file; give a folder with config.json and weights, or {SMOLLM2_NAME!r}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        check_supported(config, device=device, dtype=torch_dtype)
        with quiet_transformers():
            module, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch_dtype,
                attn_implementation=ATTENTION_NAME,
                local_files_only=True,
                device_map=device,
                output_loading_info=True,
            )
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if not Path(folder).exists():
            raise ConfigError(
                f"model {name!r}: there is no such folder; give one with config.json and weights, or {SMOLLM2_NAME!r}"
            ) from error
        raise ConfigError(
            f"model {name!r} cannot be loaded: {error}; give a folder with config.json and weights, or {SMOLLM2_NAME!r}"
        ) from error
    _require_all_weights(name, loading)
    return wrap_module(module, name=Path(name).name, tokenizer=_tokenizer(folder), flash3=flash3)


def _require_all_weights(name: str, loading: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that left weights at random values; transformers only reports it."""
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, loading.get(problem) or ())):
            shown = ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")
            raise ConfigError(f"model {name!r}: its weights are not whole, {len(keys)} {problem}: {shown}")


def wrap_module(
    module: Any,  # noqa: ANN401 -- a transformers causal LM
    *,
    name: str,
    tokenizer: Any | None = None,  # noqa: ANN401 -- a transformers tokenizer
    fingerprint: str | None = None,
    flash3: bool = False,
) -> LoadedModel:
    """Take a transformers causal LM that already lies on its device; switches its attention to ours.

    Args:
        module: The model.
        name: Name for people and profiles.
        tokenizer: Passed through.
        fingerprint: Use this one instead of hashing the weights.
        flash3: Compute attention by FlashAttention-3.

    Raises:
        UnsupportedModelError: See ``check_supported``.
        ConfigError: See ``require_flash3``.
    """
    weight = module.get_input_embeddings().weight
    check_supported(module.config, device=weight.device.type, dtype=weight.dtype)
    module.eval().requires_grad_(False)
    _align(module)
    shape = shape_of(module.config, name=name, dtype=weight.dtype)
    kind = (weight.device.type, weight.dtype, shape.head_dim)
    if flash3:
        require_flash3(*kind)
    # What every layer reads at each call.
    module.config._attn_implementation = FLASH3_ATTENTION_NAME if flash3 else ATTENTION_NAME  # noqa: SLF001
    return LoadedModel(
        name=name,
        module=module,
        tokenizer=tokenizer,
        shape=shape,
        fingerprint=fingerprint or weights_fingerprint(module, module.config.to_dict()),
        max_tokens=int(module.config.max_position_embeddings),
        dtype=weight.dtype,
        device=weight.device,
        attention=AttentionKernel.FLASH3 if flash3 else default_kernel(*kind),
    )


def _align(module: Any) -> None:  # noqa: ANN401 -- a torch module
    """Move weights that do not start on a cache line (safetensors maps files as they are) into memory that does.

    A float32 matrix product rounds differently with the alignment: without this, a model just loaded and the same
    model loaded from another file gave keys that differ in the last bit.
    """
    for weight in module.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % _ALIGNMENT:
            weight.data = weight.data.clone()


def _tokenizer(folder: str) -> Any | None:  # noqa: ANN401 -- a transformers tokenizer
    from transformers import AutoTokenizer

    if Path(folder).is_dir() and not any(Path(folder).glob("tokenizer*")):
        return None  # transformers would make up an empty one
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return None  # a model without a tokenizer serves token ids
