"""Running states: copied out of and into blocks of several groups, read with a last chunk, written at the end."""

import numpy as np
import pytest
import torch

from cacheflow.plan.grid import Cell
from cacheflow.restore.work import RestoreTarget
from cacheflow.stores.base import GetRequest, PutRequest
from cacheflow.stores.keys import RankKeys
from cacheflow.stores.memory import MemoryStore
from cacheflow.types import LoadOutcome
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.step import SaveWork
from cacheflow.vllm.worker import saver as saver_module
from cacheflow.vllm.worker.checkpoint import Checkpoint
from cacheflow.vllm.worker.layout import BlockLayout, LayerView
from cacheflow.vllm.worker.saver import ChunkSaver
from cacheflow.vllm.worker.state_blocks import StateBlocks
from cacheflow.vllm.worker.transfer import VllmTransferPort, staging_pool

pytestmark = pytest.mark.torch

NAMESPACE, CHAIN = "a" * 32, tuple(f"{index}" * 64 for index in range(2))
SIZE, ROWS, NUM_BLOCKS = 4, 3, 9
LAYERS_R, GROUP_L = (2, 0, 3), (0, 1, 1, 0, 1)
"""Rows of unequal numbers of recurrent layers, dealt to two groups in no order."""
STATE_BYTES = 10
BLOCKS = (7, 2)


def new_states():
    torch.manual_seed(1)
    views = [
        LayerView(f"s{n}", torch.randint(0, 100, (NUM_BLOCKS, 1, STATE_BYTES), dtype=torch.int8)) for n in range(5)
    ]
    layout = BlockLayout(views, block_size=SIZE, layout_name="states")
    return StateBlocks(layout, group_L=GROUP_L, layers_R=LAYERS_R, num_groups=2)


def new_layout():
    views = [LayerView(f"a{n}", torch.randn(NUM_BLOCKS, 2, SIZE, 3).bfloat16()) for n in range(ROWS)]
    return BlockLayout(views, block_size=SIZE, layout_name="LBHNC")


def everything(states):
    """All bytes ``[L, N, P]``."""
    out = np.empty(states.layout.num_bytes(0, 5, NUM_BLOCKS), dtype=np.uint8)
    states.layout.gather(0, 5, range(NUM_BLOCKS), out)
    return out.reshape(5, NUM_BLOCKS, STATE_BYTES)


def gathered(states, rows, blocks=BLOCKS):
    out = np.empty(states.num_bytes(*rows), dtype=np.uint8)
    states.gather(*rows, blocks, out)
    return out


def test_each_layer_is_in_the_block_of_its_group():
    states = new_states()
    raw = everything(states)
    assert [states.num_bytes(row, row + 1) for row in range(ROWS)] == [20, 0, 30]
    assert np.array_equal(gathered(states, (0, 1)), np.concatenate([raw[0, 7], raw[1, 2]]))
    assert np.array_equal(gathered(states, (0, ROWS)), np.concatenate([raw[n, BLOCKS[GROUP_L[n]]] for n in range(5)]))
    assert gathered(states, (1, 2)).size == 0


def test_what_is_scattered_is_there_and_nothing_else_changes():
    states = new_states()
    before, payload = everything(states), np.arange(30, dtype=np.uint8)
    states.scatter(2, 3, BLOCKS, payload)
    assert np.array_equal(gathered(states, (2, 3)), payload)
    after = everything(states)
    for layer, part in zip((2, 3, 4), payload.reshape(3, -1), strict=True):
        before[layer, BLOCKS[GROUP_L[layer]]] = part
    assert np.array_equal(after, before)


def test_states_of_all_rows_are_copied_to_other_blocks():
    states = new_states()
    own = gathered(states, (0, ROWS))
    states.copy(BLOCKS, (4, 5))
    assert np.array_equal(gathered(states, (0, ROWS), (4, 5)), own)


@pytest.fixture
def store():
    with MemoryStore(capacity_bytes=1 << 20) as store:
        yield store


def new_port(store, layout, states, checkpoint):
    target = RestoreTarget(
        restore_id=0, request_id="r", start=0, object_start=0, chunk_ends=(8, 16), tokens=tuple(range(16)),
        block_ids=(8, 1, 6, 3), namespace=NAMESPACE, chain_hashes=CHAIN, state_blocks=BLOCKS,
    )  # fmt: skip
    pool = staging_pool(layout, states, chunk_tokens=8, layers_per_block=1)
    return VllmTransferPort(store, layout, target, pool=pool, checkpoint=checkpoint)


def put(store, key, payload):
    store.submit_put([PutRequest(key, [payload], payload.shape, "uint8")]).wait(5)


