"""Prompts have exactly the tokens asked for, and share exactly what they should."""

import itertools

import pytest

from cacheflow.errors import ConfigError
from cacheflow.workloads.prompts import PromptBook


def by_character(text):
    return [ord(character) for character in text]


@pytest.fixture(scope="module")
def book():
    # One token for four characters, as a real vocabulary has it.
    return PromptBook(lambda text: [hash_of(text[start : start + 4]) for start in range(0, len(text), 4)])


def hash_of(piece):
    return int.from_bytes(piece.encode("utf-8"), "big")


def shared(a, b):
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 1), (1, 0), (3, 3), (512, 64), (40_000, 512)])
def test_lengths_are_exact_and_the_prompt_is_always_the_same(book, prefix, suffix):
    tokens = book.prompt(5, prefix, suffix)
    assert len(tokens) == prefix + suffix
    assert tokens == book.prompt(5, prefix, suffix)


def test_one_prefix_with_other_suffixes(book):
    prompts = [book.prompt(3, 1024, suffix) for suffix in (64, 100, 512)]
    for a, b in itertools.combinations(prompts, 2):
        assert a[:1024] == b[:1024]
        # The suffix is no continuation of the prefix text: at most part of its opening line is common.
        assert shared(a, b) < 1024 + 8


def test_a_longer_prefix_begins_like_a_shorter_one_and_then_leaves_its_suffix(book):
    short, long = book.prompt(3, 1024, 512), book.prompt(3, 2048, 512)
    assert 1024 <= shared(short, long) < 1024 + 8


def test_many_prefixes_differ_in_their_first_chunk(book):
    firsts = [tuple(book.prompt(prefix_id, 512, 0)[:16]) for prefix_id in range(500)]
    assert len(set(firsts)) == 500


def test_prefixes_show_different_text(book):
    """Not only another opening line: the text behind it is another one too."""
    a, b = (book.prompt(prefix_id, 2000, 0)[16:] for prefix_id in (1, 2))
    same = sum(left == right for left, right in zip(a, b, strict=True))
    assert same < len(a) * 0.2


def test_text_runs_out_with_the_numbers(book):
    limit = book.num_tokens
    assert len(book.prompt(7, limit - 10, 10)) == limit
    with pytest.raises(ConfigError, match=rf"{limit} \+ 1 = {limit + 1} tokens was asked for; .* 1 to {limit}"):
        book.prompt(7, limit, 1)
    with pytest.raises(ConfigError, match=r"0 \+ 0 = 0 tokens"):
        book.prompt(7, 0, 0)
    with pytest.raises(ConfigError, match="prefix_tokens -1"):
        book.prompt(7, -1, 5)


def test_the_text_is_readable_source():
    book = PromptBook(by_character)
    assert "def " in "".join(map(chr, book.prompt(0, 8000, 0)))


def test_a_tokenizer_that_gives_nothing_is_refused():
    with pytest.raises(ConfigError, match="no tokens"):
        PromptBook(lambda text: [])
