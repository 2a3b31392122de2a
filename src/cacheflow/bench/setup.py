"""What benchmarks of the embedded engine start from: the model, the prompt, the saved prefix."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from cacheflow.bench.environment import available_memory
from cacheflow.bench.options import DEFAULT_MODEL, EmbeddedFlags
from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.identity import bits_identity, state_identity
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.model import LoadedModel, load_model
from cacheflow.engine.random_models import random_weights
from cacheflow.engine.saver import PrefixSaver
from cacheflow.errors import ConfigError, StoreError
from cacheflow.model_shape import ModelShape
from cacheflow.shapes.hardware import find_model
from cacheflow.stores.base import Store
from cacheflow.stores.keys import Namespace
from cacheflow.workloads.coding import byte_tokens, source_text

OBJECT_ROOM_BYTES = 8192
"""Room for what a store keeps beside each object's bytes."""


def open_model(flags: EmbeddedFlags) -> LoadedModel:
    """Load the model that flags name, or random weights of a shape; the last one is kept.

    Raises:
        ConfigError: No CUDA device, an unknown shape, or see ``load_model``.
    """
    if flags.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: this machine has no CUDA device that torch can use")
    shape = None if flags.shape is None else find_model(flags.shape)  # now: the file may have changed since
    return _open(flags.model or DEFAULT_MODEL, shape, flags.device, flags.dtype, flags.flash3)


@functools.lru_cache(maxsize=1)
def _open(name: str, shape: ModelShape | None, device: str, dtype: str, flash3: bool) -> LoadedModel:
    if shape is not None:
        if device == "cpu":
            _require_memory(shape)
        return random_weights(shape, device=device, dtype=dtype, flash3=flash3)
    return load_model(name, device=device, dtype=dtype, flash3=flash3)


def _require_memory(shape: ModelShape) -> None:
    needed, free = shape.weight_bytes, available_memory()
    if needed > free:
        raise ConfigError(
            f"the weights of {shape.name} take {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB of memory are free: "
            "take a smaller shape, such as a config.json with fewer layers"
        )


def prompt_tokens(model: LoadedModel, num_tokens: int) -> list[int]:
    """Real source text as tokens; for models without a tokenizer, token ids made from its bytes.

    Raises:
        ConfigError: There is not that much text.
    """
    tokens: list[int] = []
    if model.tokenizer is None:
        tokens = byte_tokens(model.shape.vocab_size)
    else:
        for part in source_text():
            tokens.extend(model.tokenizer(part)["input_ids"])
            if len(tokens) >= num_tokens:
                break
    if len(tokens) < num_tokens:
        raise ConfigError(f"{num_tokens} prompt tokens asked for, the bundled text has {len(tokens)}")
    return tokens[:num_tokens]


def namespace_of(model: LoadedModel, chunk_tokens: int) -> Namespace:
    """Where a model keeps prefixes in a store: apart from other weights, kernels and numbers of threads."""
    return Namespace(
        weights_fingerprint=model.fingerprint,
        dtype=model.shape.dtype,
        chunk_tokens=chunk_tokens,
        extra=(*bits_identity(model), *state_identity(model.shape)),
    )


def room_bytes(shape: ModelShape, num_tokens: int, num_objects: int) -> int:
    """Capacity of a memory store that holds so many tokens in so many objects, and a checkpoint of a hybrid."""
    kv_bytes = num_tokens * shape.kv_bytes_per_token + num_objects * OBJECT_ROOM_BYTES + (1 << 20)
    if not shape.checkpoint_bytes:
        return kv_bytes
    return kv_bytes + shape.checkpoint_bytes + shape.num_rows * OBJECT_ROOM_BYTES


def save_prefix(
    store: Store, kv: KVBuffer, geometry: CellGeometry, namespace: str, chain_hashes: Sequence[bytes]
) -> None:
    """Save every cell of a prefix, and wait for it.

    Raises:
        StoreError: Not every cell could be written.
    """
    saver = PrefixSaver(store, geometry=geometry, namespace=namespace, chain_hashes=chain_hashes)
    saver.save_prefix(kv)
    report = saver.wait()
    if not report.complete:
        grid = geometry.grid
        raise StoreError(f"{report.num_failed} of {grid.num_chunks * grid.num_blocks} cells could not be saved")
