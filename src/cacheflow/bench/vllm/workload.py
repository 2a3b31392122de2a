"""What the servers are asked: a model as a folder that vLLM reads, and real source text as token ids."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheflow.bench.vllm.costs import PrefixSize
from cacheflow.cache_root import cache_root
from cacheflow.engine.smollm2 import SMOLLM2_NAME, quiet_transformers, smollm2_folder
from cacheflow.errors import ConfigError
from cacheflow.hybrid_shape import DELTA_CHUNK, HybridShape
from cacheflow.model_shape import ModelShape
from cacheflow.shapes.hardware import find_model
from cacheflow.shapes.hf_config import shape_of
from cacheflow.workloads.coding import byte_tokens, source_text

TINY_NAME = "tiny-qwen3"
TINY_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 16_384,
}
RANKS_NAME = "ranks-qwen3"
RANKS_SHAPE = {**TINY_SHAPE, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 24,
               "num_key_value_heads": 8}  # fmt: skip
"""Heads for two ranks, layers for stages, and states between stages that are small beside a stage's KV."""
HYBRID_NAME = "hybrid"
HYBRID_SHAPE = {
    **TINY_SHAPE,
    "hidden_size": 512,
    "intermediate_size": 2560,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 5,
    "linear_num_value_heads": 15,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    # vLLM 0.32 runs no Qwen3-Next without experts: the top layer has some, as wide together as the MLP of the others.
    "decoder_sparse_step": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1248,
    "shared_expert_intermediate_size": 64,
}
"""The proportions of Qwen3.6-27B: three of four layers are recurrent, with three value heads for each key head. A
running state is as large as the keys and values of 499 tokens (there 783)."""
MAX_TOKENS = 131_072
"""Of a model of which only the shape is known."""
FAMILY = {TINY_NAME: "qwen3", RANKS_NAME: "qwen3", HYBRID_NAME: "qwen3_next"}
RANDOM_MODELS = {TINY_NAME: TINY_SHAPE, RANKS_NAME: RANKS_SHAPE, HYBRID_NAME: HYBRID_SHAPE}
PROMPT_STRIDE = 611
"""Tokens between the beginnings of two prompts of a run: they share no block, so none is another's cache hit."""


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model folder and what the cost model must know of it.

    Attributes:
        has_weights: Whether they are in the folder; else servers draw random ones.
    """

    folder: Path
    shape: ModelShape
    max_tokens: int
    has_weights: bool = True

    @property
    def is_hybrid(self) -> bool:
        """Whether it has recurrent layers."""
        return isinstance(self.shape, HybridShape)

    def require_block_size(self, num_tokens: int) -> None:
        """Reject KV blocks of so many tokens where vLLM makes larger ones: as large as a running state.

        Raises:
            ConfigError: Says which are not.
        """
        if not isinstance(self.shape, HybridShape):
            return
        least = -(-self.shape.state_bytes // self.shape.kv_bytes_per_token_layer)
        if num_tokens < least or num_tokens % DELTA_CHUNK:
            raise ConfigError(
                f"--chunk {num_tokens}: a chunk of {self.shape.name} is a KV block, which is as large as a running "
                f"state ({least} tokens) and should be a multiple of {DELTA_CHUNK}: give --chunk "
                f"{-(-least // DELTA_CHUNK) * DELTA_CHUNK} or another such"
            )

    def on_record(self, size: PrefixSize, *, bytes_per_s: float, ratio: float) -> dict[str, Any]:
        """What a record says of this model, a prefix of this size and the link to it."""
        return {
            "model": self.shape.name,
            "num_layers": self.shape.num_layers,
            "num_tokens": size.num_tokens,
            "suffix_tokens": size.suffix_tokens,
            "chunk_tokens": size.chunk_tokens,
            "link_bytes_per_s": bytes_per_s,
            "load_compute_ratio": ratio,
            "compute_busy": None,  # a client cannot see it
            "io_busy": None,
        }


def open_model(name: str) -> BenchModel:
    """The model of a run: ``smollm2-135m``, one of ``RANDOM_MODELS``, or a folder.

    Raises:
        ConfigError: The name is unknown, or the model cannot be made or read.
    """
    if name == SMOLLM2_NAME:
        return read_model(smollm2_folder(), name)
    if name in RANDOM_MODELS:
        return read_model(random_folder(name), name)
    if not Path(name).is_dir():
        known = ", ".join((SMOLLM2_NAME, *RANDOM_MODELS))
        raise ConfigError(f"--model {name!r} is unknown; known: {known}, or a model folder")
    return read_model(Path(name), Path(name).name)


def open_shape(name_or_file: str, folder: Path) -> BenchModel:
    """A model of a known shape, or of a ``config.json``, of which servers draw random weights.

    Args:
        name_or_file: See ``cacheflow plan --model``.
        folder: Gets what a server reads of it: a configuration, and a tokenizer of made-up words.

    Raises:
        ConfigError: The shape is unknown, or has recurrent layers.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from cacheflow.engine.random_models import config_of

    shape = find_model(name_or_file)
    if isinstance(shape, HybridShape):
        raise ConfigError(f"--shape {name_or_file} has recurrent layers: give its folder with weights as --model")
    config = config_of(shape, max_tokens=MAX_TOKENS)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    _write_tokenizer(folder, vocab_size=shape.vocab_size)
    return BenchModel(folder, shape, MAX_TOKENS, has_weights=False)


