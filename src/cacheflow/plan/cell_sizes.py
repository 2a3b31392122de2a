"""How large chunks and cells are and how many reads are under way at least, unless somebody says otherwise.

On the CPU a cell's copy costs little beside its read. On CUDA every cell costs the host about 0.3 ms (Python's threads,
a state machine, a few calls into the driver), during which launching may stand still: a cell has to keep the link busy
for longer than that. And kernels of short chunks leave the device idle. An estimate, not yet measured.
"""

from __future__ import annotations

import math

from cacheflow.model_shape import ModelShape

CHUNK_TOKENS = {"cpu": 512, "cuda": 1024}
READS_IN_FLIGHT = {"cpu": 3, "cuda": 8}
LEAST_CELL_S = 0.8e-3
"""On CUDA a cell keeps the link busy for this long at least ..."""
LEAST_OBJECT_BYTES = 8 << 20
"""On CUDA what a cell holds at least where its size must not depend on a link that one engine has measured: engines
that share a store name objects by it. So many bytes take ``LEAST_CELL_S`` at 84 Gbit/s."""
LEAST_BLOCKS = 8
"""... as long as so many blocks are left of the layers, or compute and link could not share a chunk evenly."""


def chunk_tokens_of(device_type: str, asked: int | None = None) -> int:
    """Tokens of a chunk, as asked or as suits the device."""
    return CHUNK_TOKENS[device_type] if asked is None else asked


def layers_of_cell(
    shape: ModelShape, *, device_type: str, chunk_tokens: int, bytes_per_s: float, asked: int | None = None
) -> int:
    """Layers of a block, as asked or as suits the device and a link of ``bytes_per_s``, which may be infinite.

    Whole rows of a hybrid, and powers of two of them, so that a link that is measured anew does not change them, and
    with them the keys of what is saved.

    Raises:
        ConfigError: A block of so many layers cannot be restored by itself.
    """
    row = shape.layers_of_block(asked)
    if asked is not None or device_type == "cpu":
        return row
    most = max(1, shape.num_layers // row // LEAST_BLOCKS)
    # A row has one layer of attention, whatever else is in it.
    kept = [token_bytes for token_bytes in shape.kv_bytes_per_token_L if token_bytes]
    wanted = LEAST_CELL_S * bytes_per_s / (chunk_tokens * sum(kept) / len(kept))
    if not wanted < most:
        return row * most
    return row * min(most, 1 << max(0, math.ceil(math.log2(wanted)))) if wanted > 1 else row


def layers_of_object(shape: ModelShape, *, device_type: str, chunk_tokens: int, asked: int | None = None) -> int:
    """The same for objects that engines share, whatever links they have."""
    bytes_per_s = LEAST_OBJECT_BYTES / LEAST_CELL_S
    return layers_of_cell(
        shape, device_type=device_type, chunk_tokens=chunk_tokens, bytes_per_s=bytes_per_s, asked=asked
    )
