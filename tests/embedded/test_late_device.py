"""Whole restorations, both threads and all, on a device that does its work late."""

import random
import threading
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from cacheflow.embedded.restorer import Restorer, RestoreRequest
from cacheflow.engine.pinned_link import PinnedLinkPort, PinnedPrefix
from cacheflow.engine.saver import PrefixSaver
from cacheflow.engine.transfer_port import StoreTransferPort
from cacheflow.errors import RestoreCancelled
from cacheflow.plan.problem import LinkCost, RestoreProblem, cell_bytes_KB
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import Lane
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.restore.batch import BatchRequest, Prepared
from cacheflow.restore.executor import BatchExecutor
from cacheflow.state.batch import BatchScheduler
from cacheflow.stores.keys import chain_hashes
from cacheflow.stores.memory import MemoryStore
from support.engine_cases import prefilled, same_kv
from support.fake_device import NONE_GOES_ON, FakeDevice, LateRunner
from support.lending import lending
from support.patience import PATIENT

EIGHT_READS = replace(PATIENT, max_reads_in_flight=8)
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


def late_device(seed, *, idle=0.8):
    rng = random.Random(seed)
    return FakeDevice(
        lambda num_ready: NONE_GOES_ON if rng.random() < idle else rng.randrange(num_ready), favours=rng.choice((0, -1))
    )


@pytest.fixture(scope="module", params=["copied", "lent"])
def store(request):
    """Has the prefix of the case."""
    case = case_of(True)
    with MemoryStore(capacity_bytes=64 << 20, num_threads=2) as store:
        if request.param == "lent":
            lending(store)
        saver = PrefixSaver(store, geometry=case.geometry, **names(case))
        saver.save_prefix(case.saved)
        assert saver.wait(30.0).complete
        yield store


def names(case):
    return {"namespace": "0" * 32, "chain_hashes": chain_hashes(case.tokens, case.grid.chunk_ends)}


@pytest.mark.parametrize("suffix", [True, False])
@pytest.mark.parametrize("name", list(RESTORE_POLICIES))
@pytest.mark.parametrize("seed", range(2))
def test_every_policy_is_exact_and_reports_what_the_device_did(name, seed, suffix):
    case, device = case_of(suffix), late_device(seed)
    runner = LateRunner(case.runner.model, device)
    problem = problem_of(case, case.geometry.max_cell_bytes / CELL_S)
    kv = runner.new_kv(case.saved.capacity)
    prefix = PinnedPrefix.save(case.saved, case.geometry)
    restorer = Restorer(
        runner=runner,
        policy=make_policy(name),
        rates=LiveRates(bytes_per_s=problem.link.bytes_per_s),
        options=EIGHT_READS,
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


@pytest.mark.parametrize("seed", range(6))
def test_a_restoration_that_is_given_up_leaves_nothing_that_harms_the_next(store, seed):
    """Its uploads may still be queued, from staging memory that the next one takes over."""
    case, device = case_of(True), late_device(seed, idle=0.95)
    runner = LateRunner(case.runner.model, device)
    problem = problem_of(case, case.geometry.max_cell_bytes / CELL_S)
    restorer = Restorer(
        runner=runner,
        policy=make_policy("load" if seed % 2 else "cacheflow"),
        rates=LiveRates(bytes_per_s=problem.link.bytes_per_s),
        options=EIGHT_READS,
    )

    def restore(cancel):
        kv = runner.new_kv(case.saved.capacity)
        request = RestoreRequest(tokens=case.tokens, problem=problem, kv=kv)
        port = StoreTransferPort(store, geometry=case.geometry, kv=kv, **names(case))
        return kv, restorer.restore(request, port, cancel=cancel)

    cancel, uploads = threading.Event(), 2 * seed
    device.on_ask = lambda: device.asked["up", "copy"] > uploads and cancel.set()
    with suppress(RestoreCancelled):
        restore(cancel)
    device.on_ask = lambda: None
    kv, restored = restore(threading.Event())
    device.finish()
    assert same_kv(case, kv)
    assert torch.equal(restored.logits, case.logits)


@pytest.mark.parametrize("seed", range(3))
def test_requests_of_a_batch_share_the_queue_of_one_device(store, seed):
    case, device = case_of(True), late_device(seed)
    runner = LateRunner(case.runner.model, device)
    problem = problem_of(case, case.geometry.max_cell_bytes / CELL_S)
    rates = LiveRates(bytes_per_s=problem.link.bytes_per_s)
    scheduler = BatchScheduler(make_batch_policy("mean_ttft", make_policy("cacheflow")), rates, min_claim_s=0.002)
    kvs = [runner.new_kv(case.saved.capacity) for _ in range(3)]
    computes = [case.new_port(kv, runner=runner) for kv in kvs]
    with BatchExecutor(scheduler, options=EIGHT_READS) as executor:
        handles = executor.submit_all(
            [
                BatchRequest(
                    problem=problem,
                    prepare=lambda running, kv=kv, compute=compute: Prepared(
                        problem=problem,
                        compute=compute,
                        transfer=StoreTransferPort(store, geometry=case.geometry, kv=kv, **names(case)),
                    ),
                )
                for kv, compute in zip(kvs, computes, strict=True)
            ]
        )
    device.finish()
    spans = [span for handle in handles for span in handle.result().report.spans if span.lane is Lane.COMPUTE]
    assert sum(span.end_s - span.start_s for span in spans) == device.asked["compute", "launch"]
    for kv, compute in zip(kvs, computes, strict=True):
        assert same_kv(case, kv)
        assert torch.equal(compute.logits, case.logits)
