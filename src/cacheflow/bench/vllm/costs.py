"""What stock vLLM itself needs for a prefix, measured in the same run: the ground of ratios and bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from cacheflow.bench.vllm.client import ServerError, VllmClient
from cacheflow.model_shape import ModelShape
from cacheflow.plan.bound import Bound, bound
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem, cell_bytes_KB, recurrent_B


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmCosts:
    """Times of a stock server, by the client's clock; medians over repeats.

    Attributes:
        chunk_s: Seconds of each prefix chunk, head first: differences of a fit ``a + b n + c n^2`` through the times
            to first token of prompts of ``n`` tokens (attention makes a chunk's cost linear in its offset).
        suffix_s: Time to first token with the whole prefix in the local cache: new tokens, head, and the server's own
            time per request.
        full_s: Time to first token of prefix and suffix with an empty cache, for comparison with the sum of the above.
        fit_error: Largest relative difference between a measured time and the fit.
    """

    chunk_s: tuple[float, ...]
    suffix_s: float
    full_s: float
    fit_error: float

    @property
    def recompute_s(self) -> float:
        """Seconds to compute the whole prefix."""
        return sum(self.chunk_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSize:
    """The prefix and suffix of a run, and how vLLM chunks them."""

    num_tokens: int
    suffix_tokens: int
    chunk_tokens: int

    @property
    def grid_ends(self) -> tuple[int, ...]:
        """Where the prefix chunks end."""
        return Grid.regular(num_tokens=self.num_tokens, chunk_tokens=self.chunk_tokens, num_blocks=1).chunk_ends


def measure_costs(
    client: VllmClient, tokens: Sequence[int], size: PrefixSize, *, repeats: int, on_step: Callable[[], None]
) -> VllmCosts:
    """Time a stock server on prompts of growing length.

    Args:
        client: Of a server without a connector.
        tokens: At least prefix and suffix.
        size: The prefix.
        repeats: Rounds; each measures every length once.
        on_step: Called ``repeats`` times.

    Raises:
        ServerError: The server failed, or did not cache what it was sent.
    """
    lengths = sample_lengths(size.grid_ends)
    client.complete(tokens[: lengths[0]], max_tokens=2)  # warms up
    rounds = []
    for _ in range(repeats):
        rounds.append(_measure_round(client, tokens, size, lengths))
        on_step()
    medians = [median(times) for times in zip(*rounds, strict=True)]
    idle_s, *prefill_s, suffix_s, full_s = medians
    chunk_s, error = fit_chunks(size.grid_ends, lengths, [each - idle_s for each in prefill_s])
    return VllmCosts(chunk_s=chunk_s, suffix_s=suffix_s, full_s=full_s, fit_error=error)


def sample_lengths(ends: Sequence[int]) -> list[int]:
    """Prefix lengths to measure: up to four chunk ends, the first and the last among them."""
    last = len(ends) - 1
    return sorted({ends[index] for index in (0, last // 4, last // 2, last)})


def fit_chunks(
    ends: Sequence[int], lengths: Sequence[int], prefill_s: Sequence[float]
) -> tuple[tuple[float, ...], float]:
    """Cost of each chunk from the times of a few prefixes; second, the largest relative error of the fit.

    Fitted is ``b n + c n^2`` with ``c`` of at least 0, because noise must not make later chunks cheaper.
    """
    n = np.array(lengths, dtype=np.float64)
    measured = np.array(prefill_s, dtype=np.float64)
    columns = np.stack([n, n * n], axis=1) / measured[:, None]  # relative errors: short prefixes count as much
    b, c = np.linalg.lstsq(columns, np.ones_like(n), rcond=None)[0] if len(n) > 1 else (measured[0] / n[0], 0.0)
    if c < 0:
        b, c = float(np.mean(measured / n)), 0.0
    starts = np.array((0, *ends[:-1]), dtype=np.float64)
    stops = np.array(ends, dtype=np.float64)
    chunks = b * (stops - starts) + c * (stops**2 - starts**2)
    error = float(np.max(np.abs(b * n + c * n * n - measured) / measured))
    return tuple(float(each) for each in chunks), error


def prefix_bytes(shape: ModelShape, size: PrefixSize) -> int:
    """Bytes of the prefix's keys and values, and of a hybrid's running states at its end."""
    return size.num_tokens * shape.kv_bytes_per_token + shape.checkpoint_bytes


def least_times(
    costs: VllmCosts, shape: ModelShape, size: PrefixSize, *, bytes_per_s: float, drift: float = 1.0
) -> Bound:
    """The bound on a restoration inside vLLM, from its own prefill times.

    Errs on the low side: the server's own time per request counts as suffix, of which all but the top layer may
    overlap with loading. A block is a layer, or a row of a hybrid.
    """
    rows, row_layers = shape.num_rows, shape.row_layers
    grid = Grid.regular(
        num_tokens=size.num_tokens,
        chunk_tokens=size.chunk_tokens,
        num_blocks=rows,
        suffix_tokens=size.suffix_tokens,
    )
    chunk_K = np.array(costs.chunk_s) * drift / rows
    return bound(
        RestoreProblem(
            grid=grid,
            compute_KB=_spread(chunk_K, rows),
            kv_only_KB=_spread(np.minimum(chunk_K, chunk_K[0]) * kv_only_share(shape), rows),
            load_bytes_KB=cell_bytes_KB(shape, grid, layers_per_block=row_layers),
            link=LinkCost(bytes_per_s=bytes_per_s),
            suffix_B=np.full(rows, costs.suffix_s * drift / rows),
            recurrent_B=recurrent_B(shape, layers_per_block=row_layers),
        )
    )


def to_cache(tokens: Sequence[int], size: PrefixSize) -> Sequence[int]:
    """What to send so that a prefix is cached: with a token after it, for running states are kept before the last."""
    return tokens[: size.num_tokens + 1]


def kv_only_share(shape: ModelShape) -> float:
    """Share of a layer's matrix products that keys and values alone need; attention not counted.

    Of a hybrid the share of a row, whose recurrent layers are computed either way.
    """
    kv = 2 * shape.num_kv_heads * shape.head_dim
    q = shape.num_q_heads * shape.head_dim
    mlp = 3 * shape.intermediate_size * max(1, shape.num_active_experts)
    return (shape.row_layers - 1 + kv / (kv + 2 * q + mlp)) / shape.row_layers


def _measure_round(client: VllmClient, tokens: Sequence[int], size: PrefixSize, lengths: Sequence[int]) -> list[float]:
    """Times to first token: of one token, of every length, of the suffix after a cached prefix, of everything."""
    times = [_cold_s(client, tokens[:1]), *(_cold_s(client, tokens[:length]) for length in lengths)]
    whole = tokens[: size.num_tokens + size.suffix_tokens]
    client.complete(to_cache(tokens, size), max_tokens=1)
    warm = client.complete(whole, max_tokens=1)
    if warm.cached_tokens != size.num_tokens:
        raise ServerError(f"stock vLLM cached {warm.cached_tokens} of {size.num_tokens} tokens of a prefix it just saw")
    return [*times, warm.ttft_s, _cold_s(client, whole)]


def _cold_s(client: VllmClient, prompt: Sequence[int]) -> float:
    client.evict()
    return client.complete(prompt, max_tokens=1).ttft_s


def _spread(values_K: npt.NDArray[np.float64], num_blocks: int) -> npt.NDArray[np.float64]:
    return np.repeat(values_K[:, None], num_blocks, axis=1)
