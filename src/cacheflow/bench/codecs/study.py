"""One model, and what it says after keys and values that went through a codec.

Shapes: ``L`` attention layers, ``N`` tokens of the prefix, ``M`` positions after it, ``H`` kv heads, ``D`` head_dim,
``V`` vocabulary; index 0 of the axis of size 2 is keys, 1 is values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from cacheflow.bench.codecs.setting import CodecOptions
from cacheflow.bench.records.base import Environment
from cacheflow.bench.records.codecs import CodecRecord
from cacheflow.bench.setup import prompt_tokens
from cacheflow.bench.suite import OnRun
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.model import LoadedModel
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.saver import TOKEN_AXES
from cacheflow.errors import ConfigError
from cacheflow.stores.codec import Codec, TensorForm
from cacheflow.stores.codecs import Coding, codec_named
from cacheflow.stores.keys import ObjectKind

OTHER_CHUNKS = "other chunks"
"""For comparison: exact keys and values, computed in chunks three quarters as long."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A part of the text, and the codecs that take turns on it."""

    number: int
    policies: tuple[str, ...]


class _Answer(NamedTuple):
    """Keys and values ``[L, 2, N, H, D]`` of the prefix, and the logits ``[M, V]`` after them."""

    kv_L2NHD: torch.Tensor
    logits_MV: torch.Tensor


class _Stored(NamedTuple):
    """Bytes that are stored, and the CPU seconds that encoding and decoding it took; 0 where nothing was encoded."""

    num_bytes: int
    encode_s: float = 0.0
    decode_s: float = 0.0


