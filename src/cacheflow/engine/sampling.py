"""Choice of the next token, and the loop that decodes.

Sampling happens on the CPU in float32 from a seeded generator of its own: equal logits and seed give equal tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cacheflow.engine.arguments import number, whole
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.runner import LayerRunner
from cacheflow.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: Sample among the fewest tokens whose probabilities reach this sum.
        seed: Of the generator; unused when greedy.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: ``temperature`` is negative, ``top_p`` outside (0, 1], or ``seed`` no whole number of 64 bits.
        """
        for key in ("temperature", "top_p"):
            object.__setattr__(self, key, number(key, getattr(self, key)))
        object.__setattr__(self, "seed", whole("seed", self.seed, least=-(2**63), most=2**64 - 1))
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature is {self.temperature} (0 or more), top_p is {self.top_p} (above 0, at most 1)"
            )


class TokenSampler:
    """Chooses tokens one after another; holds the generator's state, so use one per generation."""

    def __init__(self, sampling: Sampling | None = None) -> None:
        """Greedy by default."""
        self._how = sampling or Sampling()
        self._generator = torch.Generator().manual_seed(self._how.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """Token id for ``logits [V]``; ties go to the lowest id when greedy."""
        if self._how.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.float().cpu() / self._how.temperature, dim=-1)
        ordered, ids = probabilities.sort(descending=True, stable=True)
        # Keep a token while the sum before it is short of top_p: at least one stays.
        kept = ordered.masked_fill(ordered.cumsum(0) - ordered >= self._how.top_p, 0.0)
        return int(ids[torch.multinomial(kept, 1, generator=self._generator)])


def generate(  # noqa: PLR0913 -- a loop's inputs, keyword-only
    runner: LayerRunner,
    kv: KVBuffer,
    logits: torch.Tensor,
    *,
    position: int,
    max_new_tokens: int,
    sampler: TokenSampler,
    stop_tokens: frozenset[int] = frozenset(),
) -> list[int]:
    """Decode after a prefill or a restoration.

    Args:
        runner: The model.
        kv: Holds tokens ``[0, position)``; decoded tokens are written after them.
        logits: ``[V]`` of the last prompt token.
        position: Where the first new token goes.
        max_new_tokens: At most this many, at least one.
        sampler: Chooses every token, the first included.
        stop_tokens: Generation ends after one of these; it is returned.

    Raises:
        PromptError: The buffer or the model's limit is reached.
    """
    tokens = [sampler.choose(logits)]
    while len(tokens) < max_new_tokens and tokens[-1] not in stop_tokens:
        logits = runner.decode_step(tokens[-1], position + len(tokens) - 1, kv)
        tokens.append(sampler.choose(logits))
    return tokens
