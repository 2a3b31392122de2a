"""Twins: over ports that sleep as long as the costs say, the live executor serves as the simulated device does."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cacheflow.bench.batch.policies import CONTENDERS, find_contender
from cacheflow.bench.batch.simulate import BatchCase, simulate_batch
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.restore.executor import BatchExecutor
from cacheflow.state.batch import BatchScheduler
from support.batch_cases import FakeLink, FakeRequest
from support.fake_ports import FakeCompute

CELL_S, SUFFIX_S, CELL_BYTES, NUM_BLOCKS = 0.012, 0.003, 100_000, 8
LINK = LinkCost(bytes_per_s=CELL_BYTES / CELL_S)
CHUNKS = (2, 4, 1, 3)
ATTEMPTS = 4
"""A busy machine makes sleeps longer, some more than others; it cannot make them agree."""


class SleepingCompute(FakeCompute):
    """Its suffix takes time too."""

    def run_suffix(self, block_lo, block_hi):
        super().run_suffix(block_lo, block_hi)
        time.sleep(SUFFIX_S * (block_hi - block_lo))


def uniform_problem(num_chunks):
    cells = (num_chunks, NUM_BLOCKS)
    return RestoreProblem(
        grid=Grid.regular(num_tokens=512 * num_chunks, chunk_tokens=512, num_blocks=NUM_BLOCKS, suffix_tokens=64),
        compute_KB=np.full(cells, CELL_S),
        kv_only_KB=np.full(cells, CELL_S),
        load_bytes_KB=np.full(cells, CELL_BYTES),
        link=LINK,
        suffix_B=np.full(NUM_BLOCKS, SUFFIX_S),
    )


def live_ttft_s(contender, problems):
    link, requests = FakeLink(), []
    for problem in problems:
        fake = FakeRequest(problem, link, load_s=CELL_S)
        fake.compute = SleepingCompute(fake.buffer, cell_s=CELL_S)
        fake.transfer.num_bytes = CELL_BYTES
        requests.append(fake)
    scheduler = BatchScheduler(contender.make(), LiveRates(bytes_per_s=LINK.bytes_per_s))
    with BatchExecutor(scheduler) as executor:
        handles = executor.submit_all([each.request() for each in requests])
    return [handle.result(0).report.ttft_s for handle in handles]


def simulated_ttft_s(contender, problems):
    together = BatchCase(problems=problems, arrivals_s=[0.0] * len(problems), deadlines_s=[1.0] * len(problems))
    return simulate_batch(contender, together, problems).ttft_s


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_requests_have_their_first_tokens_in_the_simulated_sequence(name):
    """Each policy's own; how far their times are apart is for the batch benchmark to say."""
    problems = [uniform_problem(num_chunks) for num_chunks in CHUNKS]
    contender = find_contender(name)
    simulated = np.argsort(simulated_ttft_s(contender, problems)).tolist()
    assert any(np.argsort(live_ttft_s(contender, problems)).tolist() == simulated for _ in range(ATTEMPTS))
