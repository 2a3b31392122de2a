"""Boundary states: what one pipeline stage hands the next for each token, by the names that the model gives it.

Most models hand over ``hidden_states`` and ``residual``; some the first alone, some more. As bytes a chunk's states are
one part after the other by name, each ``[n, ...]`` in C order.

Shapes: ``n`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

States = dict[str, torch.Tensor]
"""By name ``[n, ...]``; layers overwrite them."""


@dataclass(frozen=True, slots=True)
class BoundaryPart:
    """One of the tensors.

    Attributes:
        name: The model's.
        shape: Of one token.
        dtype: Of its numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BoundaryShape:
    """What is handed over for each token; without parts on the first stage."""

    parts: tuple[BoundaryPart, ...] = ()

    @classmethod
    def of(cls, model: Any, *, dtype: torch.dtype, device: torch.device) -> BoundaryShape:  # noqa: ANN401 -- vLLM's model
        """What a model says."""
        made = model.make_empty_intermediate_tensors(batch_size=1, dtype=dtype, device=device).tensors
        parts = (BoundaryPart(name, tuple(made[name].shape[1:]), made[name].dtype) for name in sorted(made))
        return cls(tuple(parts))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's states."""
        return sum(part.token_bytes for part in self.parts)

    def require(self, states: Mapping[str, torch.Tensor], *, num_tokens: int) -> None:
        """Pass if states are of this shape.

        Raises:
            ValueError: They are not (a caller's bug); names what differs.
        """
        for part in self.parts:
            found = states.get(part.name)
            expected = (num_tokens, *part.shape)
            if found is None or tuple(found.shape) != expected or found.dtype != part.dtype:
                got = "missing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
                raise ValueError(f"boundary states {part.name} are {got}, must be {expected} of {part.dtype}")

    def pack(self, states: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Bytes of a chunk's states, on the CPU."""
        parts = [states[part.name].contiguous().to("cpu").view(-1).view(torch.uint8) for part in self.parts]
        return torch.cat(parts)

    def unpack(self, packed: torch.Tensor, *, num_tokens: int, device: torch.device) -> States:
        """A chunk's states from their bytes, which are copied."""
        copies = self._split(packed, num_tokens, lambda own: own.clone())
        return {name: states.to(device) for name, states in copies.items()}

    def views(self, packed: torch.Tensor, *, num_tokens: int) -> States:
        """A chunk's states where their bytes are, the first of which is aligned for every dtype."""
        return self._split(packed, num_tokens, lambda own: own)

    def _split(self, packed: torch.Tensor, num_tokens: int, take: Callable[[torch.Tensor], torch.Tensor]) -> States:
        states, at = States(), 0
        for part in self.parts:
            end = at + num_tokens * part.token_bytes
            states[part.name] = take(packed[at:end]).view(part.dtype).view(num_tokens, *part.shape)
            at = end
        return states

    def random(self, num_tokens: int, generator: torch.Generator, *, device: torch.device) -> States:
        """Random states, to try things with."""
        return {
            part.name: torch.randn((num_tokens, *part.shape), generator=generator).to(device, part.dtype)
            for part in self.parts
        }
