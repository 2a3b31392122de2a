"""KV blocks on a device that does its work late, in whatever sequence streams and events allow; no vLLM needed."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.plan.grid import Cell, block_layers
from cacheflow.restore.work import RestoreTarget
from cacheflow.stores.base import PutRequest
from cacheflow.stores.keys import RankKeys
from cacheflow.stores.opening import open_store
from cacheflow.tensors.copy_lane import MAX_QUEUED, CopyLane
from cacheflow.types import LoadOutcome
from cacheflow.vllm.worker.layout import BlockLayout, LayerView
from cacheflow.vllm.worker.transfer import VllmTransferPort, staging_pool
from support.examples import examples
from support.fake_device import NONE_GOES_ON, FakeDevice
from support.lending import lending
from support.store_kinds import shm_url

pytestmark = pytest.mark.torch

NAMESPACE, CHUNK, SIZE, LAYERS, PER_BLOCK, NUM_BLOCKS = "a" * 32, 8, 4, 5, 2, 24
CELLS = [Cell(chunk, block) for chunk in range(2) for block in range(3)]


def lazy(num_ready):
    return NONE_GOES_ON


def random_device(seed, idle):
    rng = random.Random(seed)
    return FakeDevice(
        lambda num_ready: NONE_GOES_ON if rng.random() < idle else rng.randrange(num_ready), favours=rng.choice((0, -1))
    )


def new_layout(device):
    torch.manual_seed(0)
    views = [
        LayerView(f"layers.{index}", torch.randn(NUM_BLOCKS, heads, SIZE, 3).bfloat16())
        for index, heads in enumerate((2, 1, 1, 1, 4))
    ]
    return BlockLayout(views, block_size=SIZE, layout_name="LBHNC", lane=CopyLane(device)), views


def block_ids_of(number):
    return tuple(range(4 * number, 4 * number + 4))


def fill(store, num_prefixes):
    """Save two chunks for each of a few prefixes; their bytes by prefix and cell."""
    layout, _ = new_layout(FakeDevice(lazy))
    generator, payloads = np.random.default_rng(2), {}
    for number in range(num_prefixes):
        for cell in CELLS:
            layers = block_layers(cell.block, PER_BLOCK, LAYERS)
            size = layout.num_bytes(*layers, CHUNK // SIZE)
            payloads[number, cell] = generator.integers(0, 256, size, dtype=np.uint8)
            put(store, key_of(number, cell), payloads[number, cell])
    return payloads


def key_of(number, cell):
    return RankKeys().kv(NAMESPACE, chain(number)[cell.chunk], block_layers(cell.block, PER_BLOCK, LAYERS))


def put(store, key, data):
    store.submit_put([PutRequest(key, [data], data.shape, "uint8")]).wait(5)


@pytest.fixture(scope="module", params=["copied", "lent", "mapped"])
def saved(request):
    """A store with a few prefixes, and their bytes by prefix and cell."""
    url = shm_url(request) if request.param == "mapped" else "memory"
    with open_store(url, capacity_bytes=1 << 20) as store:
        if request.param != "copied":
            lending(store)
        yield store, fill(store, NUM_BLOCKS // 4)
        assert (store.stats().num_lent > 0) == (request.param != "copied")


def chain(number):
    return tuple(f"{2 * number + chunk:064x}" for chunk in range(2))


class Request:
    """One request: what others did with its blocks, its restoration, its forward, and what others do later."""

    def __init__(self, number, store, layout, views, pool, device):
        self.number, self.store, self.layout, self.views, self.pool = number, store, layout, views, pool
        self.device, self.ids = device, block_ids_of(number)
        self.read, self.tickets = [], []
        self.steps = [
            self.fill_by_others, self.begin, *[self.start] * len(CELLS), *[self.place] * len(CELLS),
            self.forward, self.fill_by_others,
        ]  # fmt: skip
        self.cells = list(CELLS)

    def fill_by_others(self):
        """Kernels of the blocks' owner before, or after."""

        def fill():
            for view in self.views:
                view.blocks_NI[list(self.ids)] = float("nan")

        self.device.compute.launch(fill)

    def begin(self):
        target = RestoreTarget(
            restore_id=self.number, request_id="r", start=0, object_start=0, chunk_ends=(8, 16),
            tokens=tuple(range(16)), block_ids=self.ids, namespace=NAMESPACE, chain_hashes=chain(self.number),
            layers_per_block=PER_BLOCK,
        )  # fmt: skip
        self.port = VllmTransferPort(self.store, self.layout, target, pool=self.pool, fence=self.layout.fence())

    def start(self):
        cell = self.cells.pop(0)
        self.tickets.append((cell, self.port.start(cell, deadline_s=60.0)))

    def place(self):
        _, ticket = self.tickets.pop(0)
        ticket.handle.wait(20.0)
        while (outcome := self.port.wait(ticket, timeout_s=0.0)) is None:  # no room for another upload
            with self.device.lock:
                self.device.step()
        assert outcome is LoadOutcome.OK
        self.port.place(ticket)

    def forward(self):
        """The request's own kernels, once its restoration was reported."""
        self.layout.see_placed()
        self.device.compute.launch(lambda: self.read.extend(v.blocks_NI[list(self.ids)].clone() for v in self.views))

    def is_right(self, payloads):
        for chunk, block in CELLS:
            lo, hi = block_layers(block, PER_BLOCK, LAYERS)
            of_layer = self.layout.by_layer(payloads[self.number, Cell(chunk, block)], lo, hi, 2)
            for layer, expected in zip(range(lo, hi), of_layer, strict=True):
                got = self.read[layer][2 * chunk : 2 * chunk + 2].contiguous().view(-1).view(torch.uint8).numpy()
                if not np.array_equal(got, expected.reshape(-1)):
                    return False
        return all(torch.isnan(view.blocks_NI[list(self.ids)]).all() for view in self.views)


