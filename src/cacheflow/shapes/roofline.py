"""Costs from a model's shape and a GPU's peaks, for hardware nobody here has.

A layer takes the larger of its arithmetic (matrix products and attention at a share of the best GEMM measured) and its
memory traffic (weights once per call, keys and values of the past), and a fixed overhead per call. With the default
efficiencies Llama-3.1-8B recomputes 8K tokens on an A100 and 32K on an H100 within 15 % of the figures in DESIGN.md.
It knows nothing of contention, power limits or tensor parallelism: a first guess until ``cacheflow calibrate`` ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cacheflow.errors import ConfigError
from cacheflow.hybrid_shape import DELTA_CHUNK, HybridShape, Mamba2Shape, RecurrentShape
from cacheflow.model_shape import DTYPE_BYTES, ModelShape
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem, Seconds, cell_bytes_KB, recurrent_B

Tokens = npt.NDArray[np.int64]
SSD_CHUNK = 128
"""``DELTA_CHUNK`` of Mamba-2's kernels, as published models have it (``chunk_size``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPeaks:
    """What a GPU can do at best.

    Attributes:
        name: Name for people.
        memory_bytes: Size of its memory.
        memory_bytes_per_s: Bandwidth of its memory.
        dense_flops_per_s: Best dense GEMM rate measured in the KV dtype (not the data sheet's peak).
        pcie_bytes_per_s: Bandwidth to host memory, one direction.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    dense_flops_per_s: float
    pcie_bytes_per_s: float

    def __post_init__(self) -> None:
        """Reject a GPU that can do nothing.

        Raises:
            ConfigError: A value is not positive.
        """
        for key in ("memory_bytes", "memory_bytes_per_s", "dense_flops_per_s", "pcie_bytes_per_s"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"gpu {self.name!r}: {key} is {getattr(self, key)}, must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What a serving engine reaches of a GPU's peaks, and what a call costs.

    Attributes:
        gemm: Share of the best GEMM rate in projections and MLP, everything elementwise included.
        attention: Share of the best GEMM rate in attention.
        memory: Share of the memory bandwidth.
        layer_overhead_s: Launches and gaps of one layer in one call.
    """

    gemm: float = 0.65
    attention: float = 0.25
    memory: float = 0.8
    layer_overhead_s: float = 1e-5

    def __post_init__(self) -> None:
        """Reject shares outside (0, 1] and a negative overhead.

        Raises:
            ConfigError: A share is not in (0, 1], or the overhead is negative.
        """
        for key in ("gemm", "attention", "memory"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"efficiency {key} is {getattr(self, key)}, must be above 0 and at most 1")
        if self.layer_overhead_s < 0:
            raise ConfigError(f"efficiency layer_overhead_s is {self.layer_overhead_s}, must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Costs of one model on one GPU; every method takes and returns one value a chunk."""

    shape: ModelShape
    gpu: GpuPeaks
    efficiency: Efficiency = Efficiency()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of row there are: rows of one kind cost the same."""
        return tuple(sorted(set(self.shape.rows))) if isinstance(self.shape, Mamba2Shape) else ("",)

    @property
    def kind_B(self) -> Tokens:
        """Index of each row's kind, bottom first."""
        rows = self.shape.rows if isinstance(self.shape, Mamba2Shape) else ("",) * self.shape.num_rows
        return np.array([self.kinds.index(row) for row in rows], dtype=np.int64)

    def row_s(self, tokens: Tokens, offsets: Tokens) -> tuple[Seconds, Seconds]:
        """Seconds of one row of each kind, in full and with keys and values only in its attention layer.

        A row is one attention layer, of a hybrid model with its recurrent layers below. Shape ``(len(tokens), N)``.
        """
        full_s, kv_only_s = self.layer_s(tokens, offsets), self.kv_only_s(tokens)
        if isinstance(self.shape, Mamba2Shape):
            return self._mamba2_rows_s(self.shape, tokens, full_s, kv_only_s)
        if isinstance(self.shape, HybridShape):
            below_s = (self.shape.row_layers - 1) * self._recurrent_s(self.shape, tokens)
            full_s, kv_only_s = full_s + below_s, kv_only_s + below_s
        return full_s[:, None], np.minimum(full_s, kv_only_s)[:, None]

    def _mamba2_rows_s(
        self, shape: Mamba2Shape, tokens: Tokens, attention_s: Seconds, kv_only_s: Seconds
    ) -> tuple[Seconds, Seconds]:
        """The same of a model of which each layer does one thing.

        Where a recurrent layer lies above the row's attention, all of the row is run for its state.
        """
        mamba_s, mlp_s = self._recurrent_s(shape, tokens), self._mlp_s(tokens)
        full, kv_only = [], []
        for row in self.kinds:
            below, above = row.split("*")
            below_s = below.count("M") * mamba_s + (len(below) - below.count("M")) * mlp_s
            above_s = above.count("M") * mamba_s + (len(above) - above.count("M")) * mlp_s
            full.append(below_s + attention_s + above_s)
            kv_only.append(full[-1] if "M" in above else below_s + np.minimum(attention_s, kv_only_s))
        return np.column_stack(full), np.column_stack(kv_only)

    def layer_s(self, tokens: Tokens, offsets: Tokens) -> Seconds:
        """Seconds of one attention layer for chunks of ``tokens`` tokens with ``offsets`` tokens before them."""
        shape, past = self.shape, self._visible_past(tokens, offsets)
        weights = shape.attention_weights + self._mlp_beside(self._active_experts)
        gemm_flops: Seconds = 2.0 * tokens.astype(np.float64) * weights
        attention_flops = 4.0 * shape.num_q_heads * shape.head_dim * past
        compute_s = self._gemm_s(gemm_flops) + self._attention_s(attention_flops)
        read_weights = shape.attention_weights + self._mlp_beside(self._touched_experts(tokens))
        seen = np.minimum(offsets, shape.sliding_window or offsets)
        moved_bytes = read_weights * DTYPE_BYTES[shape.dtype] + (seen + tokens) * shape.kv_bytes_per_token_layer
        return np.maximum(compute_s, self._memory_s(moved_bytes)) + self.efficiency.layer_overhead_s

    def kv_only_s(self, tokens: Tokens) -> Seconds:
        """Seconds of one attention layer's keys and values alone; offsets do not matter."""
        shape = self.shape
        weights = 2 * shape.hidden_size * shape.num_kv_heads * shape.head_dim
        compute_s = self._gemm_s(2.0 * weights * tokens.astype(np.float64))
        return np.maximum(compute_s, self._memory_s(weights * DTYPE_BYTES[shape.dtype])) + (
            self.efficiency.layer_overhead_s
        )

    def _mlp_s(self, tokens: Tokens) -> Seconds:
        """Seconds of a layer that is an MLP alone."""
        compute_s = self._gemm_s(2.0 * tokens.astype(np.float64) * self._mlp_weights(self._active_experts))
        moved_bytes = self._mlp_weights(self._touched_experts(tokens)) * DTYPE_BYTES[self.shape.dtype]
        return np.maximum(compute_s, self._memory_s(moved_bytes)) + self.efficiency.layer_overhead_s

    def _recurrent_s(self, shape: RecurrentShape, tokens: Tokens) -> Seconds:
        """Seconds of one recurrent layer and its MLP, if any: the same for every token, however many came before."""
        weights = shape.recurrent_weights + self._mlp_beside(self._active_experts)
        compute_s = self._gemm_s(2.0 * tokens.astype(np.float64) * weights) + self._attention_s(
            _state_flops_per_token(shape) * tokens.astype(np.float64)
        )
        read_weights = shape.recurrent_weights + self._mlp_beside(self._touched_experts(tokens))
        moved_bytes = read_weights * DTYPE_BYTES[shape.dtype] + 2 * shape.state_bytes
        return np.maximum(compute_s, self._memory_s(moved_bytes)) + self.efficiency.layer_overhead_s

    def head_s(self) -> float:
        """Seconds of the LM head for one token: its weights are read once."""
        shape = self.shape
        return float(self._memory_s(shape.vocab_size * shape.hidden_size * DTYPE_BYTES[shape.dtype]))

    def decode_s(self, num_requests: int, context_tokens: int) -> float:
        """Seconds of one step in which every request decodes one token.

        The weights, LM head included, are read once a step; keys and values of the context once for each request.

        Args:
            num_requests: Requests that decode; 0 costs nothing.
            context_tokens: Tokens that all of them attend to, in sum. A sliding window is not taken off it.
        """
        if num_requests == 0:
            return 0.0
        shape = self.shape
        one_layer = np.array([num_requests], dtype=np.int64)
        weights = shape.attention_weights + float(self._mlp_beside(self._active_experts))
        attention_flops = 4.0 * shape.num_q_heads * shape.head_dim * context_tokens
        compute_s = float(self._gemm_s(np.asarray(2.0 * num_requests * weights))) + float(
            self._attention_s(np.asarray(attention_flops))
        )
        read_weights = shape.attention_weights + float(np.ravel(self._mlp_beside(self._touched_experts(one_layer)))[0])
        moved_bytes = read_weights * DTYPE_BYTES[shape.dtype] + context_tokens * shape.kv_bytes_per_token_layer
        layer_s = max(compute_s, float(self._memory_s(moved_bytes))) + self.efficiency.layer_overhead_s
        all_s = shape.num_rows * layer_s
        if isinstance(shape, RecurrentShape):
            all_s += shape.num_recurrent * self._recurrent_step_s(shape, num_requests)
        if isinstance(shape, Mamba2Shape):
            all_s += shape.num_mlps * float(self._mlp_s(one_layer)[0])
        return all_s + self.head_s()

    def _recurrent_step_s(self, shape: RecurrentShape, num_requests: int) -> float:
        """Seconds of one recurrent layer in which every request decodes one token: it reads and writes its state."""
        own = float(self._recurrent_s(shape, np.array([num_requests], dtype=np.int64))[0])
        return own + float(self._memory_s(2 * shape.state_bytes * (num_requests - 1)))

    @property
    def _active_experts(self) -> int:
        return self.shape.num_active_experts or 1

    def _mlp_beside(self, num_experts: Seconds | int) -> Seconds:
        """Weights of the MLP that every layer has besides its attention or recurrence; 0 where it is a layer alone."""
        weights = self._mlp_weights(num_experts)
        return np.zeros_like(weights) if isinstance(self.shape, Mamba2Shape) else weights

    def _mlp_weights(self, num_experts: Seconds | int) -> Seconds:
        """Weights of an MLP with that many experts, and the one that every token visits."""
        return np.asarray(self.shape.expert_weights * num_experts) + self.shape.shared_expert_weights

    def _touched_experts(self, tokens: Tokens) -> Seconds:
        """Experts of which at least one of the tokens needs the weights, routing taken as uniform."""
        shape = self.shape
        if not shape.num_experts:
            return np.ones(len(tokens))
        share = self._active_experts / shape.num_experts
        touched: Seconds = shape.num_experts * (1.0 - (1.0 - share) ** tokens.astype(np.float64))
        return touched

    def _visible_past(self, tokens: Tokens, offsets: Tokens) -> Seconds:
        """Pairs of a token and one it attends to, itself included."""
        pairs: Seconds = tokens * offsets + tokens * (tokens + 1) / 2.0
        window = self.shape.sliding_window
        if window is None:
            return pairs
        # Each token at position i sees min(i + 1, window): sum the head of that ramp, then the flat part.
        return _ramp(offsets + tokens, window) - _ramp(offsets, window)

    def _gemm_s(self, flops: Seconds) -> Seconds:
        return flops / (self.efficiency.gemm * self.gpu.dense_flops_per_s)

    def _attention_s(self, flops: Seconds) -> Seconds:
        return flops / (self.efficiency.attention * self.gpu.dense_flops_per_s)

    def _memory_s(self, num_bytes: Seconds | float) -> Seconds:
        return np.asarray(num_bytes) / (self.efficiency.memory * self.gpu.memory_bytes_per_s)


def _state_flops_per_token(shape: RecurrentShape) -> float:
    if isinstance(shape, HybridShape):
        return _delta_flops_per_token(shape)
    assert isinstance(shape, Mamba2Shape), "there is no third"
    return _ssd_flops_per_token(shape)


def _ssd_flops_per_token(shape: Mamba2Shape) -> float:
    """Arithmetic of Mamba-2's chunked scan, two for a product and its sum.

    Against the state: what is read and what is written. Within a chunk: a group's output matrices against its input
    matrices, and the heads' inputs. Source: Dao and Gu, "Transformers are SSMs", section 6.
    """
    width, state = shape.num_state_heads * shape.state_head_dim, shape.state_dim
    within = SSD_CHUNK * (shape.num_state_groups * state + width)
    return 2.0 * (2 * width * state + within)


def _delta_flops_per_token(shape: HybridShape) -> float:
    """Arithmetic of the chunked gated delta rule, two for a product and its sum.

    Against the state: the values it predicts, what the queries read, what is written. Within a chunk: queries and keys
    against keys, two triangular systems (half of a product each), and the new values.
    """
    k_dim, v_dim = shape.state_k_dim, shape.state_v_dim
    within = DELTA_CHUNK * (2 * k_dim + (k_dim + v_dim) / 2 + v_dim)
    return 2.0 * shape.num_state_v_heads * (3 * k_dim * v_dim + within)


def _ramp(positions: Tokens, window: int) -> Seconds:
    """Sum of ``min(i + 1, window)`` over ``i`` in ``[0, positions)``."""
    rising = np.minimum(positions, window)
    ramp: Seconds = rising * (rising + 1) / 2.0 + (positions - rising) * float(window)
    return ramp


def problem_from_roofline(roofline: Roofline, grid: Grid, *, link: LinkCost) -> RestoreProblem:
    """What restoring a grid costs by a roofline; one row a block: one layer, but for a hybrid model.

    Raises:
        ConfigError: The grid has another number of blocks than the model rows.
    """
    shape = roofline.shape
    if grid.num_blocks != shape.num_rows:
        raise ConfigError(f"the grid has {grid.num_blocks} blocks, {shape.name} has {shape.num_rows} rows of layers")
    suffix = _chunks([grid.suffix_range(index) for index in range(len(grid.suffix_ends))])
    kind_B = roofline.kind_B
    full_KN, kv_only_KN = roofline.row_s(*_chunks([grid.chunk_range(chunk) for chunk in range(grid.num_chunks)]))
    return RestoreProblem(
        grid=grid,
        compute_KB=full_KN[:, kind_B],
        kv_only_KB=kv_only_KN[:, kind_B],
        load_bytes_KB=cell_bytes_KB(shape, grid, layers_per_block=shape.row_layers),
        link=link,
        suffix_B=roofline.row_s(*suffix)[0].sum(axis=0)[kind_B],
        head_s=roofline.head_s() if grid.suffix_ends else 0.0,
        recurrent_B=recurrent_B(shape, layers_per_block=shape.row_layers),
    )


def _chunks(ranges: list[tuple[int, int]]) -> tuple[Tokens, Tokens]:
    """Lengths and offsets of chunks."""
    starts = np.array([start for start, _ in ranges], dtype=np.int64)
    return np.array([end for _, end in ranges], dtype=np.int64) - starts, starts
