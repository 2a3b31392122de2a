"""One conversation: its tokens, its KV buffer, and what brings the KV back after it was thrown out.

Keys and values that decode steps made are never saved and never kept over a turn: the next turn prefills the answer
again, together with its new tokens, in chunks. So every saved cell was made by prefill in known chunks, and
recomputing it gives the same bits (docs/decisions/0002).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import torch

from cacheflow.embedded.archive import PendingSave, PrefixArchive
from cacheflow.embedded.asked import check_cancel, check_free, checked_answer, checked_tokens
from cacheflow.embedded.host import SessionHost
from cacheflow.embedded.reply import Reply
from cacheflow.embedded.restorer import RestoreRequest
from cacheflow.embedded.turn import Turn, TurnPrompt
from cacheflow.engine.arguments import number, timeout, whole
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.sampling import Sampling
from cacheflow.engine.saver import SaveReport
from cacheflow.errors import ConfigError, CostRangeError, PromptError
from cacheflow.plan.grid import Grid, regular_ends
from cacheflow.plan.report import RestoreReport
from cacheflow.stores.prefix_index import PrefixMatch

logger = logging.getLogger(__name__)


class Session:
    """A conversation of one engine. Not thread-safe, except for the ``cancel`` event of ``generate``."""

    def __init__(self, engine: SessionHost, *, salt: str, history: Sequence[int] = ()) -> None:
        """Start with the tokens of an earlier conversation, whose KV only the store may have."""
        self.tokens: list[int] = checked_tokens("history", history)
        if self.tokens:
            engine.runner.token_tensor(self.tokens)
        self._engine, self._archive = engine, PrefixArchive(engine, salt=salt)
        self._prompt: list[int] = []
        self._kv: KVBuffer | None = None
        self._chunk_ends: tuple[int, ...] = ()
        self._evicted_ends: tuple[int, ...] = ()

    def is_of(self, engine: SessionHost) -> bool:
        """Whether an engine made it."""
        return self._engine is engine

    @property
    def chunk_ends(self) -> tuple[int, ...]:
        """Boundaries of the chunks whose prefill-made KV is in memory."""
        return self._chunk_ends

    @property
    def resident_tokens(self) -> int:
        """Tokens whose prefill-made KV is in memory."""
        return self._chunk_ends[-1] if self._chunk_ends else 0

    def evict(self) -> None:
        """Throw the KV out of memory; the conversation goes on, the next turn restores it.

        Its chunks' ends are kept: what the store has lost meanwhile is prefilled in the same chunks, to the same bits.
        """
        self._kv = None
        if self._evicted_ends[: len(self._chunk_ends)] != self._chunk_ends:  # not merely what ``warm`` found of them
            self._evicted_ends = self._chunk_ends
        self._chunk_ends = ()

    def warm(self, *, cancel: threading.Event | None = None) -> RestoreReport | None:
        """Bring back what the store has of the conversation before its next turn comes.

        Returns:
            The restoration; None when the KV is resident or the store has nothing of it.

        Raises:
            RestoreCancelled: ``cancel`` was set.
            ConfigError: ``cancel`` is no event, or the engine has an open batch.
        """
        check_free(self._engine)
        check_cancel(cancel)
        if self._chunk_ends or not self.tokens:
            return None
        match = self._lookup(self.tokens, cancel)
        if not match.chunk_ends:
            return None
        kv = self.buffer(len(self.tokens))
        prefix = self.tokens[: match.num_tokens]
        grid = Grid(chunk_ends=match.chunk_ends, num_blocks=self._engine.num_blocks)
        request = RestoreRequest(
            tokens=prefix,
            problem=self._engine.problem(grid),
            kv=kv,
            layers_per_block=self._engine.chunking.layers_per_block,
        )
        transfer = self._archive.open(grid, match, kv)
        report = self._engine.restorer.restore(request, transfer, cancel=cancel).report
        self._prompt, self._kv, self._chunk_ends = prefix, kv, match.chunk_ends
        return report

    def resident_kv(self) -> torch.Tensor | None:
        """View ``[L, 2, T, H, D]`` of the prefill-made KV in memory; None after ``evict``."""
        return None if self._kv is None else self._kv.kv_L2THD[:, :, : self.resident_tokens]

    def generate(
        self,
        tokens: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_tokens: frozenset[int] = frozenset(),
        save: bool = True,
        cancel: threading.Event | None = None,
    ) -> Reply:
        """Answer the conversation so far plus ``tokens``, restoring what was evicted.

        On return no read is under way; a store that hangs in one is given two seconds to let go, then left to itself.

        Args:
            tokens: New prompt tokens, at least one.
            max_new_tokens: Longest answer.
            sampling: Greedy unless given.
            stop_tokens: The answer ends after one of these.
            save: Write what this turn prefilled to the store, after the answer; else ``save`` does it later. The reply
                waits for the writes, and for none beyond its deadline (``EngineOptions.save_deadline_s``).
            cancel: Set from any thread to give up before the first token; the session stays as it was.

        Raises:
            PromptError: No new token, an id outside the vocabulary, or the conversation would be too long.
            ConfigError: An argument is of the wrong type, or the engine has an open batch.
            RestoreCancelled: ``cancel`` was set before the first token.
        """
        check_free(self._engine)
        check_cancel(cancel)
        turn = Turn(
            self._engine,
            self,
            self.ask(
                tokens,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop_tokens=stop_tokens,
                save=save,
                cancel=cancel,
            ),
        )
        outcome = self._engine.restorer.serve(turn.request(), cancel=cancel)
        return turn.reply(outcome, turn.end(outcome))

    def ask(
        self,
        tokens: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_tokens: frozenset[int] = frozenset(),
        save: bool = True,
        cancel: threading.Event | None = None,
    ) -> TurnPrompt:
        """Check what is asked and look for its prefix; asks the store, computes nothing. Arguments as ``generate``'s.

        Raises:
            PromptError: See ``generate``.
            ConfigError: See ``generate``.
            RestoreCancelled: See ``generate``.
        """
        started_s = time.perf_counter()
        stop_tokens = checked_answer(sampling, stop_tokens, save)
        prompt = self._checked_prompt(tokens, max_new_tokens)
        resident_ends = self._chunk_ends
        match = self._lookup(prompt, cancel) if not resident_ends else PrefixMatch(chunk_ends=(), chain_hashes=())
        return TurnPrompt(
            started_s=started_s,
            prompt=prompt,
            max_new_tokens=int(max_new_tokens),
            sampling=sampling,
            stop_tokens=stop_tokens,
            save=save,
            resident_ends=resident_ends,
            match=match,
            grid=self._grid(resident_ends or match.chunk_ends, len(prompt)),
        )

    def note_turn(self, prompt: list[int], chunk_ends: tuple[int, ...], kv: KVBuffer, answer: Sequence[int]) -> None:
        """Go on from an answered turn, whose prompt has its keys and values in ``kv``, in these chunks."""
        self._kv, self._chunk_ends = kv, chunk_ends
        self._prompt, self.tokens = prompt, [*prompt, *answer]

    def _checked_prompt(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        new_tokens = checked_tokens("tokens", tokens)
        max_new_tokens = whole("max_new_tokens", max_new_tokens)
        if not new_tokens or max_new_tokens < 1:
            raise PromptError(
                f"{len(new_tokens)} new prompt tokens and max_new_tokens {max_new_tokens}: 1 or more are needed"
            )
        prompt = [*self.tokens, *new_tokens]
        limit = self._engine.model.max_tokens
        if len(prompt) + max_new_tokens > limit:
            raise PromptError(
                f"conversation of {len(prompt)} tokens plus {max_new_tokens} new ones exceeds the model's {limit}"
            )
        self._engine.runner.token_tensor(prompt)
        return prompt

    def buffer(self, num_tokens: int, *, most_tokens: int | None = None) -> KVBuffer:
        """A buffer long enough that holds what is resident: the one in use, or a new one.

        Args:
            num_tokens: What it must hold.
            most_tokens: The one in use is left where it has room for more than so many, and a new one is no longer than
                it must be; None: a new one is longer, so that later turns fit too.
        """
        if self._kv is not None and num_tokens <= self._kv.capacity <= (most_tokens or self._kv.capacity):
            return self._kv
        roomy = min(self._engine.model.max_tokens, max(2 * num_tokens, 1024))
        grown = self._engine.runner.new_kv(roomy if most_tokens is None else num_tokens)
        if self._kv is not None:
            grown.copy_from(self._kv, self.resident_tokens)
        return grown

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the buffer in memory has room for; 0 without one."""
        return 0 if self._kv is None else self._kv.capacity

    @property
    def archive(self) -> PrefixArchive:
        """What the store has of this conversation."""
        return self._archive

    def _lookup(self, prompt: list[int], cancel: threading.Event | None) -> PrefixMatch:
        match = self._archive.find(prompt, cancel=cancel)
        if not match.chunk_ends or self._is_priced(match, len(prompt)):
            return match
        self._evicted_ends = self._evicted_ends or match.chunk_ends  # prefilled in the chunks it was saved in
        return PrefixMatch(chunk_ends=(), chain_hashes=(), timed_out=match.timed_out)

    def _is_priced(self, match: PrefixMatch, num_tokens: int) -> bool:
        """Whether the profile knows what restoring a match costs; what it does not know is prefilled instead."""
        try:
            self._engine.problem(self._grid(match.chunk_ends, num_tokens))
        except CostRangeError as error:
            logger.warning("%d cached tokens are prefilled, not restored: %s", match.num_tokens, error)
            return False
        return True

    def _grid(self, known_ends: tuple[int, ...], num_tokens: int) -> Grid:
        evicted, known = self._evicted_ends, len(known_ends)
        lost_ends = evicted[known:] if evicted[:known] == known_ends else ()
        start = (0, *known_ends, *lost_ends)[-1]
        return Grid(
            chunk_ends=known_ends,
            num_blocks=self._engine.num_blocks,
            suffix_ends=(*lost_ends, *regular_ends(start, num_tokens, self._engine.chunking.chunk_tokens)),
        )

    def save(self, *, first_chunk: int = 0, timeout_s: float | None = None) -> SaveReport:
        """Write resident chunks to the store, those it already has left out; waits for the writes.

        Partial chunks are noted, so that a later lookup tries their length.

        Args:
            first_chunk: Skip the chunks before this one.
            timeout_s: Longest wait, about; writes still pending then are reported as failed and go on. None waits until
                their deadlines (``EngineOptions.save_deadline_s``).

        Raises:
            ConfigError: ``timeout_s`` or ``first_chunk`` is no number of 0 or more.
        """
        limit_s = timeout("timeout_s", timeout_s)
        pending = self.start_save(first_chunk=whole("first_chunk", first_chunk, least=0))
        return SaveReport() if pending is None else pending.wait(limit_s)

    def keep(self, keep_s: float) -> int:
        """Keep what the store has of the conversation from making room for others, for so many seconds from now.

        For a conversation that will go on, such as an agent's that waits for a tool. What is not saved yet is not kept;
        neither is what exceeds the share of the store that may be kept (``Retention.pinned_share``). Asks the store.

        Returns:
            Leading tokens that are kept.

        Raises:
            ConfigError: ``keep_s`` is no finite number above 0.
        """
        for_s = number("keep_s", keep_s, above=0)
        if for_s == float("inf"):
            raise ConfigError("keep_s is inf, must be finite: what is kept for ever would fill the store")
        ends = self._chunk_ends or self._evicted_ends
        if not ends and self.tokens:
            ends = self._archive.find([*self.tokens, 0]).chunk_ends  # which leaves the last token out
        return self._archive.keep(self.tokens, ends, keep_s=for_s) if ends else 0

    def prefetch(self, *, keep_s: float = 0.0) -> int:
        """Have the store bring what it has of the conversation into its fastest tier, while others are answered.

        For a conversation that goes on soon; of one that is to come make a session with its first tokens as
        ``history``. Asks the store, and does not wait for what it does then: see ``Store.prefetch``.

        Args:
            keep_s: Keep it for so many seconds too, as ``keep`` does; 0 for not.

        Returns:
            Leading tokens that the store has.

        Raises:
            ConfigError: ``keep_s`` is no finite number of 0 or more.
        """
        for_s = number("keep_s", keep_s, least=0)
        if for_s == float("inf"):
            raise ConfigError("keep_s is inf, must be finite: what is kept for ever would fill the store")
        match = self._archive.find([*self.tokens, 0])  # which leaves the last token out
        if for_s:
            self._archive.keep(self.tokens, match.chunk_ends, keep_s=for_s)
        self._archive.prefetch(match, keep_s=for_s)
        return match.num_tokens

    def start_save(self, *, first_chunk: int = 0) -> PendingSave | None:
        """Start writing resident chunks; they are copied out, so the buffer may be used at once. None for nothing."""
        if self._kv is None or first_chunk >= len(self._chunk_ends):
            return None
        return self._archive.save(self._kv, self._prompt, self._chunk_ends, first_chunk=first_chunk)
