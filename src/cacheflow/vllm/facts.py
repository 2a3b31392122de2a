"""What a worker finds out at start and the scheduler side needs to decide by; crosses once, when the engine starts."""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape
from cacheflow.plan.costs import CostTable
from cacheflow.plan.grid import layers_of_blocks, num_layer_blocks
from cacheflow.plan.problem import LinkCost
from cacheflow.stores.keys import RankKeys, RankObjects, Shard

LayerDigest = tuple[int, str]
"""A layer of the model, counted from its bottom, and the digest of its weights."""

BOTTOM = -1
"""Stands for what lies below the first layer: the embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """One rank's part of the engine.

    Attributes:
        shard: Its tensor-parallel rank and pipeline stage; names its objects.
        namespace: ``Namespace.digest`` of what its KV is interchangeable with besides the weights; without an adapter.
        shape: Its share of the model, for the bytes of the KV cache.
        layers_per_block: Layers of one stored object and of one row of the grid.
        block_size: Tokens of one KV block.
        costs: Measured costs; None when this engine only loads.
        load_only_reason: Why it only loads; empty when it recomputes too.
        link: The store as this rank reads it; of one with several tiers the fastest.
        tier_rates: Bytes per second that each tier was measured to deliver; empty where plans know one link.
        first_layer: The model's layer that is this stage's first.
        weights: Digests of its weights, by layer.
        boundary_token_bytes: Bytes of one token's boundary states, the input of the stage's first layer; 0 where they
            are not stored: on the first stage, or switched off.
        linked: Whether the stage below can hand activations over, in order, where boundary states are missing.
        replicated: Whether all tensor-parallel ranks of the stage keep the same KV, as of latent attention.
        row_state_bytes: In a model with recurrent layers the bytes of their running states at one position, by row, a
            row being a layer of ``shape`` with the recurrent ones below it; empty in other models.
        identity: What its KV is interchangeable with, by name, for people; ``namespace`` is the digest of it.
        adapters_leak: Whether vLLM computes a request of the base model with an adapter where a step has both.
    """

    shard: Shard
    namespace: str
    shape: ModelShape
    layers_per_block: int
    block_size: int
    costs: CostTable | None
    link: LinkCost
    load_only_reason: str = ""
    first_layer: int = 0
    weights: tuple[LayerDigest, ...] = ()
    boundary_token_bytes: int = 0
    linked: bool = False
    replicated: bool = False
    row_state_bytes: tuple[int, ...] = ()
    identity: tuple[tuple[str, str], ...] = ()
    tier_rates: tuple[float | None, ...] = ()
    adapters_leak: bool = False

    def __post_init__(self) -> None:
        """Check that a load-only engine says why.

        Raises:
            ConfigError: Costs and the reason contradict each other.
        """
        if (self.costs is None) != bool(self.load_only_reason):
            raise ConfigError("an engine without costs only loads and must say why, one with costs recomputes")

    @property
    def rank(self) -> int:
        """Its number among the engine's ranks."""
        return self.shard.pp_rank * self.shard.tp_size + self.shard.tp_rank

    @property
    def keys(self) -> RankKeys:
        """Names its objects."""
        return RankKeys(self.shard, self.first_layer, self.replicated)

    @property
    def recurrent(self) -> bool:
        """Whether a prefix is restored with running states, which are kept at few positions."""
        return bool(self.row_state_bytes)

    @property
    def rows_of_blocks(self) -> list[tuple[int, int]]:
        """Layers ``[lo, hi)`` of ``shape`` in each row of the grid, bottom first."""
        return layers_of_blocks(self.layers_per_block, self.shape.num_layers)

    @property
    def state_bytes_B(self) -> tuple[int, ...]:
        """Bytes of the running states of each row of the grid at one position; none in a model without any."""
        rows, step = self.row_state_bytes, self.layers_per_block
        return tuple(sum(rows[lo : lo + step]) for lo in range(0, len(rows), step))

    @property
    def objects(self) -> RankObjects:
        """Names what it stores of a chunk."""
        rows, state_bytes_B = self.rows_of_blocks, self.state_bytes_B
        return RankObjects(
            keys=self.keys,
            rows=tuple(rows),
            state_rows=tuple(each for each, size in zip(rows, state_bytes_B, strict=False) if size),
            boundary=self.boundary_token_bytes > 0,
        )

    @property
    def num_blocks(self) -> int:
        """Rows of the grid."""
        return num_layer_blocks(self.shape.num_layers, self.layers_per_block)