def read_model(folder: Path, name: str) -> BenchModel:
    """Read a model folder's configuration.

    Raises:
        ConfigError: The folder has none, or one that lacks a size.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if name == HYBRID_NAME:
            config["num_experts"] = 0
        return BenchModel(folder, shape_of(config, name=name), int(config["max_position_embeddings"]))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model folder {folder} cannot be used: {error}") from error


def random_folder(name: str) -> Path:
    """Folder with a small random Qwen3 or Qwen3-Next, attention far from uniform; made on the first call."""
    folder, shape = cache_root() / "models" / name, RANDOM_MODELS[name]
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoConfig

    from cacheflow.engine.random_models import random_module

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        config = AutoConfig.for_model(FAMILY[name], sliding_window=None, tie_word_embeddings=False, **shape)
        with quiet_transformers():
            random_module(config, dtype="bfloat16").save_pretrained(staging)
        _write_tokenizer(staging, vocab_size=shape["vocab_size"])
        staging.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def prompt_tokens(model: BenchModel, num_tokens: int) -> list[int]:
    """Real source text as the model's tokens; for random weights, ids made from its bytes.

    Raises:
        ConfigError: There is not that much text, or the folder has no ``tokenizer.json``.
    """
    if not model.has_weights or model.folder.name in RANDOM_MODELS:
        tokens = byte_tokens(model.shape.vocab_size)
    else:
        tokens = _tokenised(model.folder / "tokenizer.json", num_tokens)
    if len(tokens) < num_tokens:
        raise ConfigError(f"{num_tokens} prompt tokens asked for, the bundled text has {len(tokens)}")
    return tokens[:num_tokens]


def prompt(tokens: Sequence[int], index: int, num_tokens: int) -> list[int]:
    """The ``index``-th prompt of a run, cut from one long text; it shares no block with its neighbours.

    Raises:
        ConfigError: The text is too short for it.
    """
    start = index * PROMPT_STRIDE
    if start + num_tokens > len(tokens):
        raise ConfigError(f"prompt {index} of {num_tokens} tokens needs {start + num_tokens}, there are {len(tokens)}")
    return list(tokens[start : start + num_tokens])


def _tokenised(path: Path, num_tokens: int) -> list[int]:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ConfigError(f"{path} is missing: the model folder needs its tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    tokens: list[int] = []
    for part in source_text():
        tokens.extend(tokenizer.encode(part, add_special_tokens=False).ids)
        if len(tokens) >= num_tokens:
            break
    return tokens


def _write_tokenizer(folder: Path, *, vocab_size: int) -> None:
    """A tokenizer of made-up words, because vLLM's server wants one; prompts are sent as ids."""
    vocab = {f"w{index}": index for index in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    whole: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "model_max_length": 16_384}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
