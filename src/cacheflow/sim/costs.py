"""What the simulated GPU takes for what: three sources with one protocol, each with its name.

Thousands of requests share the same aligned chunks, so each is priced once and then sliced. Blocks are rows: of one
layer, of a hybrid model one attention layer with the recurrent ones below it. Shapes: ``K`` chunks, ``B`` rows, ``N``
kinds of row.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from cacheflow.errors import ConfigError, CostRangeError
from cacheflow.model_shape import ModelShape
from cacheflow.plan.costs import CostTable
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem, Seconds, cell_bytes_KB, recurrent_B
from cacheflow.shapes.published import PublishedCosts
from cacheflow.shapes.roofline import Roofline

Tokens = npt.NDArray[np.int64]


class ModelCosts(Protocol):
    """What one model costs on one GPU.

    Attributes:
        model: Name of the model.
        gpu: Name of the GPU.
        source: Where the numbers come from, for every output.
        shape: The model.
    """

    model: str
    gpu: str
    source: str
    shape: ModelShape

    def problem(self, grid: Grid, *, link: LinkCost) -> RestoreProblem:
        """What restoring a grid of one row a block costs, and its new tokens.

        Raises:
            ConfigError: The grid has another number of blocks than the model rows.
            CostRangeError: A chunk lies outside the measured range.
        """
        ...

    def longest_pass(self, num_tokens: int) -> int:
        """Tokens of the longest prefill pass of at most ``num_tokens`` that these costs hold."""
        ...

    def decode_step_s(self, num_requests: int, context_tokens: int) -> float:
        """Seconds of one step in which every request decodes one token; ``context_tokens`` is the sum over them.

        Raises:
            CostRangeError: The batch lies outside the measured range.
        """
        ...


class ChunkSource(Protocol):
    """Where chunk costs come from."""

    kind_B: Tokens
    """Index of each row's kind, bottom first."""
    head_s: float
    """Final norm, LM head and choice of the first token."""
    most_tokens: float
    """Tokens of the longest chunk it prices."""

    def row_s(self, tokens: Tokens, offsets: Tokens) -> tuple[Seconds, Seconds]:
        """Seconds of one row of each kind, in full and with keys and values alone on top; ``(len(tokens), N)`` both."""
        ...

    def decode_step_s(self, num_requests: int, context_tokens: int) -> float:
        """See ``ModelCosts``."""
        ...


