"""Runs chunks of tokens through ranges of decoder layers, straight on the model's own layer objects.

Shapes: ``n`` tokens of a chunk, ``C`` hidden_size, ``V`` vocabulary. Batch is always 1.

The result of a chunk depends on its tokens, its ends, the keys and values before it and, in recurrent layers, the state
before it, never on the order in which cells were restored. Every call runs on the calling thread (and device stream)
without synchronising.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cacheflow.engine.kv_buffer import ChunkCache, KeysAndValuesWritten, KVBuffer
from cacheflow.engine.model import LoadedModel
from cacheflow.engine.running_states import RunningStates
from cacheflow.errors import ConfigError, PromptError
from cacheflow.hybrid_shape import HybridShape
from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.tensors.streams import DeviceStreams, streams_of

Rope = tuple[torch.Tensor, torch.Tensor]


class LayerRunner:
    """Block-wise forward of one model; stateless between calls, so one runner serves many sequences in turn.

    Attributes:
        model: The model.
        lane: Copies into and out of its KV buffers while it computes; None on the CPU.
    """

    def __init__(self, model: LoadedModel, *, streams: DeviceStreams | None = None) -> None:
        """Take the layers of a loaded model; ``streams`` of its device for None."""
        body: Any = model.module.model
        streams = streams or streams_of(model.device)
        self.lane = None if streams is None else CopyLane(streams)
        self.model = model
        self.num_layers = model.shape.num_layers
        self._layers: list[Any] = list(body.layers)
        self._embed: Any = body.embed_tokens
        self._rotary: Any = body.rotary_emb
        self._norm: Any = body.norm
        self._lm_head: Any = model.module.lm_head

    def new_kv(self, capacity: int) -> KVBuffer:
        """A poisoned KV buffer of this model's shape, dtype and device."""
        model = self.model
        return KVBuffer(model.shape, capacity=capacity, dtype=model.dtype, device=model.device, lane=self.lane)

    def new_states(self) -> RunningStates | None:
        """Poisoned states of the model's recurrent layers; None where it has none."""
        shape = self.model.shape
        return RunningStates(shape, dtype=self.model.dtype) if isinstance(shape, HybridShape) else None

    def token_tensor(self, tokens: Sequence[int]) -> torch.Tensor:
        """Token ids as ``[1, len]`` on the model's device.

        Raises:
            PromptError: No tokens, more than the model allows, or an id outside the vocabulary.
        """
        vocab, limit = self.model.shape.vocab_size, self.model.max_tokens
        if not 0 < len(tokens) <= limit:
            raise PromptError(f"prompt has {len(tokens)} tokens; 1 to {limit} are allowed")
        if not (min(tokens) >= 0 and max(tokens) < vocab):
            raise PromptError(f"token ids span {min(tokens)} to {max(tokens)}; the vocabulary is 0 to {vocab - 1}")
        return torch.tensor([list(tokens)], dtype=torch.long, device=self.model.device)

    def embed(self, tokens_1n: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[1, n, C]`` below the first layer."""
        with torch.inference_mode():
            return self._embed(tokens_1n)  # type: ignore[no-any-return]

    def rope(self, token_lo: int, token_hi: int) -> Rope:
        """Rotary cos and sin of positions ``[token_lo, token_hi)`` from the model's own module, for all layers."""
        with torch.inference_mode():
            positions = torch.arange(token_lo, token_hi, device=self.model.device).unsqueeze(0)
            if getattr(self._rotary, "mrope_section", None):
                positions = positions.expand(3, -1, -1)  # of text the same in time, height and width
            like = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
            return self._rotary(like, positions)  # type: ignore[no-any-return]

    def run(
        self, hidden: torch.Tensor, cache: ChunkCache, rope: Rope, *, layers: tuple[int, int], kv_only_top: bool = False
    ) -> torch.Tensor | None:
        """Run one chunk through layers ``[lo, hi)``, writing keys and values through ``cache``.

        Args:
            hidden: ``[1, n, C]`` out of layer ``lo - 1`` (the embedding for layer 0); not modified.
            cache: Tells where the chunk lies in the KV buffer; tokens before it must be there in these layers.
            rope: ``rope()`` of the same tokens.
            layers: ``(lo, hi)``.
            kv_only_top: Leave layer ``hi - 1`` right after its keys and values; a recurrent layer runs to its end.

        Returns:
            ``[1, n, C]`` out of layer ``hi - 1``; None where its keys and values were all that was wanted.
        """
        lo, hi = layers
        cache.stop_layer = hi - 1 if kv_only_top else None
        with torch.inference_mode():
            try:
                for layer in self._layers[lo:hi]:
                    hidden = layer(hidden, past_key_values=cache, position_embeddings=rope, use_cache=True)
            except KeysAndValuesWritten:
                return None
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[V]`` (float32, on the CPU) of the last token of ``hidden [1, n, C]``; waits for the device.

        Norm and LM head always see one token in memory of its own: equal shape and alignment, so equal bits.
        """
        with torch.inference_mode():
            last = hidden[:, -1:].clone()
            logits: torch.Tensor = self._lm_head(self._norm(last))[0, 0]
        return torch.empty(logits.shape, dtype=torch.float32).copy_(logits)

    def prefill(
        self,
        tokens: Sequence[int],
        chunk_ends: Sequence[int],
        kv: KVBuffer,
        *,
        on_chunk: Callable[[int], None] = lambda end: None,
    ) -> torch.Tensor:
        """Compute a whole prompt chunk by chunk and return the last token's logits ``[V]``.

        The buffer's checkpoint, where the model has one, goes along with the chunks.

        Args:
            tokens: The prompt.
            chunk_ends: Token positions at which chunks end, ascending, the last one ``len(tokens)``.
            kv: At least ``len(tokens)`` long; the chunks are written into it.
            on_chunk: Called with the end of each chunk, once it is there.

        Raises:
            ConfigError: The chunks do not end at the prompt, or the buffer is too short.
            PromptError: See ``token_tensor``.
        """
        if not chunk_ends or chunk_ends[-1] != len(tokens) or kv.capacity < len(tokens):
            raise ConfigError(
                f"prefill of {len(tokens)} tokens: chunks end at {chunk_ends[-1] if chunk_ends else None}, "
                f"the KV buffer holds {kv.capacity}"
            )
        ids = self.token_tensor(tokens)
        lo = 0
        for hi in chunk_ends:
            hidden = self.embed(ids[:, lo:hi])
            cache = ChunkCache(kv, lo, hi, kv.checkpoint)
            hidden = self._full(hidden, cache, self.rope(lo, hi), (0, self.num_layers))
            on_chunk(hi)
            lo = hi
        return self.logits(hidden)

    def decode_step(self, token: int, position: int, kv: KVBuffer, states: RunningStates | None = None) -> torch.Tensor:
        """Run one token at ``position`` over everything before it and return its logits ``[V]``.

        Args:
            token: Its id.
            position: How many come before it.
            kv: Has their keys and values; takes its own.
            states: Of recurrent layers before it, moved past it; the buffer's checkpoint for None.

        Raises:
            PromptError: ``position`` lies beyond the buffer or the model's limit.
        """
        if not 0 <= position < min(kv.capacity, self.model.max_tokens):
            raise PromptError(
                f"position {position} is outside the KV buffer ({kv.capacity} tokens) or the model's "
                f"limit ({self.model.max_tokens})"
            )
        cache = ChunkCache(kv, position, position + 1, kv.checkpoint if states is None else states)
        hidden = self.embed(self.token_tensor([token]))
        return self.logits(self._full(hidden, cache, self.rope(position, position + 1), (0, self.num_layers)))

    def _full(self, hidden: torch.Tensor, cache: ChunkCache, rope: Rope, layers: tuple[int, int]) -> torch.Tensor:
        out = self.run(hidden, cache, rope, layers=layers)
        assert out is not None, "only kv_only_top returns None"
        return out
