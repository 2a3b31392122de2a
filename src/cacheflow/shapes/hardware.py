"""Model shapes and GPU peaks that ``cacheflow plan`` knows by name, and files for those it does not.

Source of the tables: model configurations and system files of ai-dynamo/aiconfigurator at commit 095f58a5 (nominal
peaks, best GEMM measured); vocabulary sizes from the models' published ``config.json``. Hybrid models: their model
cards (Qwen/Qwen3.6-27B, Qwen/Qwen3.6-35B-A3B), the defaults of transformers 5.23 (Qwen3-Next-80B-A3B, Qwen3.5-9B), and
the published ``config.json`` of nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16, where ``intermediate_size`` here is
``moe_intermediate_size`` there and the layers are ``hybrid_override_pattern``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from cacheflow.errors import ConfigError
from cacheflow.hybrid_shape import HybridShape, Mamba2Shape
from cacheflow.json_text import parse_json, read_text
from cacheflow.model_shape import ModelShape
from cacheflow.shapes.hf_config import HYBRID_KEYS, MAMBA2_KEYS, is_hf_config, shape_of
from cacheflow.shapes.roofline import GpuPeaks

T = TypeVar("T", ModelShape, GpuPeaks)

GREATEST = {
    "num_layers": 10_000,
    "num_q_heads": 100_000,
    "num_kv_heads": 100_000,
    "head_dim": 100_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 1_000_000_000,
    "num_experts": 1_000_000,
    "num_active_experts": 1_000_000,
    "sliding_window": 10**12,
    "kv_token_bytes": 10**9,
    "layers_per_attention": 10_000,
    "num_state_k_heads": 100_000,
    "num_state_v_heads": 100_000,
    "state_k_dim": 100_000,
    "state_v_dim": 100_000,
    "conv_kernel": 100_000,
    "num_state_heads": 100_000,
    "state_head_dim": 100_000,
    "state_dim": 100_000,
    "num_state_groups": 100_000,
    "shared_intermediate_size": 10_000_000,
    "memory_bytes": 10**18,
}
"""No model and no GPU has more, by field of a file; far more would not fit the numbers we calculate with."""
LEAST_RATE, GREATEST_RATE = 1.0, 1e24
"""The same for rates of a GPU, a second."""
HF_FILE = "config.json"
MODEL_FILES = "a Hugging Face config.json, a folder that holds one, or a .json file of a shape"
"""What a model can be given as, besides a known name."""
NO_NUMBERS = ("name", "dtype", "state_dtype", "gated_attention", "pattern")
OPTIONAL = ("sliding_window", "kv_token_bytes")

MODEL_SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape(
            name="Llama-3.1-8B", num_layers=32, hidden_size=4096, num_q_heads=32, num_kv_heads=8, head_dim=128,
            intermediate_size=14336, vocab_size=128256,
        ),
        ModelShape(
            name="Llama-3.1-70B", num_layers=80, hidden_size=8192, num_q_heads=64, num_kv_heads=8, head_dim=128,
            intermediate_size=28672, vocab_size=128256,
        ),
        ModelShape(
            name="Qwen3-8B", num_layers=36, hidden_size=4096, num_q_heads=32, num_kv_heads=8, head_dim=128,
            intermediate_size=12288, vocab_size=151936,
        ),
        ModelShape(
            name="Qwen3-32B", num_layers=64, hidden_size=5120, num_q_heads=64, num_kv_heads=8, head_dim=128,
            intermediate_size=25600, vocab_size=151936,
        ),
        ModelShape(
            name="Qwen3-30B-A3B", num_layers=48, hidden_size=2048, num_q_heads=32, num_kv_heads=4, head_dim=128,
            intermediate_size=768, vocab_size=151936, num_experts=128, num_active_experts=8,
        ),
        HybridShape(
            name="Qwen3-Next-80B-A3B", num_layers=48, hidden_size=2048, num_q_heads=16, num_kv_heads=2, head_dim=256,
            intermediate_size=512, vocab_size=151936, num_experts=512, num_active_experts=10,
            shared_intermediate_size=512, layers_per_attention=4, num_state_k_heads=16, num_state_v_heads=32,
            state_k_dim=128, state_v_dim=128, conv_kernel=4,
        ),
        HybridShape(
            name="Qwen3.5-9B", num_layers=32, hidden_size=4096, num_q_heads=16, num_kv_heads=4, head_dim=256,
            intermediate_size=12288, vocab_size=248320, layers_per_attention=4, num_state_k_heads=16,
            num_state_v_heads=32, state_k_dim=128, state_v_dim=128, conv_kernel=4,
        ),
        HybridShape(
            name="Qwen3.6-27B", num_layers=64, hidden_size=5120, num_q_heads=24, num_kv_heads=4, head_dim=256,
            intermediate_size=17408, vocab_size=248320, layers_per_attention=4, num_state_k_heads=16,
            num_state_v_heads=48, state_k_dim=128, state_v_dim=128, conv_kernel=4,
        ),
        HybridShape(
            name="Qwen3.6-35B-A3B", num_layers=40, hidden_size=2048, num_q_heads=16, num_kv_heads=2, head_dim=256,
            intermediate_size=512, vocab_size=248320, num_experts=256, num_active_experts=8,
            shared_intermediate_size=512, layers_per_attention=4, num_state_k_heads=16, num_state_v_heads=32,
            state_k_dim=128, state_v_dim=128, conv_kernel=4,
        ),
        Mamba2Shape(
            name="Nemotron-3-Nano-30B-A3B", num_layers=6, hidden_size=2688, num_q_heads=32, num_kv_heads=2,
            head_dim=128, intermediate_size=1856, vocab_size=131072, num_experts=128, num_active_experts=6,
            shared_intermediate_size=3712, pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            num_state_heads=64, state_head_dim=64, state_dim=128, num_state_groups=8, conv_kernel=4,
        ),
    )
}  # fmt: skip

UNSUPPORTED_MODELS: dict[str, str] = {
    "DeepSeek-V3": "it caches a compressed latent (MLA) instead of keys and values",
}
"""Models people ask for whose cache a grid of equal cells does not describe; by name, the reason."""

GPUS: dict[str, GpuPeaks] = {
    name: GpuPeaks(
        name=name,
        memory_bytes=memory_gb * 10**9,
        memory_bytes_per_s=memory_gb_per_s * 1e9,
        dense_flops_per_s=gemm_tflops * 1e12,
        pcie_bytes_per_s=pcie_gb_per_s * 1e9,
    )
    for name, memory_gb, memory_gb_per_s, gemm_tflops, pcie_gb_per_s in (
        ("L40S", 46, 864.0, 297.0, 32.0),
        ("A100", 80, 2039.0, 299.0, 32.0),
        ("H100", 80, 3350.0, 956.0, 64.0),
        ("H200", 141, 4800.0, 940.0, 64.0),
        ("B200", 180, 7700.0, 2102.0, 64.0),
    )
}
"""SXM boards where there are several; bf16 rates are the best GEMM measured, not the data sheet's peak."""


