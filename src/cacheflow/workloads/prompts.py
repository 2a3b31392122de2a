"""Prompts of an exact number of tokens made of real text, for benchmarks that run a model."""

from __future__ import annotations

from collections.abc import Callable

from cacheflow.errors import ConfigError
from cacheflow.workloads.coding import source_text


class PromptBook:
    """Cuts prompts out of standard library source, tokenised once.

    The text is a ring. A prompt's prefix starts where its ``prefix_id`` says and opens with a line that names it, so
    that the first chunks of different prefixes differ for certain; the suffix goes on behind the prefix, and opens with
    a line that names its length, so that it is no longer prefix of the same text.
    """

    def __init__(self, tokenize: Callable[[str], list[int]]) -> None:
        """Tokenise the text.

        Args:
            tokenize: Text to token ids, without special tokens.

        Raises:
            ConfigError: It gives no tokens.
        """
        self._tokenize = tokenize
        self._ring = [token for part in source_text() for token in tokenize(part)]
        if not self._ring:
            raise ConfigError("tokenize gave no tokens for the source text; expected at least one")

    @property
    def num_tokens(self) -> int:
        """Tokens of text there are: the longest prompt."""
        return len(self._ring)

    def prompt(self, prefix_id: int, prefix_tokens: int, suffix_tokens: int) -> list[int]:
        """A prompt of exactly ``prefix_tokens + suffix_tokens`` tokens; the same arguments give the same one.

        Prompts of one ``prefix_id`` begin alike, for as many tokens as the shorter prefix has. Those of different ids
        part within their opening line.

        Raises:
            ConfigError: A number is negative, the prompt would be empty, or longer than the text.
        """
        if min(prefix_id, prefix_tokens, suffix_tokens) < 0:
            raise ConfigError(
                f"prefix_id {prefix_id}, prefix_tokens {prefix_tokens} and suffix_tokens {suffix_tokens} "
                "must be 0 or more"
            )
        total = prefix_tokens + suffix_tokens
        if not 0 < total <= self.num_tokens:
            raise ConfigError(
                f"a prompt of {prefix_tokens} + {suffix_tokens} = {total} tokens was asked for; "
                f"the text has 1 to {self.num_tokens}"
            )
        start = self._start(prefix_id)
        prefix = self._passage(f"{prefix_id} is the number of this document.\n", start, prefix_tokens)
        suffix = self._passage(f"{suffix_tokens} tokens of question follow.\n", start + prefix_tokens, suffix_tokens)
        return prefix + suffix

    def _start(self, prefix_id: int) -> int:
        # Fractions of the golden ratio: however many prefixes are used, their starts lie far apart.
        return int(prefix_id * 0.6180339887498949 % 1.0 * self.num_tokens)

    def _passage(self, opening: str, start: int, num_tokens: int) -> list[int]:
        tokens = self._tokenize(opening)[:num_tokens]
        start %= self.num_tokens
        body = self._ring[start : start + num_tokens - len(tokens)]
        return tokens + body + self._ring[: num_tokens - len(tokens) - len(body)]
