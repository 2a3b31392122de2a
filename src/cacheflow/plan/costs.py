"""What a model costs on one machine, and the restoration problem that follows from it.

A cost table is valid for the model, device, dtype and threads it was measured on and for nothing else; golden points
stored beside it are checked whenever a table is built, so that a damaged or misread file cannot plan anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from cacheflow.errors import ConfigError, ProfileError
from cacheflow.model_shape import ModelShape
from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.engine_pass import EnginePass
from cacheflow.plan.grid import Grid, num_layer_blocks, regular_ends
from cacheflow.plan.problem import LinkCost, RestoreProblem, Seconds, cell_bytes_KB, recurrent_B

FORMAT_VERSION = 1
GOLDEN_TOLERANCE = 1e-9
"""Relative; golden points guard against a misread table, not against noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostIdentity:
    """What costs were measured on; costs of another identity are refused.

    Attributes:
        model: Name of the model.
        fingerprint: Fingerprint of its weights.
        num_layers: Its decoder layers.
        device_type: ``"cpu"`` or ``"cuda"``.
        device: Name of the processor or GPU.
        dtype: Weight and KV dtype.
        num_threads: Compute threads (CPU); 0 where it does not matter.
        attention: Attention implementation.
    """

    model: str
    fingerprint: str
    num_layers: int
    device_type: str
    device: str
    dtype: str
    num_threads: int
    attention: str

    def require(self, other: CostIdentity) -> None:
        """Pass if costs of this identity hold for ``other``.

        Raises:
            ProfileError: They do not; names the first field that differs, and both values.
        """
        for field in fields(self):
            measured, asked = getattr(self, field.name), getattr(other, field.name)
            if measured != asked:
                raise ProfileError(
                    f"costs were measured with {field.name} {measured!r}, this is {asked!r}: calibrate again"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenPoint:
    """A query and its answer, to check a table by.

    Attributes:
        kind: Kind of layer.
        chunk_tokens: Length of the chunk.
        offset: Tokens before it.
        kv_only: Whether keys and values alone are asked for.
        expected_s: The answer.
    """

    kind: str
    chunk_tokens: int
    offset: int
    kv_only: bool
    expected_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Measured costs of one model on one machine.

    Attributes:
        identity: What they were measured on.
        layer_kinds: Kind of each layer, bottom first, such as ``("sliding", "full", ...)``.
        kinds: Costs of a layer by kind.
        head_s: Seconds of final norm, LM head and choice of the first token.
        call_overhead_s: Seconds a layer's call costs however little it does; contained in every cost above.
        golden: Queries with known answers, checked here.
        engine_pass: The passes of the engine's own prefill; None where it has none but the chunks.
    """

    identity: CostIdentity
    layer_kinds: tuple[str, ...]
    kinds: Mapping[str, CostGrid]
    head_s: float
    call_overhead_s: float = 0.0
    golden: tuple[GoldenPoint, ...] = ()
    engine_pass: EnginePass | None = None

    def __post_init__(self) -> None:
        """Check the table against itself.

        Raises:
            ProfileError: Layers and kinds do not fit the identity or each other, a duration is negative, or a golden
                point is missed.
        """
        if len(self.layer_kinds) != self.identity.num_layers:
            raise ProfileError(f"cost table: {len(self.layer_kinds)} layer kinds for {self.identity.num_layers} layers")
        missing = sorted(set(self.layer_kinds) - set(self.kinds))
        if missing:
            raise ProfileError(f"cost table: no costs for layer kinds {missing}, only for {sorted(self.kinds)}")
        for name, value in (("head_s", self.head_s), ("call_overhead_s", self.call_overhead_s)):
            if not 0 <= value < float("inf"):
                raise ProfileError(f"cost table: {name} is {value}, must be 0 or more and finite")
        for point in self.golden:
            self._check_golden(point)

    def _check_golden(self, point: GoldenPoint) -> None:
        if point.kind not in self.kinds:
            raise ProfileError(f"cost table: golden point of unknown kind {point.kind!r}")
        costs = self.kinds[point.kind]
        ask = costs.kv_only_s if point.kv_only else costs.full_s
        actual_s = ask(point.chunk_tokens, point.offset)
        if not abs(actual_s - point.expected_s) <= GOLDEN_TOLERANCE * point.expected_s:
            raise ProfileError(f"cost table: golden point {point} gives {actual_s} s: the table is damaged")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "identity": asdict(self.identity),
            "layer_kinds": list(self.layer_kinds),
            "kinds": {kind: costs.to_dict() for kind, costs in self.kinds.items()},
            "head_s": self.head_s,
            "call_overhead_s": self.call_overhead_s,
            "golden": [asdict(point) for point in self.golden],
            "engine_pass": None if self.engine_pass is None else self.engine_pass.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostTable:
        """The inverse of ``to_dict``.

        Raises:
            ProfileError: Another format version, a missing or malformed value, or a golden point is missed.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ProfileError(f"cost table: format_version is {version!r}, this release reads {FORMAT_VERSION}")
        try:
            return cls(
                identity=CostIdentity(**data["identity"]),
                layer_kinds=tuple(data["layer_kinds"]),
                kinds={kind: CostGrid.from_dict(costs) for kind, costs in data["kinds"].items()},
                head_s=float(data["head_s"]),
                call_overhead_s=float(data["call_overhead_s"]),
                golden=tuple(GoldenPoint(**point) for point in data["golden"]),
                engine_pass=EnginePass.from_dict(data["engine_pass"]) if data.get("engine_pass") else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ProfileError(f"cost table: malformed ({type(error).__name__}: {error})") from error


def prefill_s(table: CostTable, *, start: int, end: int) -> float | None:
    """Seconds the engine's own prefill takes from one token to another, head left out; None without own passes.

    Raises:
        CostRangeError: A chunk lies outside the measured range.
    """
    if table.engine_pass is None or end <= start:
        return None if table.engine_pass is None else 0.0
    cuts = (start, *regular_ends(start, end, table.engine_pass.chunk_tokens))
    chunks_s = float(_layer_costs(table, list(pairwise(cuts)))[0].sum())
    # Never less than nothing, whatever noise was measured.
    return max(0.0, chunks_s - table.engine_pass.saves_s(end - start))


def build_problem(
    table: CostTable, grid: Grid, shape: ModelShape, *, link: LinkCost, layers_per_block: int = 1
) -> RestoreProblem:
    """What restoring a grid costs by a table.

    Args:
        table: Measured costs.
        grid: Prefix and suffix chunks; its blocks hold ``layers_per_block`` layers each, the top one what is left.
        shape: The model, for its bytes.
        link: Where loads come from.
        layers_per_block: Layers of a block.

    Raises:
        ConfigError: The grid's blocks or the shape's layers do not fit the table, or a block is of no whole rows.
        CostRangeError: A chunk lies outside the measured range.
    """
    shape.layers_of_block(layers_per_block)
    num_layers = table.identity.num_layers
    if shape.num_layers != num_layers or grid.num_blocks != num_layer_blocks(num_layers, layers_per_block):
        raise ConfigError(
            f"a grid of {grid.num_blocks} blocks of {layers_per_block} layers does not fit "
            f"model {shape.name!r} of {shape.num_layers} layers and costs of {num_layers}"
        )
    first_layers = np.arange(0, num_layers, layers_per_block)
    layers_B = np.diff(np.append(first_layers, num_layers))
    ranges = [grid.chunk_range(chunk) for chunk in range(grid.num_chunks)]
    full_KL, kv_only_KL = _layer_costs(table, ranges)
    suffix_L = _layer_costs(table, [grid.suffix_range(i) for i in range(len(grid.suffix_ends))])[0].sum(axis=0)
    top_layers = first_layers + layers_B - 1
    compute_KB = np.add.reduceat(full_KL, first_layers, axis=1)
    return RestoreProblem(
        grid=grid,
        compute_KB=compute_KB,
        # Below the top of a block everything runs in full; min, because the sums round apart.
        kv_only_KB=np.minimum(compute_KB, compute_KB - full_KL[:, top_layers] + kv_only_KL[:, top_layers]),
        load_bytes_KB=cell_bytes_KB(shape, grid, layers_per_block=layers_per_block),
        link=link,
        suffix_B=np.add.reduceat(suffix_L, first_layers),
        head_s=table.head_s if grid.suffix_ends else 0.0,
        recurrent_B=recurrent_B(shape, layers_per_block=layers_per_block),
    )


def _layer_costs(table: CostTable, ranges: Sequence[tuple[int, int]]) -> tuple[Seconds, Seconds]:
    """Full and kv-only seconds of each chunk in each layer; both of shape ``(len(ranges), L)``."""
    shape = (len(ranges), len(table.layer_kinds))
    full_KL, kv_only_KL = np.zeros(shape), np.zeros(shape)
    if not ranges:
        return full_KL, kv_only_KL
    offsets = [start for start, _ in ranges]
    tokens = [end - start for start, end in ranges]
    kind_L = np.array(table.layer_kinds)
    for kind in sorted(set(table.layer_kinds)):
        of_kind = kind_L == kind
        full_KL[:, of_kind] = table.kinds[kind].full_many_s(tokens, offsets)[:, None]
        kv_only_KL[:, of_kind] = table.kinds[kind].kv_only_many_s(tokens, offsets)[:, None]
    return full_KL, kv_only_KL