class ChunkCosts:
    """``ModelCosts`` over a source; aligned chunks of ``chunk_tokens`` are asked of it once."""

    def __init__(self, source: ChunkSource, shape: ModelShape, *, gpu: str, name: str, chunk_tokens: int) -> None:
        """Start without any chunk priced.

        Args:
            source: Prices chunks.
            shape: The model.
            gpu: Name of the GPU.
            name: Name of the source, for outputs.
            chunk_tokens: Tokens of the chunks that most grids are made of.

        Raises:
            ConfigError: The source has another number of rows than the shape.
        """
        if len(source.kind_B) != shape.num_rows:
            layers = len(source.kind_B) * shape.row_layers
            raise ConfigError(f"costs of {layers} layers, {shape.name} has {shape.num_layers}")
        self.model, self.gpu, self.source, self.shape = shape.name, gpu, name, shape
        self.decode_step_s = source.decode_step_s
        self._source, self.chunk_tokens = source, chunk_tokens
        num_kinds = int(source.kind_B.max()) + 1
        self._recurrent_B = recurrent_B(shape, layers_per_block=shape.row_layers)
        self._full_KN, self._kv_only_KN = np.zeros((0, num_kinds)), np.zeros((0, num_kinds))

    def longest_pass(self, num_tokens: int) -> int:
        """See ``ModelCosts``."""
        return int(min(num_tokens, self._source.most_tokens))

    def problem(self, grid: Grid, *, link: LinkCost) -> RestoreProblem:
        """See ``ModelCosts``."""
        if grid.num_blocks != self.shape.num_rows:
            raise ConfigError(
                f"the grid has {grid.num_blocks} blocks, {self.shape.name} has {self.shape.num_rows} rows of layers"
            )
        full_KN, kv_only_KN = self._chunks_s(grid.start, grid.chunk_ends)
        suffix_N = self._chunks_s(grid.num_tokens, grid.suffix_ends)[0].sum(axis=0)
        kind_B = self._source.kind_B
        return RestoreProblem(
            grid=grid,
            compute_KB=full_KN[:, kind_B],
            kv_only_KB=np.minimum(full_KN, kv_only_KN)[:, kind_B],
            load_bytes_KB=cell_bytes_KB(self.shape, grid, layers_per_block=self.shape.row_layers),
            link=link,
            suffix_B=suffix_N[kind_B],
            head_s=self._source.head_s if grid.suffix_ends else 0.0,
            recurrent_B=self._recurrent_B,
        )

    def _chunks_s(self, start: int, ends: tuple[int, ...]) -> tuple[Seconds, Seconds]:
        """Costs of consecutive chunks; those that are aligned come from the table."""
        size = self.chunk_tokens
        num_aligned = 0
        if ends and start % size == 0:
            num_aligned = len(ends) if ends[-1] == start + size * len(ends) else len(ends) - 1
            # Strictly ascending, so that one equality proves all chunks before it.
            if num_aligned and ends[num_aligned - 1] != start + size * num_aligned:
                num_aligned = 0
        first = start // size
        self._grow(first + num_aligned if num_aligned else 0)
        aligned = slice(first, first + num_aligned)
        if num_aligned == len(ends):
            return self._full_KN[aligned], self._kv_only_KN[aligned]
        rest = np.array([start if not num_aligned else ends[num_aligned - 1], *ends[num_aligned:]], dtype=np.int64)
        full, kv_only = self._source.row_s(np.diff(rest), rest[:-1])
        return np.vstack([self._full_KN[aligned], full]), np.vstack([self._kv_only_KN[aligned], kv_only])

    def _grow(self, num_chunks: int) -> None:
        known = len(self._full_KN)
        if num_chunks <= known:
            return
        # No further than asked: beyond it the source may refuse.
        offsets = np.arange(known, num_chunks, dtype=np.int64) * self.chunk_tokens
        full, kv_only = self._source.row_s(np.full(len(offsets), self.chunk_tokens, dtype=np.int64), offsets)
        self._full_KN, self._kv_only_KN = np.vstack([self._full_KN, full]), np.vstack([self._kv_only_KN, kv_only])


class RooflineSource:
    """Costs from peaks: any length, any context."""

    def __init__(self, roofline: Roofline) -> None:
        """Take the model and the GPU."""
        self._roofline = roofline
        self.kind_B: Tokens = roofline.kind_B
        self.head_s = roofline.head_s()
        self.most_tokens = float("inf")
        self.decode_step_s = roofline.decode_s

    def row_s(self, tokens: Tokens, offsets: Tokens) -> tuple[Seconds, Seconds]:
        """See ``ChunkSource``."""
        return self._roofline.row_s(tokens, offsets)


