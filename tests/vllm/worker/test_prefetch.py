"""What a rank has the store bring of a prefix: the objects that its saver writes, by their names and sizes."""

import pytest

pytest.importorskip("torch")

import numpy as np
import torch

from cacheflow.stores.base import PrefetchOutcome, PutRequest
from cacheflow.stores.keys import Shard, key_of
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.step import PrefetchWork, SaveWork
from cacheflow.vllm.worker.layout import BlockLayout, LayerView
from cacheflow.vllm.worker.prefetch import PrefixPrefetch
from cacheflow.vllm.worker.saver import ChunkSaver
from cacheflow.vllm.worker.state_blocks import StateBlocks
from support.scheduler_cases import facts
from support.waiting import eventually

pytestmark = pytest.mark.torch

NAMESPACE, CHAIN = "a" * 32, tuple(f"{index:064x}" for index in range(3))
SIZE, ROWS, PER_BLOCK, NUM_BLOCKS, CHUNK_BLOCKS = 4, 3, 2, 9, 2
BOUNDARY_BYTES = 24


def layout_of(heads=(2, 1, 4)):
    views = [LayerView(f"a{n}", torch.randn(NUM_BLOCKS, heads[n], SIZE, 3).bfloat16()) for n in range(ROWS)]
    return BlockLayout(views, block_size=SIZE, layout_name="LBHNC")


def states_of_rows():
    views = [LayerView(f"s{n}", torch.zeros(NUM_BLOCKS, 1, 10, dtype=torch.int8)) for n in range(2)]
    layout = BlockLayout(views, block_size=SIZE, layout_name="states")
    return StateBlocks(layout, group_L=(0, 0), layers_R=(0, 2, 0), num_groups=1)


class NotingTiers(TieredStore):
    def __init__(self):
        fast, slow = (MemoryStore(capacity_bytes=1 << 20) for _ in range(2))
        super().__init__({"fast": fast, "slow": slow})
        self.claims, self.asked = [], []

    def claim(self, chain_hashes, *, tenant):
        self.claims.append((tuple(chain_hashes), tenant))

    def prefetch(self, requests, **options):
        self.asked.append((list(requests), options))
        return super().prefetch(requests, **options)


@pytest.fixture
def store():
    with NotingTiers() as store:
        yield store


def saved(store, layout, of_rank, states=None):
    """Three chunks as the rank's saver writes them, and what later stages keep beside; names of all objects."""
    slow = store.tiers[1].store
    beside = [
        PutRequest(of_rank.keys.boundary(NAMESPACE, each), [np.zeros(BOUNDARY_BYTES * 8, np.uint8)], (1,), "uint8")
        for each in CHAIN
    ]
    saver = ChunkSaver(slow, layout, layers_per_block=PER_BLOCK, keys=of_rank.keys, counts=Counts(), states=states)
    works = [
        SaveWork(
            namespace=NAMESPACE, chain_hash=each, block_ids=(2 * n, 2 * n + 1), chunk=n,
            state_blocks=(5,) if states is not None and n == 2 else (),
        )
        for n, each in enumerate(CHAIN)
    ]  # fmt: skip
    saver.save(works)
    assert saver.wait(20)
    saver.close()
    if of_rank.boundary_token_bytes:
        slow.submit_put(beside).wait(20)
    return {key_of(name) for name in slow._index.sizes()}  # noqa: SLF001 -- there is no list of what a store holds


def brought(store, layout, of_rank, states=None, **options):
    prefetch = PrefixPrefetch(store, of_rank, layout, states, chunk_tokens=CHUNK_BLOCKS * SIZE)
    work = PrefetchWork(namespace=NAMESPACE, chain_hashes=CHAIN, tenant="t", within_s=60.0, **options)
    prefetch.carry_out(work)
    eventually(lambda: store.asked and not store._prefetcher._wanted)  # noqa: SLF001 -- counts do not say what waits
    prefetch.close()
    assert store.stats().prefetches[PrefetchOutcome.DROPPED] == 0
    return {key_of(name) for name in store.tiers[0].store._index.sizes()}  # noqa: SLF001 -- as above


def of_rank(**changes):
    return facts(**{"layers_per_block": PER_BLOCK, "block_size": SIZE, **changes})


@pytest.mark.parametrize(
    ("changes", "has_states"),
    [
        ({}, False),
        ({}, True),
        ({"first_layer": 7, "shard": Shard(tp_rank=1, tp_size=2, pp_rank=1, pp_size=2)}, False),
        ({"first_layer": 7, "shard": Shard(pp_rank=1, pp_size=2), "boundary_token_bytes": BOUNDARY_BYTES}, False),
    ],
)
def test_all_that_a_rank_saved_comes(store, changes, has_states):
    layout, states = layout_of(), states_of_rows() if has_states else None
    written = saved(store, layout, of_rank(**changes), states)
    assert len(written) == 3 * 2 + has_states + 3 * ("boundary_token_bytes" in changes)
    assert brought(store, layout, of_rank(**changes), states) == written
    ((requests, options),) = store.asked
    assert options == {"within_s": 60.0, "keep_s": 0.0}
    chunks = [each.key.chain_hash for each in requests]
    assert list(dict.fromkeys(chunks)) == [*CHAIN[::-1]], "the last chunk first"
    assert store.claims == [(CHAIN, "t")]


def test_how_long_it_stays_is_passed_on(store):
    layout = layout_of()
    saved(store, layout, of_rank())
    brought(store, layout, of_rank(), keep_s=90.0)
    assert store.asked[0][1] == {"within_s": 60.0, "keep_s": 90.0}
    eventually(lambda: store.tiers[0].store.stats().pinned_bytes == store.tiers[0].store.stats().used_bytes)


def test_of_what_all_ranks_have_the_first_brings_it(store):
    layout, shard = layout_of(), Shard(tp_rank=1, tp_size=2)
    replicated = {"replicated": True, "shard": shard, "boundary_token_bytes": BOUNDARY_BYTES}
    saved(store, layout, of_rank(replicated=True, boundary_token_bytes=BOUNDARY_BYTES))
    assert brought(store, layout, of_rank(**replicated)) == set()
    assert store.asked == [([], {"within_s": 60.0, "keep_s": 0.0})]
