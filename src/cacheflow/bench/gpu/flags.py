"""The options of ``cacheflow bench gpu``."""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.bench.options import EmbeddedFlags, option
from cacheflow.errors import ConfigError

PART_NUMBERS = (0, 1, 2, 3, 4, 5, 6, 8)
"""Part 7 is vLLM's, which is a study of its own."""
DEFAULT_SHAPE = "Llama-3.1-8B"


@dataclass(frozen=True, kw_only=True)
class GpuFlags(EmbeddedFlags):
    """The options of ``bench gpu``."""

    shape: str | None = option(DEFAULT_SHAPE, "random weights of this shape (see cacheflow plan)")
    device: str = option("cuda", "cpu is a rehearsal: the same way, without a GPU", choices=("cpu", "cuda"))
    tokens: int = option(32_768, "prefix", metavar="N", at_least=1)
    short_tokens: int = option(8192, "prefix of part 6", metavar="N", at_least=1)
    long_tokens: int = option(130_048, "prefix of part 8", metavar="N", at_least=1)
    suffix: int = option(512, "new tokens", metavar="N", at_least=1)
    repeats: int = option(2, "alternations of part 4", metavar="N", at_least=1)
    cost_repeats: int = option(2, "times each chunk is timed", metavar="N", at_least=1)
    gbps: tuple[float, ...] = option(
        (10.0, 40.0, 80.0, float("inf")), "links of part 4; inf for no limit", metavar="G,G,...", above=0
    )
    parts: tuple[int, ...] = option(PART_NUMBERS, "those to run", metavar="N,N,...")
    time_limit_s: float = option(
        560.0, "a part, or a round of one, that would end later is left out; the same command goes on with it",
        metavar="S", above=0, finite=True,
    )  # fmt: skip
    pace: float = option(
        1.0, "how many times as fast as an 8B model on an H100 the parts are expected to be", metavar="X", above=0
    )

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            ConfigError: Names the options.
        """
        if self.model is not None and self.shape == DEFAULT_SHAPE:
            object.__setattr__(self, "shape", None)
        super().__post_init__()
        unknown = sorted(set(self.parts) - set(PART_NUMBERS))
        if unknown:
            raise ConfigError(f"--parts {','.join(map(str, unknown))}: known are {','.join(map(str, PART_NUMBERS))}")
