"""Reads land in staging, then in the KV blocks; no vLLM needed."""

import numpy as np
import pytest
import torch

from cacheflow.plan.grid import Boundary, Cell, block_layers
from cacheflow.restore.work import RestoreTarget
from cacheflow.stores.base import Priority, PutRequest
from cacheflow.stores.keys import RankKeys, Shard
from cacheflow.stores.memory import MemoryStore
from cacheflow.types import LoadOutcome
from cacheflow.vllm.worker.layout import BlockLayout, LayerView
from cacheflow.vllm.worker.transfer import BoundaryReads, VllmTransferPort, boundary_pool, staging_pool

pytestmark = pytest.mark.torch

NAMESPACE, CHAIN = "a" * 32, tuple(f"{index}" * 64 for index in range(2))
CHUNK, SIZE, LAYERS, PER_BLOCK = 8, 4, 5, 2
SHARD = Shard(tp_rank=1, tp_size=2)
STATES = 12
"""Bytes of a token's boundary states: two rows of 6."""


@pytest.fixture(params=[(2,) * LAYERS, (1, 2, 1, 4, 3)], ids=["alike", "different"])
def layout(request):
    """Of layers with so many heads each."""
    views = [
        LayerView(f"layers.{index}", torch.zeros(9, heads, SIZE, 3, dtype=torch.bfloat16))
        for index, heads in enumerate(request.param)
    ]
    return BlockLayout(views, block_size=SIZE, layout_name="LBHNC")