@given(seed=st.integers(0, 2**32), idle=st.sampled_from([0.05, 0.5, 0.95, 1.0]), num_requests=st.integers(1, 5))
@settings(max_examples=examples(40))
def test_restored_bytes_are_right_however_late_the_device_works(saved, seed, idle, num_requests):
    """Of requests that are restored side by side, while blocks are handed from one to the next."""
    store, payloads = saved
    device, rng = random_device(seed, idle), random.Random(seed)
    layout, views = new_layout(device)
    pool = staging_pool(layout, chunk_tokens=CHUNK, layers_per_block=PER_BLOCK)
    requests = [Request(number, store, layout, views, pool, device) for number in range(num_requests)]
    while under_way := [request for request in requests if request.steps]:
        rng.choice(under_way).steps.pop(0)()
    assert device.host_waits == 0, "neither the worker's main thread nor the I/O thread waited for the device"
    device.finish()
    assert all(request.is_right(payloads) for request in requests)


class Overwritten(Request):
    """One whose records are gone as soon as they were placed; others of their size take their memory."""

    others = itertools.count()

    def place(self):
        cell, _ = self.tickets[0]
        super().place()
        self.store.delete([key_of(self.number, cell)])
        size = self.layout.num_bytes(*block_layers(cell.block, PER_BLOCK, LAYERS), CHUNK // SIZE)
        for _ in range(2):
            key = RankKeys().kv("b" * 32, f"{next(self.others):064x}", (0, 1))
            put(self.store, key, np.full(size, 255, np.uint8))


@given(seed=st.integers(0, 2**32), idle=st.sampled_from([0.05, 0.5, 0.95, 1.0]), num_requests=st.integers(1, 3))
@settings(max_examples=examples(20))
def test_a_lent_record_is_kept_until_its_upload_is_done(seed, idle, num_requests):
    device, rng = random_device(seed, idle), random.Random(seed)
    layout, views = new_layout(device)
    pool = staging_pool(layout, chunk_tokens=CHUNK, layers_per_block=PER_BLOCK)
    with open_store("memory", capacity_bytes=1 << 20) as store:
        lending(store)
        payloads = fill(store, num_requests)
        requests = [Overwritten(number, store, layout, views, pool, device) for number in range(num_requests)]
        while under_way := [request for request in requests if request.steps]:
            rng.choice(under_way).steps.pop(0)()
        assert device.host_waits == 0
        device.finish()
        assert all(request.is_right(payloads) for request in requests)


def restored(saved, device, number=0):
    layout, views = new_layout(device)
    pool = staging_pool(layout, chunk_tokens=CHUNK, layers_per_block=PER_BLOCK)
    request = Request(number, saved[0], layout, views, pool, device)
    device.asked.clear()
    for step in request.steps:
        step()
    return request


def test_a_cell_costs_one_kernel_call_one_event_and_no_wait_of_the_host(saved):
    device = FakeDevice(lambda num_ready: 0)
    restored(saved, device)
    assert device.asked["up", "send"] == len(CELLS)  # the numbers of its blocks
    assert device.asked["up", "launch"] == len(CELLS)
    assert device.asked["up", "record"] == len(CELLS)
    assert device.asked["up", "wait_for"] == len(CELLS)
    assert device.asked["compute", "record"] == 1, "one fence a restoration"
    assert device.asked["compute", "wait_for"] == 1, "one wait for all that was placed"
    assert device.host_waits == 0


def test_staging_memory_is_pinned_at_the_start(saved):
    device = FakeDevice(lambda num_ready: 0)
    layout, _ = new_layout(device)
    assert device.pinned_bytes == []
    pool = staging_pool(layout, chunk_tokens=CHUNK, layers_per_block=PER_BLOCK)
    pinned = list(device.pinned_bytes)
    held = [pool.take() for _ in range(2 * MAX_QUEUED)]  # as many as are read and uploaded at once
    assert pinned
    assert device.pinned_bytes == pinned
    assert len({buffer.tensor.data_ptr() for buffer in held}) == len(held)


def test_uploads_that_are_not_done_are_bounded(saved):
    device, most = FakeDevice(lazy), 0
    layout, views = new_layout(device)
    up = device.streams[1]
    pool = staging_pool(layout, chunk_tokens=CHUNK, layers_per_block=PER_BLOCK)
    requests = [Request(number, saved[0], layout, views, pool, device) for number in range(3)]

    def look():
        nonlocal most
        most = max(most, up.num_queued("record"))

    device.on_ask = look
    for request in requests:
        for step in request.steps:
            step()
    assert most == MAX_QUEUED < 3 * len(CELLS)
    device.finish()


def test_a_placement_waits_for_its_own_blocks_and_for_nothing_newer(saved):
    """Kernels and saves that are queued later hold it up no more."""
    device = FakeDevice(lazy)
    layout, views = new_layout(device)
    pool = staging_pool(layout, chunk_tokens=CHUNK, layers_per_block=PER_BLOCK)
    request = Request(0, saved[0], layout, views, pool, device)
    request.fill_by_others()
    request.begin()
    device.finish()
    device.compute.launch(lambda: None)
    layout.snapshot(0, LAYERS, block_ids_of(3), torch.empty(layout.num_bytes(0, LAYERS, 4), dtype=torch.uint8))
    layout.fence()
    request.start()
    request.place()
    up, queued = device.streams[1], len(device.compute.queue)
    with device.lock:
        while up.can_go_on:
            up.go_on()
    assert not up.queue
    assert len(device.compute.queue) == queued > 0
    # And it does wait for its own.
    late = Request(1, saved[0], layout, views, pool, device)
    late.begin()
    late.start()
    late.place()
    assert not up.can_go_on
    device.finish()
    assert not up.queue


@given(seed=st.integers(0, 2**32), idle=st.sampled_from([0.3, 0.9, 1.0]))
@settings(max_examples=examples(15))
def test_gather_scatter_and_copy_go_with_what_compute_does(seed, idle):
    device = random_device(seed, idle)
    layout, _ = new_layout(device)
    payload = np.random.default_rng(seed).integers(0, 256, layout.num_bytes(0, LAYERS, 2), dtype=np.uint8)
    out = np.zeros_like(payload)
    expected = payload.copy()
    layout.scatter(0, LAYERS, [3, 7], payload)
    payload[:] = 0  # it may change at once
    layout.copy([3, 7], [1, 2])
    layout.gather(0, LAYERS, [1, 2], out)
    assert np.array_equal(out, expected)
