"""Where a cell lies: grid indices to layers, tokens and bytes.

A cell's payload is the bytes of ``[layers, 2, n, H, D]`` in C order, attention layers ascending, keys before values,
tokens ascending, in the KV dtype: the layout of store objects, of staging buffers and of the pinned prefix alike. In a
hybrid model the last chunk's cells bring the states of their recurrent layers at the prefix's end too: another store
object, and after the keys and values in staging buffers and in the pinned prefix (see ``running_states``).
"""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape
from cacheflow.plan.grid import Cell, Grid, block_layers, num_layer_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class CellGeometry:
    """A grid laid over a model; the top block holds fewer layers when ``layers_per_block`` does not divide them.

    Attributes:
        grid: Chunks of tokens by layer blocks.
        shape: The model.
        layers_per_block: Layers of one block.
    """

    grid: Grid
    shape: ModelShape
    layers_per_block: int = 1

    def __post_init__(self) -> None:
        """Check that the grid's rows cover the model.

        Raises:
            ConfigError: ``grid.num_blocks`` is not the model's layers cut by ``layers_per_block``, or a block is of no
                whole rows of a hybrid model.
        """
        self.shape.layers_of_block(self.layers_per_block)
        expected = num_layer_blocks(self.shape.num_layers, self.layers_per_block)
        if self.grid.num_blocks != expected:
            raise ConfigError(
                f"grid has {self.grid.num_blocks} blocks; {self.shape.num_layers} layers in blocks of "
                f"{self.layers_per_block} make {expected}"
            )

    def layers(self, block: int) -> tuple[int, int]:
        """Layers ``[lo, hi)`` of a block."""
        return block_layers(block, self.layers_per_block, self.shape.num_layers)

    def extent(self, cell: Cell) -> tuple[int, int, int, int]:
        """``(layer_lo, layer_hi, token_lo, token_hi)`` of a cell."""
        return *self.layers(cell.block), *self.grid.chunk_range(cell.chunk)

    def kv_bytes(self, cell: Cell) -> int:
        """Bytes of a cell's keys and values."""
        layer_lo, layer_hi, token_lo, token_hi = self.extent(cell)
        rows = (layer_hi - layer_lo) // self.shape.row_layers
        return rows * (token_hi - token_lo) * self.shape.kv_bytes_per_token_layer

    def state_bytes(self, cell: Cell) -> int:
        """Bytes of the states that a cell brings; 0 before the last chunk, and without recurrent layers."""
        if cell.chunk != self.grid.num_chunks - 1:
            return 0
        layer_lo, layer_hi = self.layers(cell.block)
        return (layer_hi - layer_lo) // self.shape.row_layers * self.shape.row_state_bytes

    def num_bytes(self, cell: Cell) -> int:
        """Payload bytes of a cell."""
        return self.kv_bytes(cell) + self.state_bytes(cell)

    @property
    def max_cell_bytes(self) -> int:
        """Payload bytes of the largest single cell; 0 for an empty grid."""
        return max((self.num_bytes(Cell(chunk, 0)) for chunk in range(self.grid.num_chunks)), default=0)
