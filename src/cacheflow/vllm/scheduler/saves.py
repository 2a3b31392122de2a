"""Which chunks are saved: those that a request newly computes, and each once for requests that share a prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cacheflow.vllm.scheduler.kv_identity import KvName
from cacheflow.vllm.scheduler.request_prefix import RequestPrefix
from cacheflow.vllm.scheduler.view import BlockIdsOf, RequestView, StateBlocksOf
from cacheflow.vllm.step import CaptureWork, SaveWork

MAX_REMEMBERED = 16_384
"""Chunks; what is forgotten is at worst copied once more, for the store to find that it has it."""


class RequestSaves:
    """One request's chunks on their way to the store. Scheduler's thread alone."""

    def __init__(self, view: RequestView, prefix: RequestPrefix, *, block_size: int, decode_too: bool) -> None:
        """Nothing is saved yet; ``decode_too``: save chunks with tokens after the prompt."""
        self._view, self._prefix, self._block_size, self._decode_too = view, prefix, block_size, decode_too
        self._next = self._num_stored = self._proven_after = 0

    def forget(self) -> None:
        """The request's KV has another name from now on, under which nothing is saved."""
        self._next = self._num_stored = 0

    def note_stored(self, num_chunks: int) -> None:
        """Note that so many leading chunks are in the store."""
        self._num_stored = num_chunks

    def note_lost(self, chunk: int) -> None:
        """Note that a chunk could not be read: it is written again unless the store has it after all."""
        self._num_stored, self._next = min(self._num_stored, chunk), min(self._next, chunk)

    def distrust_loads(self) -> None:
        """Save nothing before another token shows that what another connector loads for this step was there."""
        self._proven_after = len(self._view.tokens)

    def note_load_failed(self) -> None:
        """Note that another connector's load failed: if it may be this request's, nothing of it is saved any more."""
        if not self.proven:
            self._proven_after = 1 << 62

    @property
    def proven(self) -> bool:
        """Whether what another connector loaded is known to have been there."""
        return len(self._view.tokens) > self._proven_after

    def capture(self, start: int, end: int) -> CaptureWork | None:
        """What to keep of the boundary states of tokens ``[start, end)``, which the step computes; before ``take``."""
        chunk_tokens = self._prefix.chunk_tokens
        start = max(start, max(self._next, self._num_stored) * chunk_tokens)
        if not self._decode_too:
            end = min(end, self._view.num_prompt_tokens // chunk_tokens * chunk_tokens)
        return CaptureWork(request_id=self._view.request_id, start=start, end=end) if start < end else None

    def take(self, name: KvName, *, num_computed: int, block_ids_of: BlockIdsOf) -> list[SaveWork]:
        """Chunks that are wholly computed and were not saved before; they count as saved from now on.

        ``num_computed`` tokens have their KV after this step's forward. ``block_ids_of`` is asked only when there is
        something to save.
        """
        view, chunk_tokens = self._view, self._prefix.chunk_tokens
        limit = min(num_computed, len(view.tokens) if self._decode_too else view.num_prompt_tokens)
        first, end = max(self._next, self._num_stored), limit // chunk_tokens
        if first >= end:
            return []
        self._next = end
        self._prefix.extend(view.tokens)
        block_ids = block_ids_of(view.request_id)
        return [self._save(name, chunk, block_ids) for chunk in range(first, end)]

    def checkpoint(
        self, name: KvName, *, num_computed: int, block_ids_of: BlockIdsOf, state_blocks_of: StateBlocksOf, keep: bool
    ) -> SaveWork | None:
        """The chunk that ends with so many computed tokens and the running states there; None where there are none.

        With its keys and values, whether or not they were saved before: without them the states are of no use. ``keep``
        as in ``SaveWork``.
        """
        request_id = self._view.request_id
        blocks = state_blocks_of(request_id, num_computed)
        if not blocks:
            return None
        self._prefix.extend(self._view.tokens)
        chunk = num_computed // self._prefix.chunk_tokens - 1
        save = self._save(name, chunk, block_ids_of(request_id))
        return replace(save, state_blocks=blocks, keep=keep)

    def _save(self, name: KvName, chunk: int, block_ids: Sequence[int]) -> SaveWork:
        num_blocks = self._prefix.chunk_tokens // self._block_size
        return SaveWork(
            namespace=name.namespace,
            chain_hash=self._prefix.hashes[chunk].hex(),
            block_ids=tuple(block_ids[chunk * num_blocks : (chunk + 1) * num_blocks]),
            request_id=self._view.request_id,
            chunk=chunk,
            adapter=name.adapter,
        )


class SaveLog:
    """The saves of this engine and the questions to the store, by what came first. One thread.

    What the store answered about a chunk is out of date once the chunk is saved after the question: a burst of requests
    with one system prompt is answered "missing" before the first of them has computed it. An answer to a question
    after the save is newer: the write failed, was skipped, or the store has evicted it.

    Attributes:
        num_saves: Saves so far; a question to the store remembers how many there were when it was asked.
    """

    def __init__(self) -> None:
        self.num_saves = 0
        self._last_save_of: OrderedDict[tuple[str, str, bool], int] = OrderedDict()

    def new(self, saves: Iterable[SaveWork], *, asked_after_saves: int) -> list[SaveWork]:
        """Those of a request that were not saved since it asked the store; they count as saved from now on."""
        new = []
        for save in saves:
            name = (save.namespace, save.chain_hash, bool(save.state_blocks))
            if self._last_save_of.get(name, 0) > asked_after_saves:
                continue
            self.num_saves += 1
            self._last_save_of[name] = self.num_saves
            self._last_save_of.move_to_end(name)
            new.append(save)
        while len(self._last_save_of) > MAX_REMEMBERED:
            self._last_save_of.popitem(last=False)
        return new
