"""How much sooner vLLM's own prefill is through than recomputation in the chunks of a save.

One long pass at offset 0 against the same tokens in chunks, whose costs are known; see ``plan/engine_pass.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.engine_pass import EnginePass
from cacheflow.vllm.startup.agreement import from_first_rank

NUM_RUNS = 4
"""How often whoever measures runs what it measures."""


def measure_engine_pass(
    grids_L: Sequence[CostGrid],
    seconds_a_layer: Callable[[int], float],
    *,
    chunk_tokens: int,
    pass_tokens: int,
    budget_s: float,
) -> EnginePass | None:
    """Time the longest pass that the budget allows; None when it has no two chunks.

    Call on every tensor-parallel rank: the pass holds collectives, so its length is the first rank's.

    Args:
        grids_L: What chunks cost in each layer, bottom first.
        seconds_a_layer: Measures a pass of so many tokens at offset 0, over a few layers of them; mean of a layer.
        chunk_tokens: Tokens of a chunk of the save.
        pass_tokens: Most tokens the engine takes in one pass, and as many as there are scratch blocks for.
        budget_s: Roughly how long this may take.
    """
    chunks_s = 0.0
    affordable = 1
    for count in range(1, pass_tokens // chunk_tokens + 1):
        costs_s = sum(grid.full_s(chunk_tokens, (count - 1) * chunk_tokens) for grid in grids_L)
        if count > 2 and (chunks_s + costs_s) * NUM_RUNS > budget_s:  # all layers: on the safe side
            break
        chunks_s, affordable = chunks_s + costs_s, count
    count = from_first_rank(affordable)
    if count < 2:
        return None
    first_s = sum(grid.full_s(chunk_tokens, 0) for grid in grids_L)
    chunks_s = sum(grid.full_s(chunk_tokens, index * chunk_tokens) for grid in grids_L for index in range(count))
    saved_s = (chunks_s - seconds_a_layer(count * chunk_tokens) * len(grids_L)) / (count - 1)
    # A boundary cannot save more than a chunk; noise can say that it does, or that it costs something.
    return EnginePass(pass_tokens=pass_tokens, chunk_tokens=chunk_tokens, saved_s=min(max(0.0, saved_s), first_s))
