from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.sim.kv_cache import BlockLru, KvCache


def test_the_least_recently_used_prefix_goes_first_and_from_its_end():
    tier = BlockLru(4)
    tier.put((1, 2))
    tier.put((5, 6))
    tier.put((1,))
    tier.put((9,))
    assert [tier.run(ids, 9) for ids in ((1, 2), (5, 6), (9,))] == [1, 2, 1]
    assert (len(tier), tier.num_evicted) == (4, 1)


def test_of_a_prompt_longer_than_the_tier_the_head_is_held():
    tier = BlockLru(3)
    tier.put(tuple(range(10)))
    assert tier.run(tuple(range(10)), 10) == 3
    nothing = BlockLru(0)
    nothing.put((1, 2))
    assert nothing.run((1, 2), 2) == 0


def test_what_a_request_holds_is_not_evicted_for_another():
    cache = KvCache(4)
    first = cache.lease((1, 2, 3), 3, limit=2)
    cache.publish(first, (1, 2))
    assert cache.lease((7, 8), 2, limit=1) is None
    assert cache.num_free == 1
    cache.release(first)
    second = cache.lease((1, 9, 8, 7), 4, limit=2)
    assert second.shared == (1,)
    assert 1 in cache
    assert 2 not in cache


def test_two_requests_that_compute_the_same_prefix_end_with_one_copy():
    cache = KvCache(10)
    leases = [cache.lease((1, 2, 3), 4, limit=3) for _ in range(2)]
    assert cache.num_free == 2
    for lease in leases:
        cache.publish(lease, (1, 2, 3))
    assert cache.num_free == 5
    for lease in leases:
        cache.release(lease)
    assert (cache.num_free, cache.num_idle) == (7, 3)


def test_a_prefix_counts_up_to_the_limit():
    cache = KvCache(10)
    lease = cache.lease((1, 2, 3), 3, limit=3)
    cache.publish(lease, (1, 2, 3))
    assert cache.run((1, 2, 3), 2) == 2
    assert cache.run((1, 2, 4), 3) == 2


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="0 blocks holds no request"):
        KvCache(0)
    with pytest.raises(ConfigError, match="-1 blocks cannot be"):
        BlockLru(-1)


def prompt(rng: random.Random) -> tuple[int, ...]:
    """A path in a tree: the id of a block is its path, so that equal ids mean equal prefixes."""
    node, path = 1, []
    for _ in range(rng.randint(1, 7)):
        node = node * 3 + rng.randrange(2)
        path.append(node)
    return tuple(path)


@given(seed=st.integers(0, 10**6), capacity=st.integers(1, 30))
def test_capacity_is_kept_and_what_is_held_is_always_a_run_from_the_first_block(seed, capacity):
    rng = random.Random(seed)
    held: set[int] = set()
    cache = KvCache(capacity, changed=lambda block, there: held.add(block) if there else held.remove(block))
    tier = BlockLru(capacity // 2)
    running = []
    for _ in range(60):
        if running and rng.random() < 0.45:
            lease, block_ids = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.8:
                cache.publish(lease, block_ids)
                tier.put(block_ids)
            cache.release(lease)
        else:
            block_ids = prompt(rng)
            lease = cache.lease(block_ids, len(block_ids) + rng.randint(0, 3), limit=len(block_ids))
            if lease is not None:
                running.append((lease, block_ids))
        asked = prompt(rng)
        assert cache.num_free >= 0
        assert len(tier) <= tier.capacity
        assert cache.run(asked, 7) == next((i for i, block in enumerate(asked) if block not in held), len(asked))
        for block in held:
            assert block // 3 == 1 or block // 3 in held, "an end outlived its beginning"
    for lease, _ in running:
        cache.release(lease)
    assert cache.num_free + cache.num_idle == capacity
    assert cache.num_idle == len(held)
