"""Models with recurrent layers beside those of attention: their rows, and the running states that they keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from cacheflow.errors import ConfigError
from cacheflow.model_shape import DTYPE_BYTES, ModelShape, require_count

DELTA_CHUNK = 64
"""Tokens that kernels of Gated DeltaNet layers take at once: within them it is attention, between them a recurrence.
Running states do not depend on where passes end as long as those are multiples of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentShape(ModelShape, ABC):
    """A model with recurrent layers beside those of attention; each keeps a running state.

    Attributes:
        conv_kernel: Tokens that the convolution before the recurrence sees, the newest included.
        state_dtype: Dtype of the recurrent state, a key of ``DTYPE_BYTES``; the convolution keeps ``dtype``.
        shared_intermediate_size: Width of the expert that every token visits besides its own; 0 for none.
    """

    conv_kernel: int
    state_dtype: str = "float32"
    shared_intermediate_size: int = 0

    def __post_init__(self) -> None:
        """Reject shapes that no such model can have.

        Raises:
            ConfigError: See ``ModelShape``; or the state's dtype is unknown.
        """
        super(RecurrentShape, self).__post_init__()  # slots make another class of this one, which super() alone misses
        require_count(self.name, "conv_kernel", self.conv_kernel, least=1)
        require_count(self.name, "shared_intermediate_size", self.shared_intermediate_size, least=0)
        if self.state_dtype not in DTYPE_BYTES:
            raise ConfigError(
                f"model shape {self.name!r}: state_dtype {self.state_dtype!r} is not one of {sorted(DTYPE_BYTES)}"
            )

    @property
    @abstractmethod
    def num_recurrent(self) -> int:
        """Recurrent layers."""

    @property
    @abstractmethod
    def conv_channels(self) -> int:
        """Channels of the convolution."""

    @property
    @abstractmethod
    def recurrence_size(self) -> int:
        """Numbers in the recurrent state of one layer."""

    @property
    @abstractmethod
    def recurrent_weights(self) -> int:
        """Weights of one recurrent layer without its MLP."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the running state of one recurrent layer: the last inputs of the convolution, and the recurrence."""
        conv_bytes = self.conv_channels * (self.conv_kernel - 1) * DTYPE_BYTES[self.dtype]
        return conv_bytes + self.recurrence_size * DTYPE_BYTES[self.state_dtype]

    @property
    def checkpoint_bytes(self) -> int:
        """See ``ModelShape``."""
        return self.state_bytes * self.num_recurrent

    @property
    def shared_expert_weights(self) -> int:
        """See ``ModelShape``."""
        return self.mlp_projections * self.hidden_size * self.shared_intermediate_size

    @property
    def num_weights(self) -> int:
        """See ``ModelShape``."""
        return super(RecurrentShape, self).num_weights + self.num_recurrent * self.recurrent_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridShape(RecurrentShape):
    """A model whose attention layers each have Gated DeltaNet layers below them.

    Attributes:
        layers_per_attention: Layers of a row: recurrent ones and, on top, one of full attention.
        num_state_k_heads: Query and key heads of a recurrent layer.
        num_state_v_heads: Value heads of a recurrent layer; each has a state of its own.
        state_k_dim: Width of one query or key head of a recurrent layer.
        state_v_dim: Width of one of its value heads.
        gated_attention: The attention's output is gated by a second projection of the size of the queries'.
    """

    layers_per_attention: int
    num_state_k_heads: int
    num_state_v_heads: int
    state_k_dim: int
    state_v_dim: int
    gated_attention: bool = True

    def __post_init__(self) -> None:
        """Reject shapes that no hybrid can have.

        Raises:
            ConfigError: See ``RecurrentShape``; or rows do not divide the layers.
        """
        super(HybridShape, self).__post_init__()  # as in RecurrentShape
        for key in ("num_state_k_heads", "num_state_v_heads", "state_k_dim", "state_v_dim"):
            require_count(self.name, key, getattr(self, key), least=1)
        require_count(self.name, "layers_per_attention", self.layers_per_attention, least=2)
        if self.num_layers % self.layers_per_attention:
            raise ConfigError(
                f"model shape {self.name!r}: {self.num_layers} layers are not whole rows of {self.layers_per_attention}"
            )
        self._require_multiple("num_state_v_heads", "num_state_k_heads")

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
    def num_recurrent(self) -> int:
        """See ``RecurrentShape``."""
        return self.num_layers - self.num_rows

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values side by side."""
        return 2 * self.num_state_k_heads * self.state_k_dim + self.num_state_v_heads * self.state_v_dim

    @property
    def recurrence_size(self) -> int:
        """See ``RecurrentShape``."""
        return self.num_state_v_heads * self.state_k_dim * self.state_v_dim

    @property
    def attention_weights(self) -> int:
        """See ``ModelShape``."""
        gate = self.hidden_size * self.head_dim * self.num_q_heads if self.gated_attention else 0
        return super(HybridShape, self).attention_weights + gate

    @property
    def recurrent_weights(self) -> int:
        """See ``RecurrentShape``: queries, keys, values, gate, two rates a head, and the output."""
        value_width = self.num_state_v_heads * self.state_v_dim
        projected = self.conv_channels + value_width + 2 * self.num_state_v_heads
        return self.hidden_size * (projected + value_width) + self.conv_channels * self.conv_kernel

    @property
    def row_state_bytes(self) -> int:
        """See ``ModelShape``."""
        return self.state_bytes * (self.row_layers - 1)

    def is_recurrent(self, layer: int) -> bool:
        """See ``ModelShape``."""
        return (layer + 1) % self.row_layers != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Shape(RecurrentShape):
    """A model of which each layer does one thing: attention, a Mamba-2 recurrence, or an MLP (Nemotron-H).

    ``num_layers`` counts the attention layers alone: each is a row, with the layers that are restored together with it,
    and rows are of unequal length. ``len(pattern)`` counts all.

    Attributes:
        pattern: What each layer does, bottom first: ``M`` Mamba-2, ``*`` attention, ``-`` an MLP, ``E`` experts.
        num_state_heads: Heads of a recurrent layer; each has a state of its own.
        state_head_dim: Width of one of them.
        state_dim: Width of the state of each channel.
        num_state_groups: Groups of heads that share their input and output matrices.
    """

    pattern: str
    num_state_heads: int
    state_head_dim: int
    state_dim: int
    num_state_groups: int

    mlp_projections: ClassVar[int] = 2
    """Up and down."""

    def __post_init__(self) -> None:
        """Reject shapes that no such model can have.

        Raises:
            ConfigError: See ``RecurrentShape``; or the pattern has another letter or number of attention layers.
        """
        super(Mamba2Shape, self).__post_init__()  # as in RecurrentShape
        for key in ("num_state_heads", "state_head_dim", "state_dim", "num_state_groups"):
            require_count(self.name, key, getattr(self, key), least=1)
        others = sorted({*self.pattern} - {*"M*-E"})
        if others or self.pattern.count("*") != self.num_layers:
            raise ConfigError(
                f"model shape {self.name!r}: pattern {self.pattern!r} must have {self.num_layers} attention layers "
                "(*), Mamba-2 layers (M), MLPs (-) and experts (E) alone"
            )
        self._require_multiple("num_state_heads", "num_state_groups")

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
    def row_lengths(self) -> tuple[int, ...]:
        """See ``ModelShape``; layers of every kind."""
        return tuple(len(row) for row in self.rows)

    @property
    def num_recurrent(self) -> int:
        """See ``RecurrentShape``."""
        return self.pattern.count("M")

    @property
    def num_mlps(self) -> int:
        """See ``ModelShape``: layers of their own."""
        return len(self.pattern) - self.num_rows - self.num_recurrent

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: the heads' inputs, and each group's input and output matrices."""
        return self.num_state_heads * self.state_head_dim + 2 * self.num_state_groups * self.state_dim

    @property
    def recurrence_size(self) -> int:
        """See ``RecurrentShape``."""
        return self.num_state_heads * self.state_head_dim * self.state_dim

    @property
    def recurrent_weights(self) -> int:
        """See ``RecurrentShape``: inputs, the groups' matrices, gate, one rate a head, and the output."""
        width = self.num_state_heads * self.state_head_dim
        projected = self.conv_channels + width + self.num_state_heads
        return self.hidden_size * (projected + width) + self.conv_channels * self.conv_kernel

    @property
    def row_state_bytes(self) -> int:
        """See ``ModelShape``; rows differ, see ``state_bytes_B``.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"model shape {self.name!r}: its rows have different numbers of recurrent layers")

    def state_bytes_B(self, layers_per_block: int) -> tuple[int, ...]:
        """See ``ModelShape``: of blocks of so many rows."""
        rows = [row.count("M") * self.state_bytes for row in self.rows]
        return tuple(sum(rows[lo : lo + layers_per_block]) for lo in range(0, len(rows), layers_per_block))
