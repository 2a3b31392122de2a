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
        num_layers: Decoder layers that hold a KV cache.
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


def _require_count(name: str, key: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"model shape {name!r}: {key} is {value!r}, must be a whole number of at least {least}")
