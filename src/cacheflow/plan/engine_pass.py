"""What an engine saves by prefilling in passes that are longer than the chunks of a save.

A pass reads the weights once, however many tokens it takes; a mixture of experts reads all of its experts. Attention
costs the same either way. So each chunk boundary that lies inside a pass is seconds saved, wherever the pass begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cacheflow.errors import ProfileError


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePass:
    """The passes of one engine's prefill, beside the chunks that its costs are measured in.

    Attributes:
        pass_tokens: Most tokens the engine takes in one pass.
        chunk_tokens: Tokens of a chunk.
        saved_s: Seconds, of all layers together, that a chunk boundary inside a pass saves.
    """

    pass_tokens: int
    chunk_tokens: int
    saved_s: float

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ProfileError: A chunk is empty or longer than a pass, or the saving is negative or not finite.
        """
        if not 1 <= self.chunk_tokens <= self.pass_tokens:
            raise ProfileError(f"engine pass: {self.chunk_tokens} tokens a chunk, {self.pass_tokens} tokens a pass")
        if not 0 <= self.saved_s < float("inf"):
            raise ProfileError(f"engine pass: saved_s is {self.saved_s}, must be 0 or more and finite")

    def saves_s(self, num_tokens: int) -> float:
        """Seconds by which consecutive tokens end sooner in passes than in chunks."""
        num_chunks, num_passes = -(-num_tokens // self.chunk_tokens), -(-num_tokens // self.pass_tokens)
        return max(0, num_chunks - num_passes) * self.saved_s

    def longest_chunk(self, block_size: int, *, max_tokens: int) -> int:
        """Tokens of the longest chunk that a pass takes and a prompt of ``max_tokens`` can have, in whole KV blocks."""
        most = min(self.pass_tokens, max_tokens - 1)
        return max(self.chunk_tokens, most // block_size * block_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EnginePass:
        """The inverse of ``to_dict``.

        Raises:
            ProfileError: A value is missing, malformed or out of range.
        """
        try:
            return cls(
                pass_tokens=int(data["pass_tokens"]),
                chunk_tokens=int(data["chunk_tokens"]),
                saved_s=float(data["saved_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"engine pass: malformed ({type(error).__name__}: {error})") from error
