"""KV blocks to try things in before anything is served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from cacheflow.errors import ConfigError
from cacheflow.vllm.worker.layout import BlockLayout


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
