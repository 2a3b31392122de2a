"""One pipeline stage as the decider sees it: what its ranks found out, and what was seen of its link and compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cacheflow.errors import CostRangeError
from cacheflow.plan.costs import CostTable, build_problem, prefill_s
from cacheflow.plan.grid import Grid
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource, LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.tiers import over_tiers
from cacheflow.vllm.facts import EngineFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpan:
    """Which tokens are restored.

    Attributes:
        start: The first, a multiple of the block size.
        end: One past the last, the end of a chunk.
        chunk_tokens: Tokens of a chunk.
        num_tokens: Tokens of the prompt, where vLLM may still prefill all of it; None where it may not.
        tiers: Of each chunk the tier of the store that it lies in; empty where there is one.
        tier_rates: Bandwidth of each tier, None where it is not known.
    """

    start: int
    end: int
    chunk_tokens: int
    num_tokens: int | None = None
    tiers: tuple[int, ...] = ()
    tier_rates: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagePlan:
    """How one pipeline stage is to restore its layers.

    Attributes:
        problem: Costs.
        plan: The policy's plan.
        source: Where the activations below its first layer come from.
    """

    problem: RestoreProblem
    plan: RestorePlan
    source: BoundarySource = BoundarySource.FIRST_STAGE


class StagePlanner:
    """Plans one stage's share of a restoration.

    Attributes:
        facts: Of the slowest of its tensor-parallel ranks, all of which do the same work.
        rates: What compute and the link were seen to do; every restoration corrects them.
    """

    def __init__(self, facts: EngineFacts) -> None:
        self.facts = facts
        self.rates = LiveRates(bytes_per_s=facts.link.bytes_per_s)

    def sources(self, *, num_boundaries: int, below: BoundarySource | None) -> list[BoundarySource]:
        """Where the activations below its first layer can come from, at least one.

        The store holds boundary states of ``num_boundaries`` leading chunks; those of the stage below come from
        ``below``, None for the first stage.
        """
        if below is None:
            return [BoundarySource.FIRST_STAGE]
        sources = []
        if self.facts.boundary_token_bytes > 0 and num_boundaries > 0:
            sources.append(BoundarySource.STORED)
        if self.facts.linked and below is not BoundarySource.NONE:
            sources.append(BoundarySource.HANDED_OVER)
        return sources or [BoundarySource.NONE]

    def recompute_s(self, stage: StagePlan) -> float:
        """Seconds to recompute all of it on this stage alone."""
        return float(stage.problem.compute_KB.sum()) * self.rates.compute_factor

    def problem(self, span: PlanSpan, *, stored: bool) -> RestoreProblem:
        """What restoring a span costs, as measured; ``stored``: chunks are recomputed from stored boundary states.

        Raises:
            CostRangeError: A chunk lies outside the measured range.
        """
        return over_tiers(self._over_one_link(span, stored=stored), span.tiers, span.tier_rates)

    def _over_one_link(self, span: PlanSpan, *, stored: bool) -> RestoreProblem:
        facts, start, end, chunk_tokens = self.facts, span.start, span.end, span.chunk_tokens
        first = start // chunk_tokens * chunk_tokens
        ends = tuple(range(first + chunk_tokens, end + 1, chunk_tokens))
        grid = Grid(ends, facts.num_blocks, start=start)
        link = LinkCost(bytes_per_s=self.rates.bytes_per_s, latency_s=facts.link.latency_s)
        if facts.costs is None:
            return _with_states(load_only_problem(grid, facts, link, object_tokens=chunk_tokens), facts)
        problem = build_problem(facts.costs, grid, facts.shape, link=link, layers_per_block=facts.layers_per_block)
        if span.num_tokens is not None:
            own_s = own_prefill_s(facts.costs, start=start, end=end, num_tokens=span.num_tokens)
            problem = dataclasses.replace(problem, prefill_s=own_s)
        if stored:
            boundary_bytes = chunk_tokens * facts.boundary_token_bytes
            problem = dataclasses.replace(
                problem, boundary_bytes_K=np.full(grid.num_chunks, boundary_bytes, dtype=np.int64)
            )
        if first == start:
            return _with_states(problem, facts)
        # Objects are read whole: a first chunk of which a part is resident moves all its bytes.
        load_bytes_KB = problem.load_bytes_KB.copy()
        load_bytes_KB[0] = load_bytes_KB[0] * chunk_tokens // (ends[0] - start)
        return _with_states(dataclasses.replace(problem, load_bytes_KB=load_bytes_KB), facts)

    def corrected(self, problem: RestoreProblem) -> RestoreProblem:
        """The problem by what compute was seen to take."""
        return problem.slowed(self.rates.compute_factor)

    @property
    def measured_tokens(self) -> int:
        """Longest prefix the costs cover; a longer one is restored as far as they do."""
        costs = self.facts.costs
        if costs is None:
            return 1 << 62
        grids = [costs.kinds[kind] for kind in set(costs.layer_kinds)]
        return min(max(grid.offsets) + max(grid.chunk_tokens) for grid in grids)


def _with_states(problem: RestoreProblem, facts: EngineFacts) -> RestoreProblem:
    """The problem of a model with recurrent layers: the cells of the last chunk bring the states at its end too."""
    if not facts.recurrent:
        return problem
    states_B = np.array(facts.state_bytes_B, dtype=np.int64)
    load_bytes_KB = problem.load_bytes_KB.copy()
    load_bytes_KB[-1] += states_B
    return dataclasses.replace(problem, load_bytes_KB=load_bytes_KB, recurrent_B=states_B > 0)


def slowest_rank_of_each_stage(ranks: Iterable[EngineFacts]) -> list[EngineFacts]:
    """Of each pipeline stage the rank with the slowest link, bottom stage first."""
    by_stage: dict[int, EngineFacts] = {}
    for facts in ranks:
        known = by_stage.get(facts.shard.pp_rank)
        if known is None or facts.link.bytes_per_s < known.link.bytes_per_s:
            by_stage[facts.shard.pp_rank] = facts
    return [by_stage[stage] for stage in sorted(by_stage)]


def own_prefill_s(costs: CostTable, *, start: int, end: int, num_tokens: int) -> float | None:
    """Seconds by which vLLM's prefill of the whole rest of a prompt is longer than that of what comes after ``end``."""
    try:
        whole_s = prefill_s(costs, start=start, end=num_tokens)
        after_s = prefill_s(costs, start=end, end=num_tokens)
    except CostRangeError:
        return None  # a prompt longer than the costs reach; the chunks to be restored lie within
    return None if whole_s is None or after_s is None else max(0.0, whole_s - after_s)


def load_only_problem(grid: Grid, facts: EngineFacts, link: LinkCost, *, object_tokens: int) -> RestoreProblem:
    """What loading costs in an engine that cannot recompute."""
    free_KB = np.zeros((grid.num_chunks, facts.num_blocks))
    bytes_B = object_tokens * np.array(facts.shape.kv_bytes_per_token_B(facts.layers_per_block), dtype=np.int64)
    return RestoreProblem(
        grid=grid,
        compute_KB=free_KB,
        kv_only_KB=free_KB,
        load_bytes_KB=np.tile(bytes_B, (grid.num_chunks, 1)),
        link=link,
    )
