"""Identity of prefixes: block ids of another block size, of a growing conversation, of text.

An id stands for a whole prefix, not for the content of one block, so regrouping needs no table: the prefix up to the
end of a larger block is the prefix up to the end of the last small block inside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from cacheflow.errors import ConfigError
from cacheflow.workloads.request import num_blocks


def reblock(block_ids: Sequence[int], *, num_tokens: int, from_tokens: int, to_tokens: int) -> tuple[int, ...]:
    """The same prefixes named in blocks of ``to_tokens``.

    Larger blocks lose no equality: two of them are equal exactly when the prefixes up to their ends are. Smaller blocks
    inside one block are equal when that block is; what two different blocks share inside is not known, and counts as
    different.

    Args:
        block_ids: One id for each block of ``from_tokens``, the last possibly partial.
        num_tokens: Tokens in the prompt.
        from_tokens: Block size of ``block_ids``.
        to_tokens: Block size wanted.

    Raises:
        ConfigError: Neither block size divides the other.
    """
    if to_tokens == from_tokens:
        return tuple(block_ids)
    if to_tokens % from_tokens == 0:
        group = to_tokens // from_tokens
        ids = list(block_ids[group - 1 :: group])
        if len(block_ids) % group:
            ids.append(block_ids[-1])
        return tuple(ids)
    check_block_tokens(from_tokens, to_tokens)
    parts = from_tokens // to_tokens
    ids = [block_id * parts + part for block_id in block_ids for part in range(parts)]
    return tuple(ids[: num_blocks(num_tokens, to_tokens)])


def check_block_tokens(from_tokens: int, to_tokens: int) -> None:
    """Refuse block sizes that cannot be translated.

    Raises:
        ConfigError: Neither divides the other.
    """
    if to_tokens % from_tokens and from_tokens % to_tokens:
        raise ConfigError(
            f"block_tokens {to_tokens} does not fit a trace of {from_tokens}-token blocks; "
            f"use a multiple or a divisor of {from_tokens}"
        )


class PromptTree:
    """The prompts of one session, each of which starts like an earlier one for a known number of tokens.

    Keeps only prompts that a later one could still be found to extend: an earlier prompt that is not longer than a
    later one never is, because the latest that is long enough counts as the parent.
    """

    def __init__(self, *, block_tokens: int, fresh_ids: Iterator[int], common: tuple[int, ...] = ()) -> None:
        """Start a session.

        Args:
            block_tokens: Tokens in a block.
            fresh_ids: Gives an id never used before, to all sessions of a trace.
            common: Ids of full blocks that sessions have in common, such as a system prompt.
        """
        self._block_tokens = block_tokens
        self._fresh_ids = fresh_ids
        self._parents: list[tuple[int, ...]] = [common]

    def extend(self, *, shared_tokens: int, num_tokens: int) -> tuple[int, ...]:
        """Block ids of the next prompt, whose first ``shared_tokens`` an earlier prompt has too.

        Only whole blocks are shared. A run longer than any earlier prompt counts as that prompt's length.
        """
        wanted = min(shared_tokens, num_tokens) // self._block_tokens
        parent = next((ids for ids in reversed(self._parents) if len(ids) >= wanted), self._parents[0])
        kept = parent[:wanted]
        ids = kept + tuple(next(self._fresh_ids) for _ in range(num_blocks(num_tokens, self._block_tokens) - len(kept)))
        full = ids[: num_tokens // self._block_tokens]
        while self._parents and len(self._parents[-1]) <= len(full):
            self._parents.pop()
        self._parents.append(full)
        return ids


def text_block_ids(text: str, block_chars: int) -> tuple[int, ...]:
    """Ids of a text cut into pieces of ``block_chars`` characters; each names the text from its start.

    63-bit digests in a chain, so equal beginnings agree over sessions and runs without a table.
    """
    ids = []
    chain = hashlib.blake2b(digest_size=8)
    for start in range(0, len(text), block_chars):
        chain.update(text[start : start + block_chars].encode("utf-8", "surrogatepass"))
        ids.append(int.from_bytes(chain.digest(), "big") >> 1)
    return tuple(ids)
