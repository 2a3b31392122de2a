"""A short random prompt that the engine runs before anything is served, and KV blocks to try it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.errors import ConfigError
from cacheflow.vllm.models.model_access import ModelHandle
from cacheflow.vllm.models.partial_forward import Activations, PartialForward
from cacheflow.vllm.worker.layout import BlockLayout

LEAST_CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Random tokens, and on later pipeline stages random states for them, cut into equal chunks.

    Attributes:
        tokens: Token ids.
        chunk_tokens: Tokens of a chunk, a multiple of the block size.
        boundary: Per chunk the input of the stage's first layer; empty on the first stage.
    """

    tokens: tuple[int, ...]
    chunk_tokens: int
    boundary: tuple[Activations, ...]

    @property
    def chunk_ends(self) -> tuple[int, ...]:
        """Where each chunk ends."""
        return tuple(range(self.chunk_tokens, len(self.tokens) + 1, self.chunk_tokens))


def make_probe(handle: ModelHandle, *, num_chunks: int) -> Probe:
    """A probe of ``num_chunks`` short chunks, or as many as the model's longest prompt has room for; always the same.

    Short, whatever the chunk size of the saves: what is checked does not depend on it, and this is start-up time.
    """
    size = handle.block_size
    chunk = -(-LEAST_CHUNK_TOKENS // size) * size
    longest = int(handle.vllm_config.model_config.max_model_len)
    count = max(1, min(num_chunks, longest // chunk))
    generator = torch.Generator().manual_seed(11)
    vocabulary = int(handle.vllm_config.model_config.get_vocab_size())
    tokens = torch.randint(vocabulary, (count * chunk,), generator=generator).tolist()
    boundary: tuple[Activations, ...] = ()
    if not handle.is_first_stage:
        boundary = tuple(random_states(handle, chunk, generator) for _ in range(count))
    return Probe(tuple(tokens), chunk, boundary)


def run_by_engine(
    forward: PartialForward, layout: BlockLayout, probe: Probe, block_ids: list[int]
) -> npt.NDArray[np.uint8]:
    """Prefill the probe chunk by chunk with whole passes of the engine's model; returns the KV bytes it left."""
    start = 0
    for index, end in enumerate(probe.chunk_ends):
        boundary = _copy(probe.boundary[index]) if probe.boundary else None
        forward.run_whole(forward.piece(start, end, block_ids), probe.tokens[start:end], boundary)
        start = end
    forward.wait()
    return gathered(layout, block_ids)


def gathered(layout: BlockLayout, block_ids: list[int]) -> npt.NDArray[np.uint8]:
    """Bytes ``[L, blocks, P]`` of blocks in all layers."""
    layout.fence()
    out = np.empty(layout.num_bytes(layout.num_layers, len(block_ids)), dtype=np.uint8)
    layout.gather(0, layout.num_layers, block_ids, out)
    return out.reshape(layout.num_layers, len(block_ids), layout.block_bytes)


def random_states(handle: ModelHandle, num_tokens: int, generator: torch.Generator) -> Activations:
    """Random input of a layer, ``[num_tokens, C]`` both."""
    shape = (num_tokens, handle.hidden_size)
    made = [torch.randn(shape, generator=generator).to(handle.device, handle.dtype) for _ in range(2)]
    return Activations(made[0], made[1])


def _copy(states: Activations) -> Activations:
    assert states.residual is not None
    return Activations(states.hidden.clone(), states.residual.clone())


@contextmanager
def scratch_blocks(layout: BlockLayout, num_tokens: int) -> Iterator[list[int]]:
    """Blocks at the end of the KV cache that hold ``num_tokens``; all bytes of them are zero afterwards, as before.

    Only before the first request: vLLM hands blocks out from the front and knows nothing of this.

    Raises:
        ConfigError: The KV cache has fewer blocks (one, the null block, is vLLM's).
    """
    needed = -(-num_tokens // layout.block_size)
    if needed > layout.num_blocks - 1:
        raise ConfigError(
            f"{num_tokens} tokens need {needed} KV blocks of {layout.block_size}, the KV cache has {layout.num_blocks}"
        )
    block_ids = list(range(layout.num_blocks - needed, layout.num_blocks))
    try:
        yield block_ids
    finally:
        wipe(layout, block_ids)


def wipe(layout: BlockLayout, block_ids: list[int], *, value: int = 0) -> None:
    """Fill blocks of every layer with one byte value."""
    layout.fence()
    payload = np.full(layout.num_bytes(1, len(block_ids)), value, dtype=np.uint8)
    for layer in range(layout.num_layers):
        layout.scatter(layer, layer + 1, block_ids, payload)