def test_a_cell_of_the_last_chunk_brings_states_that_are_written_at_the_end(store):
    layout, states = new_layout(), new_states()
    checkpoint, random = Checkpoint(states, BLOCKS), np.random.default_rng(3)
    kv, state = (random.integers(0, 256, size, dtype=np.uint8) for size in (layout.num_bytes(0, 1, 2), 20))
    put(store, RankKeys().kv(NAMESPACE, CHAIN[1], (0, 1)), kv)
    put(store, RankKeys().states(NAMESPACE, CHAIN[1], (0, 1)), state)
    port, before = new_port(store, layout, states, checkpoint), everything(states)
    ticket = port.start(Cell(1, 0), deadline_s=5)
    assert ticket.num_bytes == kv.size + state.size
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.OK
    port.place(ticket)
    out = np.empty(kv.size, dtype=np.uint8)
    layout.gather(0, 1, (6, 3), out)
    assert np.array_equal(out, kv)
    assert np.array_equal(everything(states), before)  # the head's running states may still be needed
    checkpoint.write()
    assert np.array_equal(gathered(states, (0, 1)), state)
    assert np.array_equal(gathered(states, (2, 3)), np.concatenate([before[n, BLOCKS[GROUP_L[n]]] for n in (2, 3, 4)]))


@pytest.mark.parametrize("lost", ["kv", "states"])
def test_without_either_of_the_two_the_read_fails(store, lost):
    layout, states = new_layout(), new_states()
    if lost != "kv":
        put(store, RankKeys().kv(NAMESPACE, CHAIN[1], (0, 1)), np.zeros(layout.num_bytes(0, 1, 2), np.uint8))
    if lost != "states":
        put(store, RankKeys().states(NAMESPACE, CHAIN[1], (0, 1)), np.zeros(20, np.uint8))
    port = new_port(store, layout, states, Checkpoint(states, BLOCKS))
    ticket = port.start(Cell(1, 0), deadline_s=5)
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.MISS
    port.cancel(ticket)


@pytest.mark.parametrize("cell", [Cell(0, 0), Cell(1, 1)], ids=["an earlier chunk", "a row without states"])
def test_other_cells_bring_no_states(store, cell):
    layout, states = new_layout(), new_states()
    size = layout.num_bytes(0, 1, 2)
    put(store, RankKeys().kv(NAMESPACE, CHAIN[cell.chunk], (cell.block, cell.block + 1)), np.zeros(size, np.uint8))
    port = new_port(store, layout, states, Checkpoint(states, BLOCKS))
    ticket = port.start(cell, deadline_s=5)
    assert ticket.num_bytes == size
    assert port.wait(ticket, timeout_s=5) is LoadOutcome.OK
    port.place(ticket)


# Saved


@pytest.fixture
def saver(store):
    layout, states = new_layout(), new_states()
    saver = ChunkSaver(store, layout, layers_per_block=1, keys=RankKeys(), counts=Counts(), states=states)
    yield saver
    saver.close()


def work(chunk=0, *, blocks=BLOCKS, keep=False):
    return SaveWork(
        namespace=NAMESPACE, chain_hash=CHAIN[chunk], block_ids=(chunk, chunk + 1), request_id="r", chunk=chunk,
        state_blocks=blocks, keep=keep,
    )  # fmt: skip


def state_keys(chunk=0):
    return [RankKeys().states(NAMESPACE, CHAIN[chunk], (row, row + 1)) for row in range(ROWS)]


def test_states_are_written_with_their_chunk(store, saver):
    own = gathered(new_states(), (2, 3))
    saver.save([work()])
    assert saver.wait(20)
    assert store.contains(state_keys()) == (True, False, True)  # the middle row has none
    assert store.contains([RankKeys().kv(NAMESPACE, CHAIN[0], (row, row + 1)) for row in range(ROWS)]) == (True,) * 3
    out = np.zeros(30, np.uint8)
    assert store.submit_get([GetRequest(state_keys()[2], out)]).wait(20) == (LoadOutcome.OK,)
    assert np.array_equal(out, own)


def test_of_a_request_that_goes_on_only_the_last_states_are_written_when_it_ends(store, saver):
    saver.save([work(0, keep=True)])
    saver.save([work(1, blocks=(1, 1), keep=True)])
    assert saver.wait(20)
    assert not any(store.contains([*state_keys(0), *state_keys(1)]))
    saver.write_kept(["another"])
    saver.write_kept(["r"])
    assert saver.wait(20)
    assert store.contains([*state_keys(0), *state_keys(1)]) == (False, False, False, True, False, True)


def test_where_a_chunk_finds_no_room_its_states_are_not_kept_either(store, saver, monkeypatch):
    monkeypatch.setattr(saver_module, "MAX_PENDING_BYTES", 10)
    saver.save([work(), work(1, keep=True)])
    saver.write_kept(["r"])
    assert saver.wait(20)
    assert not any(store.contains([*state_keys(0), *state_keys(1)]))
