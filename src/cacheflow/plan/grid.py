"""The grid a prefix is restored over: chunks of tokens by blocks of layers.

``K`` chunks (column index ``chunk``, 0 is the head of the prefix) by ``B`` layer blocks (row index ``block``, 0 is
the bottom layer). A *cell* ``(chunk, block)`` is restored once, by compute or by I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cacheflow.errors import ConfigError


class Cell(NamedTuple):
    """The keys and values of one chunk in one layer block: what is restored once, by compute or by one read."""

    chunk: int
    block: int


class Boundary(NamedTuple):
    """The boundary hidden states of one chunk: what a later pipeline stage recomputes the chunk from."""

    chunk: int


Piece = Cell | Boundary
"""What one read brings."""


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """A rectangle of cells: chunks ``[chunk_lo, chunk_hi)`` by blocks ``[block_lo, block_hi)``; never empty."""

    chunk_lo: int
    chunk_hi: int
    block_lo: int
    block_hi: int

    def __post_init__(self) -> None:
        """Reject empty rectangles.

        Raises:
            ValueError: The rectangle holds no cell or starts below zero.
        """
        if not (0 <= self.chunk_lo < self.chunk_hi and 0 <= self.block_lo < self.block_hi):
            raise ValueError(f"empty or negative tile {self}")

    @property
    def num_cells(self) -> int:
        """Number of cells in the rectangle."""
        return (self.chunk_hi - self.chunk_lo) * (self.block_hi - self.block_lo)

    def cells(self) -> Iterator[Cell]:
        """Yield the cells, bottom block first within a chunk, head chunk first."""
        for chunk in range(self.chunk_lo, self.chunk_hi):
            for block in range(self.block_lo, self.block_hi):
                yield Cell(chunk, block)


@dataclass(frozen=True, slots=True)
class Grid:
    """Chunk ends of a prefix (and of the suffix after it) by layer blocks.

    Attributes:
        chunk_ends: Token position at which each prefix chunk ends, ascending; the first chunk starts at ``start``.
            These are the chunks the prefix was saved in: recomputing with others changes the rounding.
        num_blocks: Number of layer blocks ``B``.
        suffix_ends: Token position at which each chunk of new tokens ends, ascending; empty for a restoration alone.
        start: Tokens before the first chunk, which are resident already.
    """

    chunk_ends: tuple[int, ...]
    num_blocks: int
    suffix_ends: tuple[int, ...] = ()
    start: int = 0

    def __post_init__(self) -> None:
        """Check that chunk ends ascend and there is at least one block.

        Raises:
            ConfigError: Chunk ends do not ascend strictly from above ``start``, or there is no block.
        """
        if self.num_blocks < 1 or self.start < 0:
            raise ConfigError(f"num_blocks is {self.num_blocks}, must be at least 1; start {self.start} at least 0")
        last = self.start
        for end in (*self.chunk_ends, *self.suffix_ends):
            if end <= last:
                raise ConfigError(f"chunk ends must ascend: {end} follows {last}")
            last = end

    @classmethod
    def regular(cls, *, num_tokens: int, chunk_tokens: int, num_blocks: int, suffix_tokens: int = 0) -> Grid:
        """Cut ``num_tokens`` into chunks of ``chunk_tokens`` (the last may be partial), then the suffix likewise.

        Raises:
            ConfigError: A count is out of range.
        """
        if num_tokens < 0 or suffix_tokens < 0 or chunk_tokens < 1:
            raise ConfigError(
                f"num_tokens {num_tokens} and suffix_tokens {suffix_tokens} must be 0 or more, "
                f"chunk_tokens {chunk_tokens} at least 1"
            )
        return cls(
            chunk_ends=regular_ends(0, num_tokens, chunk_tokens),
            num_blocks=num_blocks,
            suffix_ends=regular_ends(num_tokens, num_tokens + suffix_tokens, chunk_tokens),
        )

    @property
    def num_chunks(self) -> int:
        """Number of prefix chunks ``K``."""
        return len(self.chunk_ends)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix, those before the first chunk included."""
        return self.chunk_ends[-1] if self.chunk_ends else self.start

    @property
    def suffix_tokens(self) -> int:
        """New tokens after the prefix."""
        return self.suffix_ends[-1] - self.num_tokens if self.suffix_ends else 0

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Token positions ``[start, end)`` of a prefix chunk."""
        return (self.chunk_ends[chunk - 1] if chunk else self.start), self.chunk_ends[chunk]

    def suffix_range(self, index: int) -> tuple[int, int]:
        """Token positions ``[start, end)`` of a suffix chunk."""
        return (self.suffix_ends[index - 1] if index else self.num_tokens), self.suffix_ends[index]


def num_layer_blocks(num_layers: int, layers_per_block: int) -> int:
    """Rows of the grid of a model; the top one holds fewer layers when ``layers_per_block`` does not divide them.

    Raises:
        ConfigError: ``layers_per_block`` is below 1.
    """
    if layers_per_block < 1:
        raise ConfigError(f"layers_per_block is {layers_per_block}, must be at least 1")
    return -(-num_layers // layers_per_block)


def block_layers(block: int, layers_per_block: int, num_layers: int) -> tuple[int, int]:
    """Layers ``[lo, hi)`` of a layer block; the top one holds what is left."""
    return block * layers_per_block, min((block + 1) * layers_per_block, num_layers)


def layers_of_blocks(layers_per_block: int, num_layers: int) -> list[tuple[int, int]]:
    """Layers ``[lo, hi)`` of every layer block, bottom first."""
    num_blocks = num_layer_blocks(num_layers, layers_per_block)
    return [block_layers(block, layers_per_block, num_layers) for block in range(num_blocks)]


def regular_ends(start: int, end: int, chunk_tokens: int) -> tuple[int, ...]:
    """Chunk ends of ``[start, end)`` cut every ``chunk_tokens`` from ``start``; the last chunk may be partial."""
    if end <= start:
        return ()
    return (*range(start + chunk_tokens, end, chunk_tokens), end)
