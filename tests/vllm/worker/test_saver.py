"""Chunks are copied at once and written behind the caller's back, which never waits for the store; no vLLM needed."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from cacheflow.plan.grid import block_layers
from cacheflow.stores.base import GetRequest, PutOutcome
from cacheflow.stores.keys import RankKeys
from cacheflow.stores.memory import MemoryStore
from cacheflow.types import LoadOutcome
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.step import SaveWork
from cacheflow.vllm.worker import saver as saver_module
from cacheflow.vllm.worker.layout import BlockLayout, LayerView
from cacheflow.vllm.worker.saver import ChunkSaver

pytestmark = pytest.mark.torch

NAMESPACE, SIZE, LAYERS, PER_BLOCK, NUM_BLOCKS = "a" * 32, 4, 5, 2, 12
THREAD = "cacheflow-save"


@dataclass
class Case:
    """A saver over random KV blocks, and a store that can be made to hang where it is asked.

    ``heads``: of each layer.
    """

    heads: tuple[int, ...]
    store: MemoryStore = field(default_factory=lambda: MemoryStore(capacity_bytes=1 << 20))
    counts: Counts = field(default_factory=Counts)
    go_on: threading.Event = field(default_factory=threading.Event)
    asked_by: list[str] = field(default_factory=list)
    num_answered: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        views = [
            LayerView(f"layers.{n}", torch.randn(NUM_BLOCKS, self.heads[n], SIZE, 3).bfloat16()) for n in range(LAYERS)
        ]
        self.layout = BlockLayout(views, block_size=SIZE, layout_name="LBHNC")
        self.go_on.set()
        contains = self.store.contains

        def slowly(keys):
            self.asked_by.append(threading.current_thread().name)
            self.go_on.wait(20)
            self.num_answered += 1
            return contains(keys)

        self.store.contains = slowly
        self.saver = ChunkSaver(
            self.store, self.layout, layers_per_block=PER_BLOCK, keys=RankKeys(), counts=self.counts
        )

    @property
    def chunk_bytes(self) -> int:
        return self.layout.num_bytes(0, LAYERS, 2)

    def save(self, *chunks: int) -> None:
        self.saver.save([order(chunk) for chunk in chunks])

    def saved(self, *chunks: int) -> dict[str, int]:
        """What is counted of these chunks in the end."""
        self.save(*chunks)
        assert self.saver.wait(20)
        return self.take()

    def take(self) -> dict[str, int]:
        return self.counts.take().get("chunks_saved", {})

    def gathered(self, chunk: int, layers: tuple[int, int]) -> np.ndarray:
        out = np.empty(self.layout.num_bytes(*layers, 2), dtype=np.uint8)
        self.layout.gather(*layers, order(chunk).block_ids, out)
        return out

    def read(self, chunk: int, layers: tuple[int, int]) -> tuple[LoadOutcome | None, np.ndarray]:
        buffer = np.zeros(self.layout.num_bytes(*layers, 2), dtype=np.uint8)
        key = RankKeys().kv(NAMESPACE, order(chunk).chain_hash, layers)
        (outcome,) = self.store.submit_get([GetRequest(key, buffer)]).wait(20)
        return outcome, buffer


def order(chunk):
    return SaveWork(namespace=NAMESPACE, chain_hash=f"{chunk:064x}", block_ids=(2 * chunk, 2 * chunk + 1))


def threads():
    return [each for each in threading.enumerate() if each.name == THREAD]


@pytest.fixture(params=[(2,) * LAYERS, (2, 1, 1, 1, 4)], ids=["alike", "different"])
def case(request):
    case = Case(request.param)
    yield case
    case.go_on.set()
    case.saver.close()
    case.store.close()
    for thread in threads():
        thread.join(20)
    assert not threads()


ROWS = [block_layers(block, PER_BLOCK, LAYERS) for block in range(3)]


def test_what_is_in_the_blocks_at_the_call_is_what_is_stored(case):
    before = {(chunk, layers): case.gathered(chunk, layers) for chunk in (0, 3) for layers in ROWS}
    case.go_on.clear()
    case.save(0, 3)
    case.layout.scatter(
        0, LAYERS, list(range(NUM_BLOCKS)), np.zeros(case.layout.num_bytes(0, LAYERS, NUM_BLOCKS), np.uint8)
    )
    case.go_on.set()
    assert case.saver.wait(20)
    assert case.take() == {"stored": 2}
    for (chunk, layers), payload in before.items():
        outcome, read = case.read(chunk, layers)
        assert outcome is LoadOutcome.OK
        assert np.array_equal(read, payload)


def test_the_store_is_asked_on_another_thread(case):
    assert case.saved(1) == {"stored": 1}
    assert case.saved(1) == {"exists": 1}
    assert case.asked_by == [THREAD, THREAD]


def test_of_a_chunk_that_lost_objects_only_those_are_written(case):
    case.saved(1)
    lost = RankKeys().kv(NAMESPACE, order(1).chain_hash, ROWS[1])
    assert case.store.delete([lost]) == 1
    assert case.saved(1) == {"stored": 1}
    puts = case.store.stats().put_outcomes
    assert (puts[PutOutcome.STORED], puts[PutOutcome.EXISTS]) == (len(ROWS) + 1, 0)
    assert case.read(1, ROWS[1])[0] is LoadOutcome.OK


def test_a_store_that_hangs_where_it_is_asked_holds_nobody_up(case, monkeypatch):
    """What fits is copied, the rest is skipped and counted; once the store is back, all goes on."""
    monkeypatch.setattr(saver_module, "MAX_PENDING_BYTES", 3 * case.chunk_bytes)
    case.go_on.clear()
    for chunk in range(5):
        case.save(chunk)
    assert not case.saver.wait(0.05)
    assert case.num_answered == 0, "a call waited until the store came back by itself"
    assert case.take() == {"skipped": 2}
    case.go_on.set()
    assert case.saver.wait(20)
    assert case.take() == {"stored": 3}
    assert case.saved(3, 4) == {"stored": 2}


def test_what_is_on_its_way_is_not_copied_again(case, monkeypatch):
    monkeypatch.setattr(saver_module, "MAX_PENDING_BYTES", case.chunk_bytes)
    case.go_on.clear()
    case.save(2, 2)
    case.save(2)
    case.go_on.set()
    assert case.saver.wait(20)
    assert case.take() == {"exists": 2, "stored": 1}
    assert len(case.asked_by) == 1


def test_a_store_that_raises_costs_the_chunk_and_not_the_next(case, caplog):
    contains = case.store.contains
    case.store.contains = lambda keys: 1 / 0
    assert case.saved(1) == {"failed": 1}
    assert "could not be saved" in caplog.text
    case.store.contains = contains
    assert case.saved(1) == {"stored": 1}


def test_the_end_does_not_wait_for_a_store_that_hangs(case, monkeypatch, caplog):
    monkeypatch.setattr(saver_module, "CLOSE_S", 0.05)
    case.go_on.clear()
    case.save(0, 1)
    case.saver.close()
    assert "2 chunks were not written in time" in caplog.text
    case.go_on.set()
    for thread in threads():
        thread.join(20)
    assert case.store.stats().num_objects == 0, "written after the end"


def test_nor_for_a_write_that_hangs(case, monkeypatch, caplog):
    monkeypatch.setattr(saver_module, "CLOSE_S", 0.05)
    begun, go_on, ended = threading.Event(), threading.Event(), []

    def hangs(key, parts, *, replace):
        begun.set()
        go_on.wait(20)
        ended.append(key)
        return PutOutcome.STORED

    monkeypatch.setattr(case.store, "write_record", hangs)
    case.save(0)
    assert begun.wait(20)
    case.saver.close()
    assert not ended, "the end waited until the write came back by itself"
    assert "1 chunks were not written in time" in caplog.text
    go_on.set()
