"""What the objects of a restoration are called in the store; pure.

Named by the model's layers and by the heads of a tensor-parallel rank, never by the pipeline stage that wrote them:
what one split into stages saved, another restores.
"""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.stores.keys import WHOLE, ObjectKey, ObjectKind, Shard


@dataclass(frozen=True, slots=True)
class StagePart:
    """Which part of the model's KV a rank holds.

    Attributes:
        shard: Tensor-parallel rank and pipeline stage.
        first_layer: The model's layer that is the stage's first.
    """

    shard: Shard = WHOLE
    first_layer: int = 0

    def of_model(self, layers: tuple[int, int]) -> tuple[int, int]:
        """Layers counted from the stage's first as layers counted from the model's."""
        return self.first_layer + layers[0], self.first_layer + layers[1]


def block_layers(block: int, layers_per_block: int, num_layers: int) -> tuple[int, int]:
    """Layers ``[lo, hi)`` of a layer block; the top one holds what is left."""
    return block * layers_per_block, min((block + 1) * layers_per_block, num_layers)


def object_key(namespace: str, chain_hash: str, *, layers: tuple[int, int], shard: Shard = WHOLE) -> ObjectKey:
    """Store key of one cell; the same for every number of pipeline stages, since a layer's KV does not depend on it.

    Args:
        namespace: ``Namespace.digest`` of the save.
        chain_hash: Hex, at the end of the cell's chunk.
        layers: ``[lo, hi)``, counted from the model's first layer.
        shard: The rank whose heads they are; its pipeline stage does not matter.
    """
    return ObjectKey(
        namespace=namespace,
        chain_hash=chain_hash,
        kind=ObjectKind.KV,
        layer_lo=layers[0],
        layer_hi=layers[1],
        shard=heads_of(shard),
    )


def boundary_key(namespace: str, chain_hash: str, *, layer: int, tp_size: int) -> ObjectKey:
    """Store key of a chunk's boundary states, the input of the model's layer ``layer``.

    All tensor-parallel ranks hold the same states, so there is one object for them; how many ranks added up to it
    decides its last bits.
    """
    return ObjectKey(
        namespace=namespace,
        chain_hash=chain_hash,
        kind=ObjectKind.HIDDEN,
        layer_lo=layer,
        layer_hi=layer,
        shard=Shard(tp_size=tp_size),
    )


def heads_of(shard: Shard) -> Shard:
    """The shard without its pipeline stage."""
    return Shard(tp_rank=shard.tp_rank, tp_size=shard.tp_size)