class CodecStudy:
    """A model and its excerpts."""

    def __init__(
        self, model: LoadedModel, options: CodecOptions, environment: Environment, *, num_excerpts: int
    ) -> None:
        """Read the text.

        Raises:
            ConfigError: The model does not take so many tokens, or the bundled text is shorter.
        """
        self._model, self._options, self._environment = model, options, environment
        self._num_tokens = options.prefix_tokens + options.suffix_tokens
        if self._num_tokens > model.max_tokens:
            raise ConfigError(
                f"--tokens {options.prefix_tokens} and --suffix {options.suffix_tokens} are more than the "
                f"{model.max_tokens} tokens that {model.name} takes"
            )
        self._tokens = prompt_tokens(model, self._num_tokens * num_excerpts)
        self._runner = LayerRunner(model)

    def run(self, excerpt: Excerpt, on_run: OnRun) -> Iterator[CodecRecord]:
        """Compute the prefix of an excerpt, and compare what follows after each codec with what follows without."""
        begin = excerpt.number * self._num_tokens
        tokens = self._tokens[begin : begin + self._num_tokens]
        kv = self._prefill(tokens, self._options.chunk_tokens)
        exact = _Answer(self._prefix_of(kv), self._logits(tokens, kv))
        for name in excerpt.policies:
            on_run(name)
            if name == OTHER_CHUNKS:
                lossless, stored = False, _Stored(exact.kv_L2NHD.nbytes)
                again = self._prefill(tokens, 3 * self._options.chunk_tokens // 4)
                other = _Answer(self._prefix_of(again), self._logits(tokens, again))
            else:
                codec = codec_named(name)
                lossless = not codec.lossy
                coded_L2NHD, stored = self._through(codec, exact.kv_L2NHD)
                kv.kv_L2THD[:, :, : self._options.prefix_tokens].copy_(coded_L2NHD)
                other = _Answer(coded_L2NHD, self._logits(tokens, kv))
            yield self._record(name, excerpt.number, lossless, exact, other, stored)

    def _prefill(self, tokens: Sequence[int], chunk_tokens: int) -> KVBuffer:
        num_tokens = self._options.prefix_tokens
        kv = self._runner.new_kv(self._num_tokens)
        self._runner.prefill(tokens[:num_tokens], (*range(chunk_tokens, num_tokens, chunk_tokens), num_tokens), kv)
        return kv

    def _prefix_of(self, kv: KVBuffer) -> torch.Tensor:
        return kv.kv_L2THD[:, :, : self._options.prefix_tokens].clone()

    def _logits(self, tokens: Sequence[int], kv: KVBuffer) -> torch.Tensor:
        """``[M, V]``: of the positions after the prefix, each fed with the text as it goes on."""
        states = self._runner.new_states()
        if states is not None and kv.checkpoint is not None:
            states.copy_from(kv.checkpoint)
        positions = range(self._options.prefix_tokens, self._num_tokens)
        return torch.stack([self._runner.decode_step(tokens[each], each, kv, states) for each in positions])

    def _through(self, codec: Codec, exact_L2NHD: torch.Tensor) -> tuple[torch.Tensor, _Stored]:
        """Encode and decode every cell on this thread, as a store's threads do."""
        options, dtype, coding = self._options, self._model.shape.dtype, Coding(codec)
        coded_L2NHD = torch.empty_like(exact_L2NHD)
        stored_bytes, encode_s, decode_s = 0, 0.0, 0.0
        for layer in range(0, len(exact_L2NHD), options.layers_per_block):
            layers = slice(layer, layer + options.layers_per_block)
            for token in range(0, options.prefix_tokens, options.chunk_tokens):
                where = layers, slice(None), slice(token, token + options.chunk_tokens)
                cell = exact_L2NHD[where].contiguous()
                payload = cell.view(torch.uint8).view(-1).numpy()
                form = TensorForm(tuple(cell.shape), dtype, TOKEN_AXES)
                began_s = time.thread_time()
                parts, encoding = coding.encode(ObjectKind.KV, [payload.data], form)
                encode_s += time.thread_time() - began_s
                stored_bytes += sum(each.nbytes for each in parts)
                decoded = payload
                if encoding is not None:
                    encoded, decoded = (
                        np.concatenate([np.frombuffer(each, np.uint8) for each in parts]),
                        np.zeros_like(payload),
                    )
                    began_s = time.thread_time()
                    codec.decode(encoded, form, decoded)
                    decode_s += time.thread_time() - began_s
                coded_L2NHD[where] = torch.from_numpy(decoded).view(cell.dtype).view(cell.shape)
        return coded_L2NHD, _Stored(stored_bytes, encode_s, decode_s)

    def _record(
        self,
        name: str,
        excerpt: int,
        lossless: bool,
        exact: _Answer,
        other: _Answer,
        stored: _Stored,
    ) -> CodecRecord:
        raw_bytes = exact.kv_L2NHD.nbytes
        keys, values = (_errors(exact.kv_L2NHD[:, each], other.kv_L2NHD[:, each]) for each in (0, 1))
        return CodecRecord(
            codec=name,
            lossless=lossless,
            model=self._model.shape.name,
            dtype=self._model.shape.dtype,
            excerpt=excerpt,
            **asdict(self._options),
            raw_bytes=raw_bytes,
            stored_bytes=stored.num_bytes,
            encode_bytes_per_s=raw_bytes / stored.encode_s if stored.encode_s else None,
            decode_bytes_per_s=raw_bytes / stored.decode_s if stored.decode_s else None,
            keys_error=keys[0],
            values_error=values[0],
            keys_largest_error=keys[1],
            values_largest_error=values[1],
            same_tokens=float((other.logits_MV.argmax(-1) == exact.logits_MV.argmax(-1)).double().mean()),
            divergence=_divergence(exact.logits_MV, other.logits_MV),
            environment=self._environment,
            fingerprint=self._model.fingerprint,
        )


def _errors(exact: torch.Tensor, coded: torch.Tensor) -> tuple[float, float]:
    """Norm of the error over that of what is exact, and the largest error over the largest number."""
    wanted, error = exact.double(), coded.double() - exact.double()
    return float(error.norm() / wanted.norm()), float(error.abs().max() / wanted.abs().max())


def _divergence(exact_MV: torch.Tensor, logits_MV: torch.Tensor) -> float:
    exact, other = exact_MV.double().log_softmax(-1), logits_MV.double().log_softmax(-1)
    return max(0.0, float((exact.exp() * (exact - other)).sum(-1).mean()))