def find_model(name_or_file: str) -> ModelShape:
    """The shape of a known model, of a Hugging Face ``config.json`` or a folder with one, or of a file of a shape.

    Args:
        name_or_file: Name, or path; the file of a shape has the fields of ``ModelShape``.

    Raises:
        ConfigError: The model is neither known nor a file (known ones are listed), its cache is not supported, or
            the file is malformed.
    """
    for name, reason in UNSUPPORTED_MODELS.items():
        if name_or_file.lower() == name.lower():
            raise ConfigError(f"model {name!r} is not supported yet: {reason}")
    return _find("model", name_or_file, MODEL_SHAPES, ModelShape)


def find_gpu(name_or_file: str) -> GpuPeaks:
    """The peaks of a known GPU, or of a JSON file with the fields of ``GpuPeaks``.

    Raises:
        ConfigError: The GPU is neither known nor a file (known ones are listed), or the file is malformed.
    """
    return _find("gpu", name_or_file, GPUS, GpuPeaks)


def _find(kind: str, name_or_file: str, known: Mapping[str, T], cls: type[T]) -> T:
    by_lower = {name.lower(): value for name, value in known.items()}
    if (value := by_lower.get(name_or_file.lower())) is not None:
        return value
    path = Path(name_or_file)
    if cls is ModelShape and path.suffix != ".json" and path.is_dir():
        path = path / HF_FILE
    if path.suffix == ".json":
        return _read(kind, path, cls)
    files = MODEL_FILES if cls is ModelShape else "a .json file"
    raise ConfigError(f"unknown {kind} {name_or_file!r}; known: {', '.join(known)}; or give {files}")


def _read(kind: str, path: Path, cls: type[T]) -> T:
    try:
        values = parse_json(read_text(path))
    except ConfigError as error:
        raise ConfigError(f"{kind} file {path} cannot be read: {error}") from error
    if cls is ModelShape and is_hf_config(values):
        return _of_hf_config(path, values)
    allowed = {field.name: field.default is MISSING for field in fields(cls)}
    if not isinstance(values, dict) or values.keys() - allowed.keys():
        raise ConfigError(f"{kind} file {path} must be one JSON object with the fields {', '.join(allowed)}")
    if missing := [name for name, needed in allowed.items() if needed and name not in values]:
        raise ConfigError(f"{kind} file {path} lacks {', '.join(missing)}")
    if not isinstance(values["name"], str) or not values["name"].strip():
        raise ConfigError(f"{kind} file {path}: name is {values['name']!r}, must be a text that is not empty")
    for key, value in values.items():
        _check_field(f"{kind} file {path}: {key}", key, value)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{kind} file {path}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"{kind} file {path} holds a value of the wrong type: {error}") from error


def _of_hf_config(path: Path, values: Mapping[str, Any]) -> ModelShape:
    whole = path.resolve()
    try:
        shape = shape_of(values, name=(whole.parent.name if path.name == HF_FILE else "") or path.stem)
    except ConfigError as error:
        raise ConfigError(f"model file {path}: {error}") from error
    for field in fields(shape):
        keys = MAMBA2_KEYS if isinstance(shape, Mamba2Shape) else HYBRID_KEYS
        key = keys.get(field.name, field.name)
        _check_field(f"model file {path}: {key}", field.name, getattr(shape, field.name))
    return shape


def _check_field(name: str, key: str, value: object) -> None:
    """Refuse what is no number, or none to calculate with; the class checks what else it must be."""
    if key in NO_NUMBERS or (value is None and key in OPTIONAL):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}, must be a number")
    if key in GREATEST and not abs(value) <= GREATEST[key]:
        raise ConfigError(f"{name} must be at most {GREATEST[key]:,}")
    if key not in GREATEST and not LEAST_RATE <= value <= GREATEST_RATE:
        raise ConfigError(f"{name} must be above 0: at least {LEAST_RATE:g}, and at most {GREATEST_RATE:g}")
