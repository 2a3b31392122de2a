"""Values that cross module lines: model shapes, load outcomes, clocks.

Units are in the names: ``*_s`` seconds, ``*_bytes`` bytes, ``*_bytes_per_s`` rates, ``num_*`` counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cacheflow.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Clock(Protocol):
    """A monotonic clock; live code passes ``time.perf_counter``, the simulator a virtual one."""

    def __call__(self) -> float:
        """Return the time in seconds since an arbitrary origin; never goes backwards."""
        ...


class LoadOutcome(Enum):
    """How one read from a store ended; everything but ``OK`` is recomputed and counted."""

    OK = "ok"
    MISS = "miss"
    CORRUPT = "corrupt"
    ERROR = "error"
    LATE = "late"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the cost model and the stores need to know of a decoder-only model.

    Attributes:
        name: Name for people and profiles, such as ``"Llama-3.1-8B"``.
        num_layers: Decoder layers.
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

    def __post_init__(self) -> None:
        """Reject shapes that no model can have.

        Raises:
            ConfigError: A count is no whole number in range, or the dtype is unknown.
        """
        for key in (
            "num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size",
        ):  # fmt: skip
            _require_count(self.name, key, getattr(self, key), least=1)
        for key in ("num_experts", "num_active_experts"):
            _require_count(self.name, key, getattr(self, key), least=0)
        self._check_kv_token_bytes()
        if self.sliding_window is not None:
            _require_count(self.name, "sliding_window", self.sliding_window, least=1)
        if not (self.num_experts > 0) == (self.num_active_experts > 0) or self.num_active_experts > self.num_experts:
            raise ConfigError(
                f"model shape {self.name!r}: {self.num_active_experts} active of {self.num_experts} experts; "
                "both are 0 for a dense model"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"model shape {self.name!r}: dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"model shape {self.name!r}: num_q_heads {self.num_q_heads} is no multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )

    def _check_kv_token_bytes(self) -> None:
        if self.kv_token_bytes is None:
            return
        given = self.kv_token_bytes if isinstance(self.kv_token_bytes, tuple) else (self.kv_token_bytes,)
        for each in given:
            _require_count(self.name, "kv_token_bytes", each, least=1)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridShape(ModelShape):
    """A model whose attention layers each have Gated DeltaNet layers below them, with a running state.

    Attributes:
        layers_per_attention: Layers of a row: recurrent ones and, on top, one of full attention.
        num_state_k_heads: Query and key heads of a recurrent layer.
        num_state_v_heads: Value heads of a recurrent layer; each has a state of its own.
        state_k_dim: Width of one query or key head of a recurrent layer.
        state_v_dim: Width of one of its value heads.
        conv_kernel: Tokens that the convolution before the recurrence sees, the newest included.
        state_dtype: Dtype of the recurrent state, a key of ``DTYPE_BYTES``; the convolution keeps ``dtype``.
        gated_attention: The attention's output is gated by a second projection of the size of the queries'.
        shared_intermediate_size: Width of the expert that every token visits besides its own; 0 for none.
    """

    layers_per_attention: int
    num_state_k_heads: int
    num_state_v_heads: int
    state_k_dim: int
    state_v_dim: int
    conv_kernel: int
    state_dtype: str = "float32"
    gated_attention: bool = True
    shared_intermediate_size: int = 0

    def __post_init__(self) -> None:
        """Reject shapes that no hybrid can have.

        Raises:
            ConfigError: See ``ModelShape``; or rows do not divide the layers.
        """
        super(HybridShape, self).__post_init__()  # slots make another class of this one, which super() alone misses
        for key in (
            "num_state_k_heads", "num_state_v_heads", "state_k_dim", "state_v_dim", "conv_kernel",
        ):  # fmt: skip
            _require_count(self.name, key, getattr(self, key), least=1)
        _require_count(self.name, "layers_per_attention", self.layers_per_attention, least=2)
        _require_count(self.name, "shared_intermediate_size", self.shared_intermediate_size, least=0)
        if self.num_layers % self.layers_per_attention:
            raise ConfigError(
                f"model shape {self.name!r}: {self.num_layers} layers are not whole rows of {self.layers_per_attention}"
            )
        if self.num_state_v_heads % self.num_state_k_heads:
            raise ConfigError(
                f"model shape {self.name!r}: num_state_v_heads {self.num_state_v_heads} is no multiple of "
                f"num_state_k_heads {self.num_state_k_heads}"
            )
        if self.state_dtype not in DTYPE_BYTES:
            raise ConfigError(
                f"model shape {self.name!r}: state_dtype {self.state_dtype!r} is not one of {sorted(DTYPE_BYTES)}"
            )

    @property
    def kv_bytes_per_token_L(self) -> tuple[int, ...]:
        """See ``ModelShape``: 0 for recurrent layers."""
        row = (*(0,) * (self.row_layers - 1), self.kv_bytes_per_token_layer)
        return row * self.num_rows

    @property
    def row_layers(self) -> int:
        """See ``ModelShape``."""
        return self.layers_per_attention

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values side by side."""
        return 2 * self.num_state_k_heads * self.state_k_dim + self.num_state_v_heads * self.state_v_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of the running state of one recurrent layer: the last inputs of the convolution, and the recurrence."""
        conv_bytes = self.conv_channels * (self.conv_kernel - 1) * DTYPE_BYTES[self.dtype]
        recurrence = self.num_state_v_heads * self.state_k_dim * self.state_v_dim
        return conv_bytes + recurrence * DTYPE_BYTES[self.state_dtype]

    @property
    def row_state_bytes(self) -> int:
        """See ``ModelShape``."""
        return self.state_bytes * (self.row_layers - 1)

    def is_recurrent(self, layer: int) -> bool:
        """See ``ModelShape``."""
        return (layer + 1) % self.row_layers != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Shape(ModelShape):
    """A model of which each layer does one thing: attention, a Mamba-2 recurrence, or an MLP (Nemotron-H).

    ``num_layers`` counts the attention layers: each is a row, with the layers that are restored together with it.

    Attributes:
        pattern: What each layer does, bottom first: ``M`` Mamba-2, ``*`` attention, ``-`` an MLP, ``E`` experts.
        num_state_heads: Heads of a recurrent layer; each has a state of its own.
        state_head_dim: Width of one of them.
        state_dim: Width of the state of each channel.
        num_state_groups: Groups of heads that share their input and output matrices.
        conv_kernel: Tokens that the convolution before the recurrence sees, the newest included.
        state_dtype: Dtype of the recurrent state, a key of ``DTYPE_BYTES``; the convolution keeps ``dtype``.
        shared_intermediate_size: Width of the expert that every token visits besides its own; 0 for none.
    """

    pattern: str
    num_state_heads: int
    state_head_dim: int
    state_dim: int
    num_state_groups: int
    conv_kernel: int
    state_dtype: str = "float32"
    shared_intermediate_size: int = 0

    def __post_init__(self) -> None:
        """Reject shapes that no such model can have.

        Raises:
            ConfigError: See ``ModelShape``; or the pattern has another letter or number of attention layers.
        """
        super(Mamba2Shape, self).__post_init__()  # slots make another class of this one, which super() alone misses
        for key in ("num_state_heads", "state_head_dim", "state_dim", "num_state_groups", "conv_kernel"):
            _require_count(self.name, key, getattr(self, key), least=1)
        _require_count(self.name, "shared_intermediate_size", self.shared_intermediate_size, least=0)
        others = sorted({*self.pattern} - {*"M*-E"})
        if others or self.pattern.count("*") != self.num_layers:
            raise ConfigError(
                f"model shape {self.name!r}: pattern {self.pattern!r} must have {self.num_layers} attention layers "
                "(*), Mamba-2 layers (M), MLPs (-) and experts (E) alone"
            )
        if self.num_state_heads % self.num_state_groups:
            raise ConfigError(
                f"model shape {self.name!r}: num_state_heads {self.num_state_heads} is no multiple of "
                f"num_state_groups {self.num_state_groups}"
            )
        if self.state_dtype not in DTYPE_BYTES:
            raise ConfigError(
                f"model shape {self.name!r}: state_dtype {self.state_dtype!r} is not one of {sorted(DTYPE_BYTES)}"
            )

    @property
    def rows(self) -> tuple[str, ...]:
        """The part of the pattern that each row is, bottom first.

        A row begins with the recurrent layers below its attention; what comes before the next row's belongs to it.
        """
        first, *between, top = self.pattern.split("*")
        rows = [f"{first}*"]
        for part in between:
            begins = part.find("M") if "M" in part else len(part)
            rows[-1] += part[:begins]
            rows.append(f"{part[begins:]}*")
        rows[-1] += top
        return tuple(rows)

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: the heads' inputs, and each group's input and output matrices."""
        return self.num_state_heads * self.state_head_dim + 2 * self.num_state_groups * self.state_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of the running state of one recurrent layer: the last inputs of the convolution, and the recurrence."""
        conv_bytes = self.conv_channels * (self.conv_kernel - 1) * DTYPE_BYTES[self.dtype]
        recurrence = self.num_state_heads * self.state_head_dim * self.state_dim
        return conv_bytes + recurrence * DTYPE_BYTES[self.state_dtype]

    @property
    def row_state_bytes(self) -> int:
        """See ``ModelShape``; rows differ, see ``state_bytes_B``.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"model shape {self.name!r}: its rows have different numbers of recurrent layers")

    @property
    def checkpoint_bytes(self) -> int:
        """See ``ModelShape``."""
        return self.state_bytes * self.pattern.count("M")

    def state_bytes_B(self, layers_per_block: int) -> tuple[int, ...]:
        """See ``ModelShape``: of blocks of so many rows."""
        rows = [row.count("M") * self.state_bytes for row in self.rows]
        return tuple(sum(rows[lo : lo + layers_per_block]) for lo in range(0, len(rows), layers_per_block))


def _require_count(name: str, key: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"model shape {name!r}: {key} is {value!r}, must be a whole number of at least {least}")
