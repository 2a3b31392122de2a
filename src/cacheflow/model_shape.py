"""What planning, stores and the simulator need to know of a model: its layers, its heads, the bytes that it keeps.

Units are in the names: ``*_bytes`` bytes, ``num_*`` counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cacheflow.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the cost model and the stores need to know of a decoder-only model.

    Attributes:
        name: Name for people and profiles, such as ``"Llama-3.1-8B"``.
        num_layers: Decoder layers, of which blocks are made; of a ``Mamba2Shape`` its attention layers alone.
        hidden_size: Width of the residual stream.
        num_q_heads: Query heads.
        num_kv_heads: Key/value heads (grouped-query attention).
        head_dim: Width of one head.
        intermediate_size: MLP width (of one expert for mixture-of-experts models).
        vocab_size: Rows of the LM head.
        num_experts: Experts per layer; 0 for a dense MLP.
        num_active_experts: Experts a token is routed to; 0 for a dense MLP.
        sliding_window: Attention window in tokens; None for full attention.
        dtype: Name of the KV and weight dtype, a key of ``DTYPE_BYTES``.
        kv_token_bytes: What a layer keeps of one token, or each layer, bottom first, where they differ; None for keys
            and values of every head in ``dtype``.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_experts: int = 0
    num_active_experts: int = 0
    sliding_window: int | None = None
    dtype: str = "bfloat16"
    kv_token_bytes: int | tuple[int, ...] | None = None

    mlp_projections: ClassVar[int] = 3
    """Gate, up and down."""

    def __post_init__(self) -> None:
        """Reject shapes that no model can have.

        Raises:
            ConfigError: A count is no whole number in range, or the dtype is unknown.
        """
        for key in (
            "num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size",
        ):  # fmt: skip
            require_count(self.name, key, getattr(self, key), least=1)
        for key in ("num_experts", "num_active_experts"):
            require_count(self.name, key, getattr(self, key), least=0)
        self._check_kv_token_bytes()
        if self.sliding_window is not None:
            require_count(self.name, "sliding_window", self.sliding_window, least=1)
        if not (self.num_experts > 0) == (self.num_active_experts > 0) or self.num_active_experts > self.num_experts:
            raise ConfigError(
                f"model shape {self.name!r}: {self.num_active_experts} active of {self.num_experts} experts; "
                "both are 0 for a dense model"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"model shape {self.name!r}: dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}")
        self._require_multiple("num_q_heads", "num_kv_heads")

    def _require_multiple(self, key: str, of: str) -> None:
        if getattr(self, key) % getattr(self, of):
            raise ConfigError(
                f"model shape {self.name!r}: {key} {getattr(self, key)} is no multiple of {of} {getattr(self, of)}"
            )

    def _check_kv_token_bytes(self) -> None:
        if self.kv_token_bytes is None:
            return
        given = self.kv_token_bytes if isinstance(self.kv_token_bytes, tuple) else (self.kv_token_bytes,)
        for each in given:
            require_count(self.name, "kv_token_bytes", each, least=1)
        if isinstance(self.kv_token_bytes, tuple) and len(given) != self.num_layers:
            raise ConfigError(
                f"model shape {self.name!r}: kv_token_bytes has {len(given)} values for {self.num_layers} layers"
            )

    @property
    def kv_bytes_per_token_L(self) -> tuple[int, ...]:
        """Bytes of keys and values of one token in each layer, bottom first."""
        if isinstance(self.kv_token_bytes, tuple):
            return self.kv_token_bytes
        return (self.kv_bytes_per_token_layer,) * self.num_layers

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of keys and values of one token in any one layer.

        Raises:
            ConfigError: Layers differ.
        """
        if isinstance(self.kv_token_bytes, tuple):
            raise ConfigError(
                f"model shape {self.name!r}: its layers keep {min(self.kv_token_bytes)} to {max(self.kv_token_bytes)} "
                "bytes of a token each; this works for layers that keep the same"
            )
        if self.kv_token_bytes is not None:
            return self.kv_token_bytes
        return 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return sum(self.kv_bytes_per_token_L)

    def kv_bytes_per_token_B(self, layers_per_block: int) -> tuple[int, ...]:
        """Bytes of one token in each block of so many layers, the top one of what is left, bottom first."""
        by_layer = self.kv_bytes_per_token_L
        return tuple(sum(by_layer[lo : lo + layers_per_block]) for lo in range(0, self.num_layers, layers_per_block))

    # Weights: counts, but for their bytes in all.

    @property
    def attention_weights(self) -> int:
        """Weights of one attention layer without its MLP."""
        return self.hidden_size * self.head_dim * 2 * (self.num_q_heads + self.num_kv_heads)

    @property
    def expert_weights(self) -> int:
        """Weights of one expert of an MLP, or of a dense one."""
        return self.mlp_projections * self.hidden_size * self.intermediate_size

    @property
    def shared_expert_weights(self) -> int:
        """Weights of the expert of an MLP that every token visits besides its own."""
        return 0

    @property
    def num_mlps(self) -> int:
        """MLPs, each with all its experts."""
        return self.num_layers

    @property
    def num_weights(self) -> int:
        """All weights: every expert, embedding and LM head apart."""
        mlp_weights = (self.num_experts or 1) * self.expert_weights + self.shared_expert_weights
        embeddings = 2 * self.vocab_size * self.hidden_size
        return self.num_rows * self.attention_weights + self.num_mlps * mlp_weights + embeddings

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.num_weights * DTYPE_BYTES[self.dtype]

    # What a hybrid model has besides.

    @property
    def row_layers(self) -> int:
        """Layers of the smallest block that can be restored by itself."""
        return 1

    @property
    def num_rows(self) -> int:
        """Rows of a grid whose blocks are as small as can be."""
        return self.num_layers // self.row_layers

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Layers of each row, bottom first."""
        return (self.row_layers,) * self.num_rows

    @property
    def row_state_bytes(self) -> int:
        """Bytes of the running states of one row, which do not grow with the tokens; 0 without recurrent layers."""
        return 0

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the running states of all rows at one position."""
        return self.row_state_bytes * self.num_rows

    def state_bytes_B(self, layers_per_block: int) -> tuple[int, ...]:
        """Bytes of the running states of each block of so many layers at one position, bottom first."""
        rows = [
            (min(lo + layers_per_block, self.num_layers) - lo) // self.row_layers
            for lo in range(0, self.num_layers, layers_per_block)
        ]
        return tuple(self.row_state_bytes * each for each in rows)

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer keeps a running state instead of keys and values."""
        return False

    def layers_of_block(self, asked: int | None = None) -> int:
        """Layers of a block: as asked, or as few as can be.

        Raises:
            ConfigError: A block of so many layers cannot be restored by itself.
        """
        layers = self.row_layers if asked is None else asked
        if layers % self.row_layers:
            raise ConfigError(
                f"model shape {self.name!r}: blocks of {layers} layers, must be a multiple of {self.row_layers}: "
                "its recurrent layers are restored together with the attention layer above them"
            )
        return layers


def require_count(name: str, key: str, value: object, *, least: int) -> None:
    """Pass if a count of the shape ``name`` is a whole number of at least ``least``.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"model shape {name!r}: {key} is {value!r}, must be a whole number of at least {least}")
