"""Opens what benchmarks on this machine run on: the model and the prompt."""

from __future__ import annotations

import functools
from itertools import islice, pairwise

from cacheflow.bench.options import DEFAULT_MODEL
from cacheflow.engine.model import LoadedModel, load_model
from cacheflow.engine.random_models import random_weights
from cacheflow.errors import ConfigError
from cacheflow.shapes.hardware import find_model
from cacheflow.types import ModelShape
from cacheflow.workloads.coding import source_text


def open_model(name: str | None, *, shape: str | None, device: str, dtype: str) -> LoadedModel:
    """Load a model (None: the default one), or random weights of a shape; the last one is kept.

    Raises:
        ConfigError: No CUDA device, an unknown shape, or see ``load_model``.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: this machine has no CUDA device that torch can use")
    found = None if shape is None else find_model(shape)  # now: the file may have changed since it was read
    return _open(name or DEFAULT_MODEL, found, device, dtype)


@functools.lru_cache(maxsize=1)
def _open(name: str, shape: ModelShape | None, device: str, dtype: str) -> LoadedModel:
    if shape is not None:
        return random_weights(shape, device=device, dtype=dtype)
    return load_model(name, device=device, dtype=dtype)


def prompt_tokens(model: LoadedModel, num_tokens: int) -> list[int]:
    """Real source text as tokens; for models without a tokenizer, token ids made from its bytes.

    Raises:
        ConfigError: There is not that much text.
    """
    if model.tokenizer is None:
        raw = "".join(source_text()).encode()
        tokens = [(a * 256 + b) % model.shape.vocab_size for a, b in pairwise(raw)]
    else:
        tokens = []
        for part in source_text():
            tokens.extend(model.tokenizer(part)["input_ids"])
            if len(tokens) >= num_tokens:
                break
    if len(tokens) < num_tokens:
        raise ConfigError(f"{num_tokens} prompt tokens asked for, the bundled text has {len(tokens)}")
    return list(islice(tokens, num_tokens))
