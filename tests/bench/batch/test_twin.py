"""The live executor and the simulated device are twins: over ports that sleep as long as the costs say, times agree."""

from __future__ import annotations

import time
from dataclasses import replace

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
TOLERANCE = 0.15
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
    """Times to first token, and how much longer than asked the sleeps of compute were."""
    link, requests = FakeLink(), []
    for problem in problems:
        fake = FakeRequest(problem, link, load_s=CELL_S)
        fake.compute = SleepingCompute(fake.buffer, cell_s=CELL_S)
        fake.transfer.num_bytes = CELL_BYTES
        requests.append(fake)
    scheduler = BatchScheduler(contender.make(), LiveRates(bytes_per_s=LINK.bytes_per_s))
    with BatchExecutor(scheduler) as executor:
        handles = executor.submit_all([each.request() for each in requests])
    reports = [handle.result(0).report for handle in handles]
    spans = [span for report in reports for span in report.spans if span.lane.value == "compute" and span.chunk >= 0]
    stretch = np.mean([(span.end_s - span.start_s) / (span.block_hi - span.block_lo) for span in spans]) / CELL_S
    return np.array([report.ttft_s for report in reports]), float(stretch)


def worst_error(contender, problems):
    live_s, stretch = live_ttft_s(contender, problems)
    truths = [
        replace(
            each,
            compute_KB=each.compute_KB * stretch,
            kv_only_KB=each.kv_only_KB * stretch,
            suffix_B=each.suffix_B * stretch,
        )
        for each in problems
    ]
    together = BatchCase(problems=problems, arrivals_s=[0.0] * len(problems), deadlines_s=[1.0] * len(problems))
    simulated_s = np.array(simulate_batch(contender, together, truths).ttft_s)
    return float((np.abs(live_s - simulated_s) / simulated_s).max())


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_live_times_are_the_simulated_ones(name):
    problems = [uniform_problem(num_chunks) for num_chunks in CHUNKS]
    errors = []
    for _ in range(ATTEMPTS):
        errors.append(worst_error(find_contender(name), problems))
        if errors[-1] < TOLERANCE:
            return
    pytest.fail(f"simulated and live times differ by {errors}")
