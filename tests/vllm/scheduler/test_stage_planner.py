"""What a stage's rows cost, from what its workers found out; no vLLM needed."""

from dataclasses import replace

import pytest

from cacheflow.vllm.scheduler.stage_planner import PlanSpan, StagePlanner
from support.scheduler_cases import CHUNK, LAYERS, SHAPE, facts

BYTES_L = (64, 64, 256, 32)


@pytest.mark.parametrize(
    "changes", [{}, {"costs": None, "load_only_reason": "a test"}], ids=["recomputes", "only loads"]
)
@pytest.mark.parametrize(("per_block", "bytes_B"), [(1, BYTES_L), (3, (384, 32)), (LAYERS, (416,))])
def test_a_row_has_the_bytes_of_its_own_layers(changes, per_block, bytes_B):
    planner = StagePlanner(facts(shape=replace(SHAPE, kv_token_bytes=BYTES_L), layers_per_block=per_block, **changes))
    problem = planner.problem(PlanSpan(start=0, end=3 * CHUNK, chunk_tokens=CHUNK), stored=False)
    assert problem.load_bytes_KB.tolist() == [[CHUNK * each for each in bytes_B]] * 3


def test_a_first_chunk_that_is_partly_there_moves_whole_objects():
    planner = StagePlanner(facts(shape=replace(SHAPE, kv_token_bytes=BYTES_L)))
    problem = planner.problem(PlanSpan(start=CHUNK // 4, end=2 * CHUNK, chunk_tokens=CHUNK), stored=False)
    assert problem.load_bytes_KB.tolist() == [[CHUNK * each for each in BYTES_L]] * 2