class MeasuredSource:
    """Costs of a calibrated profile; refused outside its range.

    It holds no decode costs. A step of ``n`` requests is priced as a chunk of ``n`` tokens at their mean context: the
    same products and the same pairs of query and key, but on a GPU too little memory traffic for long contexts.
    """

    def __init__(self, table: CostTable, *, row_layers: int = 1) -> None:
        """Take the table; a row has ``row_layers`` layers.

        Raises:
            ConfigError: The table's layers are no whole rows.
        """
        if len(table.layer_kinds) % row_layers:
            raise ConfigError(f"costs of {len(table.layer_kinds)} layers, which are not whole rows of {row_layers}")
        rows = [table.layer_kinds[lo : lo + row_layers] for lo in range(0, len(table.layer_kinds), row_layers)]
        self._rows = sorted(set(rows))
        self._grids = table.kinds
        self.kind_B: Tokens = np.array([self._rows.index(row) for row in rows], dtype=np.int64)
        self.head_s = table.head_s
        self._rows_N = np.bincount(self.kind_B, minlength=len(self._rows))
        self._least_tokens = max(grid.chunk_tokens[0] for grid in table.kinds.values())
        self.most_tokens = float(min(grid.chunk_tokens[-1] for grid in table.kinds.values()))

    def row_s(self, tokens: Tokens, offsets: Tokens) -> tuple[Seconds, Seconds]:
        """See ``ChunkSource``; a chunk shorter than the shortest measured costs as much as that one."""
        at_least = np.maximum(tokens, self._least_tokens).tolist()
        full = {kind: grid.full_many_s(at_least, offsets.tolist()) for kind, grid in self._grids.items()}
        kv_only = {kind: grid.kv_only_many_s(at_least, offsets.tolist()) for kind, grid in self._grids.items()}
        below = [sum((full[kind] for kind in row[:-1]), np.zeros(len(tokens))) for row in self._rows]
        return (
            np.column_stack([each + full[row[-1]] for each, row in zip(below, self._rows, strict=True)]),
            np.column_stack([each + kv_only[row[-1]] for each, row in zip(below, self._rows, strict=True)]),
        )

    def decode_step_s(self, num_requests: int, context_tokens: int) -> float:
        """See ``ModelCosts``."""
        if num_requests == 0:
            return 0.0
        full, _ = self.row_s(np.array([num_requests]), np.array([context_tokens // num_requests]))
        return float(full[0] @ self._rows_N) + self.head_s


class PublishedSource(MeasuredSource):
    """Costs that others measured, decode steps included."""

    def __init__(self, costs: PublishedCosts) -> None:
        """Take both tables."""
        super().__init__(costs.table)
        self._decode = costs.decode

    def decode_step_s(self, num_requests: int, context_tokens: int) -> float:
        """See ``ModelCosts``."""
        return self._decode.step_s(num_requests, context_tokens)


def roofline_costs(roofline: Roofline, *, chunk_tokens: int) -> ChunkCosts:
    """Costs from a model's shape and a GPU's peaks."""
    source = RooflineSource(roofline)
    return ChunkCosts(source, roofline.shape, gpu=roofline.gpu.name, name="roofline", chunk_tokens=chunk_tokens)


def measured_costs(table: CostTable, shape: ModelShape, *, path: str, chunk_tokens: int) -> ChunkCosts:
    """Costs of a profile that ``cacheflow calibrate`` wrote.

    Raises:
        ConfigError: The shape does not fit the profile, or the profile does not reach chunks of this size.
    """
    source, gpu = MeasuredSource(table, row_layers=shape.row_layers), table.identity.device
    return _checked(ChunkCosts(source, shape, gpu=gpu, name=f"measured:{path}", chunk_tokens=chunk_tokens))


def published_costs(costs: PublishedCosts, shape: ModelShape, *, chunk_tokens: int) -> ChunkCosts:
    """Costs that others published.

    Raises:
        ConfigError: The shape does not fit them, or they do not reach chunks of this size. Nobody published those of a
            hybrid model's layers by kind.
    """
    source, gpu = PublishedSource(costs), costs.table.identity.device
    return _checked(ChunkCosts(source, shape, gpu=gpu, name=costs.source, chunk_tokens=chunk_tokens))


def _checked(costs: ChunkCosts) -> ChunkCosts:
    """The same costs, if they hold the first chunk."""
    try:
        costs.problem(
            Grid(chunk_ends=(costs.chunk_tokens,), num_blocks=costs.shape.num_rows),
            link=LinkCost(bytes_per_s=float("inf")),
        )
    except CostRangeError as error:
        raise ConfigError(f"{costs.source} has no costs for chunks of {costs.chunk_tokens} tokens: {error}") from error
    return costs
