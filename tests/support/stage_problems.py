"""Restorations over pipeline stages for tests: problems, plans and state machines of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cacheflow.model_shape import ModelShape
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.stages import RankLayout, StageProblem, stage_problems
from cacheflow.policies.registry import make_policy
from cacheflow.policies.stages import plan_stages
from cacheflow.restore.pipeline import PipelineRestoration
from cacheflow.state.restoration import RestoreState
from support.problems import transformer_problem
from support.virtual_steps import target_for

BOUNDARY_BYTES_PER_TOKEN = 1536
"""Two cells' worth of a ``transformer_problem``, as with grouped-query attention."""

SHAPE = ModelShape(
    name="test", num_layers=16, hidden_size=192, num_q_heads=8, num_kv_heads=4, head_dim=48, intermediate_size=128,
    vocab_size=100, dtype="bfloat16",
)  # fmt: skip
"""Its boundary states are as many bytes as one layer's keys and values of a ``transformer_problem``."""


def stage_problem(
    source: BoundarySource, *, boundary_bytes_per_token: int = BOUNDARY_BYTES_PER_TOKEN, **kwargs
) -> RestoreProblem:
    problem = transformer_problem(suffix_tokens=0, **kwargs)
    if source is not BoundarySource.STORED:
        return problem
    ranges = [problem.grid.chunk_range(chunk) for chunk in range(problem.grid.num_chunks)]
    boundary_K = np.array([(end - start) * boundary_bytes_per_token for start, end in ranges], dtype=np.int64)
    return replace(problem, boundary_bytes_K=boundary_K)


def staged_for(
    problems: Sequence[RestoreProblem], sources: Sequence[BoundarySource], *, policy: str = "cacheflow", **kwargs
) -> PipelineRestoration:
    states = [
        RestoreState(problem, plan, LiveRates(bytes_per_s=problem.link.bytes_per_s), source=source)
        for problem, plan, source in zip(
            problems, plan_stages(make_policy(policy), problems, sources), sources, strict=True
        )
    ]
    return PipelineRestoration(target_for(problems[0]), states, **kwargs)


def stages_of(
    num_stages: int, *, later: BoundarySource = BoundarySource.STORED, tp: int = 1, link_per_rank: bool = True, **kwargs
) -> tuple[StageProblem, ...]:
    problem = transformer_problem(**{"num_blocks": SHAPE.num_layers, "num_tokens": 8192, **kwargs})
    layout = RankLayout(pipeline_parallel_size=num_stages, tensor_parallel_size=tp, link_per_rank=link_per_rank)
    return stage_problems(problem, SHAPE, layout, later)
