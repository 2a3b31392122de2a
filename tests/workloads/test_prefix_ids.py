"""Block ids name prefixes: other block sizes, growing prompts and texts keep what is equal equal."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.workloads.prefix_ids import PromptTree, reblock, text_block_ids
from cacheflow.workloads.request import num_blocks

SMALL = 4


def shared(a, b):
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def ids_of(tokens, block_tokens, names):
    """Ids of every prefix of whole blocks, and of the partial rest, of a token sequence: the definition itself."""
    return tuple(
        names.setdefault(tuple(tokens[: start + block_tokens]), len(names))
        for start in range(0, len(tokens), block_tokens)
    )


# Two tokens only: sequences that share prefixes are then common.
SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=2, max_size=6)


@given(SEQUENCES, st.integers(1, 4))
def test_larger_blocks_are_equal_exactly_where_the_prefixes_are(sequences, factor):
    names, larger_names = {}, {}
    for tokens in sequences:
        regrouped = reblock(
            ids_of(tokens, SMALL, names), num_tokens=len(tokens), from_tokens=SMALL, to_tokens=SMALL * factor
        )
        defined = ids_of(tokens, SMALL * factor, larger_names)
        assert len(regrouped) == len(defined)
        # One id for one prefix, both ways round.
        for got, prefix in zip(regrouped, defined, strict=True):
            assert larger_names.setdefault(("got", got), prefix) == prefix
            assert larger_names.setdefault(("prefix", prefix), got) == got


@given(SEQUENCES)
def test_smaller_blocks_share_what_the_larger_ones_shared_and_no_more(sequences):
    names = {}
    fine = [
        (reblock(ids_of(tokens, SMALL, names), num_tokens=len(tokens), from_tokens=SMALL, to_tokens=2), tokens)
        for tokens in sequences
    ]
    for (ids_a, a), (ids_b, b) in itertools.combinations(fine, 2):
        assert len(ids_a) == num_blocks(len(a), 2)
        same_tokens = shared(a, b)
        assert shared(ids_a, ids_b) * 2 <= same_tokens + same_tokens % 2
        assert shared(ids_a, ids_b) >= same_tokens // SMALL * (SMALL // 2)


@given(SEQUENCES, st.integers(2, 5))
def test_splitting_and_regrouping_shares_as_before(sequences, parts):
    names = {}
    before = [ids_of(tokens, SMALL * parts, names) for tokens in sequences]
    after = [
        reblock(
            reblock(ids, num_tokens=len(tokens), from_tokens=SMALL * parts, to_tokens=SMALL),
            num_tokens=len(tokens), from_tokens=SMALL, to_tokens=SMALL * parts,
        )
        for ids, tokens in zip(before, sequences, strict=True)
    ]  # fmt: skip
    for (a, b), (c, d) in zip(itertools.combinations(before, 2), itertools.combinations(after, 2), strict=True):
        assert shared(a, b) == shared(c, d)


def test_block_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="block_tokens 96 does not fit a trace of 64-token blocks"):
        reblock((1, 2), num_tokens=128, from_tokens=64, to_tokens=96)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=12), st.integers(1, 8))
def test_a_prompt_tree_shares_as_long_a_run_as_stated(turns, block_tokens):
    """Unless it states more than any earlier prompt has; then all of the longest."""
    tree = PromptTree(block_tokens=block_tokens, fresh_ids=itertools.count())
    seen, longest = set(), 0
    for stated, num_tokens in turns:
        ids = tree.extend(shared_tokens=stated, num_tokens=num_tokens)
        assert len(ids) == num_blocks(num_tokens, block_tokens)
        assert len(set(ids)) == len(ids)
        known = sum(1 for _ in itertools.takewhile(seen.__contains__, ids))
        assert known == min(min(stated, num_tokens) // block_tokens, longest)
        # And nothing behind the run that was known before.
        assert not seen & set(ids[known:])
        seen.update(ids[: num_tokens // block_tokens])
        longest = max(longest, num_tokens // block_tokens)


def test_a_prompt_goes_on_from_the_latest_that_is_long_enough():
    tree = PromptTree(block_tokens=10, fresh_ids=itertools.count(100), common=(1, 2))
    long = tree.extend(shared_tokens=20, num_tokens=60)
    short = tree.extend(shared_tokens=20, num_tokens=40)
    assert tree.extend(shared_tokens=40, num_tokens=40) == short
    assert tree.extend(shared_tokens=50, num_tokens=50) == long[:5]
    assert long[:2] == short[:2] == (1, 2)


@given(st.text(max_size=60), st.text(max_size=60), st.integers(1, 7))
def test_texts_share_the_blocks_that_are_equal_from_the_start(a, b, block_chars):
    ids_a, ids_b = text_block_ids(a, block_chars), text_block_ids(b, block_chars)
    assert len(ids_a) == num_blocks(len(a), block_chars)
    for position, (left, right) in enumerate(zip(ids_a, ids_b, strict=False), start=1):
        assert (left == right) == (a[: position * block_chars] == b[: position * block_chars])


def test_text_ids_are_the_same_in_every_run():
    assert text_block_ids("the same text", 8) == text_block_ids("the same text", 8)
    assert text_block_ids("the same text", 8)[0] == text_block_ids("the same", 8)[0]
    assert all(0 <= block_id < 2**63 for block_id in text_block_ids("the same text \ud800", 2))
