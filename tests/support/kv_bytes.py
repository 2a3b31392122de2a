"""KV blocks of a layout as one array, also where layers keep more or less of a token than others.

``[L, blocks, P]``: ``P`` bytes of a block in the widest layer; what a narrower layer lacks is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def gather(layout, block_ids: Sequence[int]) -> np.ndarray:
    """Blocks of all layers."""
    ids, num_layers = list(block_ids), layout.num_layers
    kv = np.zeros((num_layers, len(ids), max(layout.block_bytes_L)), dtype=np.uint8)
    if ids:
        out = np.empty(layout.num_bytes(0, num_layers, len(ids)), dtype=np.uint8)
        layout.gather(0, num_layers, ids, out)
        for wide, own in zip(kv, layout.by_layer(out, 0, num_layers, len(ids)), strict=True):
            wide[:, : own.shape[1]] = own
    return kv


def scatter(layout, kv: np.ndarray, block_ids: Sequence[int], *, layers: tuple[int, int]) -> None:
    """The inverse, of layers ``[lo, hi)`` of ``kv``."""
    for layer in range(*layers):
        own = kv[layer, :, : layout.block_bytes_L[layer]]
        layout.scatter(layer, layer + 1, list(block_ids), np.ascontiguousarray(own).reshape(-1))


def fill(layout, block_ids: Sequence[int], value: int) -> None:
    """Put one byte value into blocks of all layers."""
    for layer in range(layout.num_layers):
        payload = np.full(layout.num_bytes(layer, layer + 1, len(block_ids)), value, dtype=np.uint8)
        layout.scatter(layer, layer + 1, list(block_ids), payload)
