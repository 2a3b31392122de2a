"""Whole restorations, both threads and all, on a device that does its work late."""

import random
from functools import lru_cache

import pytest
import torch

from cacheflow.embedded.restorer import Restorer, RestoreRequest
from cacheflow.engine.pinned_link import PinnedLinkPort, PinnedPrefix
from cacheflow.plan.problem import LinkCost, RestoreProblem, cell_bytes_KB
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import Lane
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from support.engine_cases import prefilled, same_kv
from support.fake_device import NONE_GOES_ON, FakeDevice, LateRunner

PATIENT = ExecutorOptions(deadline=ReadDeadline(floor_s=30.0), max_reads_in_flight=8)
CELL_S = 0.002


@lru_cache
def case_of(suffix):
    return prefilled("llama", "bfloat16", suffix_ends=(120, 131) if suffix else ())


def problem_of(case, bytes_per_s):
    grid, shape = case.grid, case.runner.model.shape
    cells = (grid.num_chunks, grid.num_blocks)
    return RestoreProblem(
        grid=grid,
        compute_KB=torch.full(cells, CELL_S, dtype=torch.float64).numpy(),
        kv_only_KB=torch.full(cells, CELL_S / 4, dtype=torch.float64).numpy(),
        load_bytes_KB=cell_bytes_KB(shape, grid, layers_per_block=1),
        link=LinkCost(bytes_per_s=bytes_per_s),
        suffix_B=torch.full((grid.num_blocks,), CELL_S, dtype=torch.float64).numpy(),
        head_s=CELL_S / 4 if grid.suffix_ends else 0.0,
    )


@pytest.mark.parametrize("suffix", [True, False])
@pytest.mark.parametrize("name", list(RESTORE_POLICIES))
@pytest.mark.parametrize("seed", range(2))
def test_every_policy_is_exact_and_reports_what_the_device_did(name, seed, suffix):
    case, rng = case_of(suffix), random.Random(seed)
    device = FakeDevice(lambda num_ready: NONE_GOES_ON if rng.random() < 0.8 else rng.randrange(num_ready))
    runner = LateRunner(case.runner.model, device)
    problem = problem_of(case, case.geometry.max_cell_bytes / CELL_S)
    kv = runner.new_kv(case.saved.capacity)
    prefix = PinnedPrefix.save(case.saved, case.geometry)
    restorer = Restorer(
        runner=runner,
        policy=make_policy(name),
        rates=LiveRates(bytes_per_s=problem.link.bytes_per_s),
        options=PATIENT,
    )
    request = RestoreRequest(tokens=case.tokens, problem=problem, kv=kv)
    port = PinnedLinkPort(prefix, kv=kv, bytes_per_s=problem.link.bytes_per_s)
    restored = restorer.restore(request, port)
    device.finish()
    assert same_kv(case, kv)
    if suffix:
        assert torch.equal(restored.logits, case.logits)
    report = restored.report
    spans = [span for span in report.spans if span.lane is Lane.COMPUTE]
    launched = device.asked["compute", "launch"]
    # Seconds of the device's own clock: one for each launch that was timed.
    assert sum(span.end_s - span.start_s for span in spans) == launched
    covered = {
        (span.chunk, block) for span in spans if span.chunk >= 0 for block in range(span.block_lo, span.block_hi)
    }
    computed = {
        (chunk, block) for chunk, row in enumerate(report.cells_KB) for block, cell in enumerate(row) if cell == "c"
    }
    assert covered >= computed
    if launched:
        assert restorer.rates.compute_factor > 1.0  # a launch takes a second of this device, not milliseconds
