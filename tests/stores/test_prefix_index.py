"""Finding the saved prefix of a prompt, chunk by chunk."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.stores.base import PutRequest
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.keys import Namespace, ObjectKey, ObjectKind, chain_hash, chain_hashes, chain_root, next_key
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.prefix_index import MAX_NOTED, PROBE_CHUNKS, find_prefix, note_partial_chunk
from support.examples import examples
from support.store_objects import NAMESPACE, TIMEOUT_S

CHUNK = 4
NUM_BLOCKS = 2


@pytest.fixture
def store():
    with MemoryStore(capacity_bytes=1 << 26) as opened:
        yield opened


def required(chain, namespace=NAMESPACE):
    return [
        ObjectKey(
            namespace=namespace.digest, chain_hash=chain.hex(), kind=ObjectKind.KV, layer_lo=block, layer_hi=block + 1
        )
        for block in range(NUM_BLOCKS)
    ]


def save(store, tokens, ends, salt=""):
    """Save chunks with these ends, noting the partial ones, as an engine does."""
    hashes = chain_hashes(tokens, ends, salt)
    parents = (chain_root(salt), *hashes)
    requests = [PutRequest(each, [b"kv"], (2,), "uint8") for chain in hashes for each in required(chain)]
    store.submit_put(requests).wait(TIMEOUT_S)
    for parent, start, end in zip(parents, (0, *ends), ends, strict=False):
        if end - start != CHUNK:
            assert note_partial_chunk(store, NAMESPACE, parent, end - start)
    return hashes


def find(store, tokens, **options):
    return find_prefix(store, NAMESPACE, tokens, chunk_tokens=CHUNK, required_keys=required, **options)


def test_nothing_is_found_in_an_empty_store(store):
    match = find(store, list(range(20)))
    assert (match.chunk_ends, match.chain_hashes, match.num_tokens, match.timed_out) == ((), (), 0, False)
    assert find(store, []).num_tokens == 0


def test_full_chunks_are_found_as_far_as_they_were_saved(store):
    hashes = save(store, list(range(12)), (4, 8, 12))
    match = find(store, list(range(30)))
    assert match.chunk_ends == (4, 8, 12)
    assert match.chain_hashes == hashes
    assert find(store, list(range(11))).chunk_ends == (4, 8)
    assert find(store, list(range(3))).chunk_ends == ()


def test_a_divergence_keeps_the_common_whole_chunks(store):
    save(store, list(range(12)), (4, 8, 12))
    assert find(store, [*range(9), 99, 98, 97]).chunk_ends == (4, 8)
    assert find(store, [99, *range(1, 12)]).chunk_ends == ()


def test_partial_chunks_are_followed_across_turns(store):
    conversation = list(range(100))
    ends = (4, 8, 10, 14, 17, 18, 22)  # turns ended at 10, 17 and 18
    save(store, conversation, ends)
    assert find(store, conversation).chunk_ends == ends
    assert find(store, conversation[:17]).chunk_ends == (4, 8, 10, 14, 17)
    assert find(store, conversation[:16]).chunk_ends == (4, 8, 10, 14)


def test_a_prompt_shorter_than_a_chunk_is_found_by_its_noted_length(store):
    save(store, [1, 2, 3], (3,))
    assert find(store, [1, 2, 3]).chunk_ends == (3,)
    assert find(store, [1, 2, 3, 4, 5, 6]).chunk_ends == (3,)
    assert find(store, [1, 2]).chunk_ends == ()


def test_a_full_chunk_is_preferred_then_the_longest_partial_one(store):
    tokens = list(range(20))
    save(store, tokens, (4, 5))
    save(store, tokens, (4, 7))
    save(store, tokens, (4, 6))
    assert find(store, tokens).chunk_ends == (4, 7)
    save(store, tokens, (4, 8))
    assert find(store, tokens).chunk_ends == (4, 8)


def test_a_noted_length_whose_objects_are_gone_is_passed_over(store):
    tokens = list(range(20))
    save(store, tokens, (4, 6))
    longer = save(store, tokens, (4, 7))
    store.delete(required(longer[-1])[:1])
    assert find(store, tokens).chunk_ends == (4, 6)


def test_a_chunk_counts_only_with_all_its_objects(store):
    hashes = save(store, list(range(12)), (4, 8, 12))
    store.delete(required(hashes[1])[1:])
    assert find(store, list(range(12))).chunk_ends == (4,)


def test_max_tokens_bounds_the_match(store):
    save(store, list(range(11)), (4, 8, 11))
    assert find(store, list(range(11)), max_tokens=11).chunk_ends == (4, 8, 11)
    assert find(store, list(range(11)), max_tokens=10).chunk_ends == (4, 8)
    assert find(store, list(range(11)), max_tokens=0).chunk_ends == ()


def test_other_tenants_and_other_models_find_nothing(store):
    tokens = list(range(10))
    save(store, tokens, (4, 8, 10), salt="mine")
    assert find(store, tokens, salt="mine").num_tokens == 10
    assert find(store, tokens, salt="yours").num_tokens == 0
    assert find(store, tokens).num_tokens == 0
    other = Namespace(weights_fingerprint="other weights", dtype="bfloat16", chunk_tokens=CHUNK)
    match = find_prefix(
        store, other, tokens, chunk_tokens=CHUNK, salt="mine", required_keys=lambda chain: required(chain, other)
    )
    assert match.num_tokens == 0


def test_prompts_longer_than_one_question_to_the_store(store):
    num_tokens = CHUNK * (2 * PROBE_CHUNKS + 3)
    ends = tuple(range(CHUNK, num_tokens + 1, CHUNK))
    save(store, list(range(num_tokens)), ends)
    asked = []

    class Counting(MemoryStore):
        def contains(self, keys):
            asked.append(len(keys))
            return store.contains(keys)

    with Counting(capacity_bytes=1) as counting:
        assert find(counting, list(range(num_tokens))).chunk_ends == ends
    assert asked == [PROBE_CHUNKS * NUM_BLOCKS, PROBE_CHUNKS * NUM_BLOCKS, 3 * NUM_BLOCKS]


def test_the_most_recent_lengths_are_kept(store):
    root = chain_root()
    tokens = list(range(40))
    for length in range(1, MAX_NOTED + 3):
        note_partial_chunk(store, NAMESPACE, root, length)
    note_partial_chunk(store, NAMESPACE, root, 3)  # again the most recent
    for length in range(1, MAX_NOTED + 3):
        chain = chain_hash(root, tokens[:length])
        store.submit_put([PutRequest(each, [b"kv"], (2,), "uint8") for each in required(chain)]).wait(TIMEOUT_S)
    found = [find_prefix(store, NAMESPACE, tokens[:length], chunk_tokens=50, required_keys=required).chunk_ends
             for length in range(1, MAX_NOTED + 3)]  # fmt: skip
    assert found == [(), (), *((length,) for length in range(3, MAX_NOTED + 3))]
    assert store.stats().num_objects == 1 + NUM_BLOCKS * (MAX_NOTED + 2)


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.ERROR, Fault.CORRUPT, Fault.HANG])
def test_a_note_that_cannot_be_read_is_a_missed_hit(store, fault):
    tokens = list(range(10))
    save(store, tokens, (4, 6, 10))
    rule = FaultRule(fault=fault, matches=lambda each: each.kind is ObjectKind.NEXT)
    failing = FaultyStore(store, FaultPlan(rules=(rule,)))
    match = find(failing, tokens, deadline_s=0.3 if fault is Fault.HANG else None)
    assert match.chunk_ends == (4,)
    assert find(store, tokens).chunk_ends in ((4, 6, 10), (4,))  # the latter while the note counts as damaged


def test_a_note_that_cannot_be_written_is_no_error(store):
    failing = FaultyStore(store, FaultPlan(rules=(FaultRule(fault=Fault.PUT_ERROR),)))
    assert not note_partial_chunk(failing, NAMESPACE, chain_root(), 3)
    assert not store.contains([next_key(NAMESPACE.digest, chain_root())])[0]


def test_the_deadline_is_for_the_whole_search(store):
    num_tokens = CHUNK * PROBE_CHUNKS * 3
    save(store, list(range(num_tokens)), tuple(range(CHUNK, num_tokens + 1, CHUNK)))
    times_s = iter([0.0, 0.1, 0.2, *[9.0] * 9])  # at the start, then once per question
    match = find(store, list(range(num_tokens)), deadline_s=1.0, clock=lambda: next(times_s))
    assert match.num_tokens == 2 * CHUNK * PROBE_CHUNKS
    assert match.timed_out
    late = find(store, list(range(num_tokens)), deadline_s=0.0)
    assert (late.num_tokens, late.timed_out) == (0, True)


def test_bad_questions_are_refused(store):
    with pytest.raises(ConfigError, match="chunk_tokens is 0"):
        find_prefix(store, NAMESPACE, [1], chunk_tokens=0, required_keys=required)
    with pytest.raises(ConfigError, match="max_tokens -1"):
        find(store, [1], max_tokens=-1)
    with pytest.raises(ConfigError, match="at least 1 token"):
        note_partial_chunk(store, NAMESPACE, chain_root(), 0)


@settings(max_examples=examples(30))
@given(steps=st.lists(st.integers(1, CHUNK), min_size=1, max_size=12), extra=st.integers(0, 9))
def test_whatever_boundaries_a_save_used_are_found_again(steps, extra):
    ends = tuple(sum(steps[: index + 1]) for index in range(len(steps)))
    tokens = [token % 50_000 for token in range(ends[-1])]
    with MemoryStore(capacity_bytes=1 << 24) as store:
        hashes = save(store, tokens, ends)
        match = find(store, [*tokens, *range(70_000, 70_000 + extra)])
    assert match.chunk_ends == ends
    assert match.chain_hashes == hashes