@pytest.fixture
def saved(layout):
    """A store with two chunks of random bytes, and the bytes by cell."""
    random = np.random.default_rng(2)
    with MemoryStore(capacity_bytes=1 << 20) as store:
        cells = {}
        for chunk in range(2):
            for block in range(3):
                layers = block_layers(block, PER_BLOCK, LAYERS)
                size = layout.num_bytes(*layers, CHUNK // SIZE)
                cells[chunk, block] = random.integers(0, 256, size, dtype=np.uint8)
                key = RankKeys(SHARD).kv(NAMESPACE, CHAIN[chunk], layers)
                store.submit_put([PutRequest(key, [cells[chunk, block]], (size,), "uint8")]).wait(5)
        yield store, cells


def new_port(store, layout, *, start=0, shard=SHARD, first_layer=0, given=None):
    target = RestoreTarget(
        restore_id=0, request_id="r", start=start, object_start=0, chunk_ends=(8, 16), tokens=tuple(range(start, 16)),
        block_ids=(7, 2, 5, 3), namespace=NAMESPACE, chain_hashes=CHAIN, layers_per_block=PER_BLOCK,
    )  # fmt: skip
    pool = staging_pool(layout, chunk_tokens=CHUNK, layers_per_block=PER_BLOCK)
    reads = None
    if given is not None:
        states = boundary_pool(layout, token_bytes=STATES, chunk_tokens=CHUNK)
        reads = BoundaryReads(
            pool=states,
            token_bytes=STATES,
            give=lambda chunk, packed, skip: given.update({chunk: (packed.numpy().copy(), skip)}),
        )
    return VllmTransferPort(store, layout, target, pool=pool, keys=RankKeys(shard, first_layer), boundaries=reads)


def gathered(layout, layers, block_ids):
    out = np.empty(layout.num_bytes(*layers, len(block_ids)), dtype=np.uint8)
    layout.gather(*layers, block_ids, out)
    return out


def test_cells_land_in_their_blocks_and_nowhere_else(layout, saved):
    store, cells = saved
    port = new_port(store, layout)
    ticket = port.start(Cell(1, 2), deadline_s=5)
    assert ticket.num_bytes == layout.num_bytes(4, 5, 2)  # the top block holds the one layer that is left
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.OK
    assert not gathered(layout, (0, LAYERS), range(9)).any()
    port.place(ticket)
    assert np.array_equal(gathered(layout, (4, 5), [5, 3]), cells[1, 2])
    assert not gathered(layout, (0, 4), range(9)).any()
    assert not gathered(layout, (4, 5), [0, 1, 2, 4, 6, 7, 8]).any()


def test_a_first_chunk_that_is_partly_there_keeps_its_blocks(layout, saved):
    store, cells = saved
    port = new_port(store, layout, start=4)
    ticket = port.start(Cell(0, 0), deadline_s=5)
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.OK
    port.place(ticket)
    second = [of_layer[1] for of_layer in layout.by_layer(cells[0, 0], 0, 2, 2)]
    assert np.array_equal(gathered(layout, (0, 2), [2]), np.concatenate(second))
    assert not gathered(layout, (0, 2), [7]).any()


def test_every_cell_of_a_prefix(layout, saved):
    store, cells = saved
    port = new_port(store, layout)
    tickets = [port.start(Cell(chunk, block), deadline_s=5) for chunk, block in cells]
    for ticket in tickets:
        assert port.wait(ticket, timeout_s=5) is LoadOutcome.OK
        port.place(ticket)
    for (chunk, block), payload in cells.items():
        block_ids = [(7, 2), (5, 3)][chunk]
        assert np.array_equal(gathered(layout, block_layers(block, PER_BLOCK, LAYERS), block_ids), payload)


def test_another_ranks_objects_are_misses(layout, saved):
    store, _ = saved
    port = new_port(store, layout, shard=Shard(tp_rank=0, tp_size=2))
    ticket = port.start(Cell(0, 0), deadline_s=5)
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.MISS
    port.cancel(ticket)


def test_staging_is_used_again(layout, saved):
    store, _ = saved
    port = new_port(store, layout)
    first = port.start(Cell(0, 0), deadline_s=5)
    port.wait(first, timeout_s=5)
    port.cancel(first)
    second = port.start(Cell(0, 1), deadline_s=5)
    assert second.staging is first.staging
    port.wait(second, timeout_s=5)
    port.place(second)


def test_boundary_states_go_before_cells_in_the_stores_queue(layout, saved, monkeypatch):
    store, _ = saved
    priorities, submit = [], store.submit_get

    def noting(requests, *, priority, deadline_s):
        priorities.append(priority)
        return submit(requests, priority=priority, deadline_s=deadline_s)

    monkeypatch.setattr(store, "submit_get", noting)
    port = new_port(store, layout, given={})
    for piece in (Cell(0, 0), Boundary(1)):
        port.cancel(port.start(piece, deadline_s=5))
    assert priorities == [Priority.READ, Priority.AWAITED]


def test_positions_inside_a_block_are_a_bug(layout, saved):
    with pytest.raises(ValueError, match="multiples of the block size 4"):
        new_port(saved[0], layout, start=3)


def save_boundary(store, *, layer, tp_size=2):
    payload = np.random.default_rng(layer).integers(0, 256, CHUNK * STATES, dtype=np.uint8)
    key = RankKeys(Shard(tp_size=tp_size), layer).boundary(NAMESPACE, CHAIN[1])
    store.submit_put([PutRequest(key, [payload], (payload.size,), "uint8")]).wait(5)
    return payload


def test_boundary_states_are_given_to_compute_and_touch_no_block(layout, saved):
    store, given = saved[0], {}
    payload = save_boundary(store, layer=3)
    port = new_port(store, layout, first_layer=3, given=given)
    ticket = port.start(Boundary(1), deadline_s=5)
    assert ticket.num_bytes == CHUNK * STATES
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.OK
    assert given == {}
    port.place(ticket)
    assert np.array_equal(given[1][0], payload)
    assert given[1][1] == 0
    assert not gathered(layout, (0, LAYERS), range(9)).any()


def test_a_chunk_that_is_partly_there_needs_the_states_of_the_rest(layout, saved):
    store, given = saved[0], {}
    payload = np.random.default_rng(0).integers(0, 256, CHUNK * STATES, dtype=np.uint8)
    key = RankKeys(Shard(tp_size=2), 3).boundary(NAMESPACE, CHAIN[0])
    store.submit_put([PutRequest(key, [payload], (payload.size,), "uint8")]).wait(5)
    port = new_port(store, layout, start=4, first_layer=3, given=given)
    ticket = port.start(Boundary(0), deadline_s=5)
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.OK
    port.place(ticket)
    assert np.array_equal(given[0][0], payload)
    assert given[0][1] == 4, "tokens that are there already"


@pytest.mark.parametrize("changes", [{"layer": 4}, {"layer": 3, "tp_size": 1}])
def test_states_of_another_layer_or_another_sum_are_misses(layout, saved, changes):
    save_boundary(saved[0], **changes)
    port = new_port(saved[0], layout, first_layer=3, given={})
    ticket = port.start(Boundary(1), deadline_s=5)
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.MISS
    port.cancel(ticket)


def test_a_stage_reads_the_layers_it_holds(layout, saved):
    """The same layers of the model, whichever stage asks for them."""
    store, cells = saved
    key = RankKeys(SHARD).kv(NAMESPACE, CHAIN[0], (7, 9))
    store.submit_put([PutRequest(key, [cells[1, 0]], (cells[1, 0].size,), "uint8")]).wait(5)
    port = new_port(store, layout, shard=Shard(tp_rank=1, tp_size=2, pp_rank=2, pp_size=3), first_layer=7)
    ticket = port.start(Cell(0, 0), deadline_s=5)
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.OK
    port.place(ticket)
    assert np.array_equal(gathered(layout, (0, 2), [7, 2]), cells[1, 0])


def test_a_stage_without_boundary_states_was_ordered_none(layout, saved):
    with pytest.raises(ValueError, match="reads no boundary states"):
        new_port(saved[0], layout).start(Boundary(1), deadline_s=5)
