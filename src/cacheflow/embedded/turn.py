"""One turn of a conversation: the prompt, where its keys and values come from, its answer, and what is saved of it.

The same object serves a turn that is answered alone and one among others. ``prepare``, ``start`` and ``step`` run on
the thread that computes, the rest on its caller's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cacheflow.embedded.archive import PendingSave, PrefixArchive
from cacheflow.embedded.host import SessionHost
from cacheflow.embedded.reply import Reply
from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.running_states import RunningStates
from cacheflow.engine.sampling import Sampling, TokenSampler
from cacheflow.engine.saver import SaveReport
from cacheflow.engine.transfer_port import StoreTicket
from cacheflow.errors import CostRangeError
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.report import RestoreReport
from cacheflow.restore.batch import BatchHandle, BatchOutcome, BatchRequest, Follow, Prepared
from cacheflow.stores.prefix_index import PrefixMatch
from cacheflow.types import LoadOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnPrompt:
    """What was asked of a session, checked; nothing is computed yet.

    Attributes:
        started_s: When, on ``time.perf_counter``.
        prompt: The conversation and the new tokens.
        max_new_tokens: Longest answer.
        sampling: How tokens are chosen; None for greedy.
        stop_tokens: The answer ends after one of these.
        save: Write what the turn prefills to the store.
        resident_ends: Chunk ends of what is in memory.
        match: What the store has; empty when something is in memory.
        grid: Every chunk of the prompt: those known as the prefix, the others as the suffix.
    """

    started_s: float
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling | None
    stop_tokens: frozenset[int]
    save: bool
    resident_ends: tuple[int, ...]
    match: PrefixMatch
    grid: Grid

    @property
    def num_tokens(self) -> int:
        """Tokens of keys and values that the turn needs room for."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def restore_grid(self) -> Grid:
        """What is to be done: the match and the new chunks, after what is resident."""
        if self.match.chunk_ends:
            return self.grid
        start = self.resident_ends[-1] if self.resident_ends else 0
        return Grid(chunk_ends=(), num_blocks=self.grid.num_blocks, suffix_ends=self.grid.suffix_ends, start=start)


class Conversation(Protocol):
    """What a turn needs of its session."""

    @property
    def archive(self) -> PrefixArchive:
        """What the store has of the conversation."""
        ...

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the buffer in memory has room for; 0 without one."""
        ...

    def buffer(self, num_tokens: int, *, most_tokens: int | None = None) -> KVBuffer:
        """A buffer long enough, and with room for ``most_tokens`` at most, that holds what is resident."""
        ...

    def note_turn(self, prompt: list[int], chunk_ends: tuple[int, ...], kv: KVBuffer, answer: Sequence[int]) -> None:
        """Go on from an answered turn."""
        ...

    def start_save(self, *, first_chunk: int = 0) -> PendingSave | None:
        """Start writing resident chunks; None for nothing."""
        ...


class Turn:
    """A turn from its lookup to its reply.

    Attributes:
        session: Whose turn.
        asked: What was asked.
        grid: What it restores itself; shorter than what was asked when it shares a prefix.
        kv: Its buffer; None before ``prepare``.
        tokens: The answer so far.
    """

    def __init__(
        self, engine: SessionHost, session: Conversation, asked: TurnPrompt, *, kv_capacity_tokens: int | None = None
    ) -> None:
        """Allocate nothing yet; within ``kv_capacity_tokens``, which it shares with others, where that is given."""
        self.session, self.asked, self.grid = session, asked, asked.restore_grid
        self.kv: KVBuffer | None = None
        self.tokens: list[int] = []
        self._engine, self._kv_capacity_tokens = engine, kv_capacity_tokens
        self._port: EngineComputePort | None = None
        self._decoded: RunningStates | None = None
        self._sampler = TokenSampler(asked.sampling)
        self._ttft_s = 0.0

    def request(self, *, first_token_within_s: float | None = None) -> BatchRequest[StoreTicket]:
        """The turn as an executor takes it.

        Args:
            first_token_within_s: Seconds from when it was asked until which the first token should be there; None for
                no matter when.
        """
        if first_token_within_s is not None:
            first_token_within_s -= time.perf_counter() - self.asked.started_s  # the lookup's are gone
        return BatchRequest(
            problem=self._problem(),
            prepare=self._prepare,
            num_tokens=self._kv_tokens(),
            first_token_within_s=first_token_within_s,
            tag=self,
        )

    def _kv_tokens(self) -> int:
        """Tokens of the buffer that ``_prepare`` takes: the session's, or a new one where that is too short or long."""
        needed, held = self.asked.num_tokens, self.session.kv_capacity_tokens
        most = self._kv_capacity_tokens
        return max(needed, held) if most is None or held <= most else needed

    def _problem(self) -> RestoreProblem:
        """What ``grid`` costs. New tokens alone are served outside the measured range too, at a guess."""
        try:
            return self.session.archive.over_tiers(self._engine.problem(self.grid), self.asked.match)
        except CostRangeError:
            if self.grid.num_chunks:
                raise
            chunk_tokens = self._engine.chunking.chunk_tokens
            one = Grid(chunk_ends=(), num_blocks=self.grid.num_blocks, suffix_ends=(chunk_tokens,))
            guess = self._engine.problem(one)
            return replace(guess, grid=self.grid, suffix_B=guess.suffix_B * (self.grid.suffix_tokens / chunk_tokens))

    def _prepare(self, running: Sequence[BatchHandle]) -> Prepared[StoreTicket]:
        """Allocate the buffer and open the ports; shares the longest prefix that another turn restores."""
        engine, asked = self._engine, self.asked
        if self.kv is None:
            self.kv = self.session.buffer(asked.num_tokens, most_tokens=self._kv_capacity_tokens)
        self.grid = asked.restore_grid
        follow = self._find_leader(running)
        layers_per_block = engine.chunking.layers_per_block
        self._port = EngineComputePort(
            engine.runner, grid=self.grid, tokens=asked.prompt, kv=self.kv, layers_per_block=layers_per_block
        )
        return Prepared(
            problem=self._problem(),
            compute=self._port,
            transfer=self.session.archive.open(self.grid, asked.match, self.kv),
            decode=self,
            follow=follow,
        )

    def _find_leader(self, running: Sequence[BatchHandle]) -> Follow | None:
        """Whom to follow; cuts ``grid`` where its part ends."""
        # Another's restoration has keys and values to copy, but no state where the common part ends.
        if self._engine.model.shape.row_layers > 1:
            return None
        best: tuple[int, BatchHandle, Turn] | None = None
        for handle in running:
            other = handle.tag
            if isinstance(other, Turn) and (common := self._common_chunks(other)) > (best[0] if best else 0):
                best = (common, handle, other)
        if best is None:
            return None
        common, leader, source = best
        ends = self.asked.match.chunk_ends
        start, rest = ends[common - 1], ends[common:]
        self.grid = replace(self.asked.grid, chunk_ends=rest, start=start)
        own_chunks = sum(end <= start for end in source.grid.chunk_ends)
        return Follow(leader=leader, num_chunks=own_chunks, copy=lambda: self._copy_from(source, start))

    def _common_chunks(self, other: Turn) -> int:
        """Leading chunks that both find in the store: equal chain hashes are equal tokens in equal chunks."""
        common = 0
        for mine, theirs in zip(self.asked.match.chain_hashes, other.asked.match.chain_hashes, strict=False):
            if mine != theirs:
                break
            common += 1
        return common

    def _copy_from(self, source: Turn, num_tokens: int) -> None:
        assert self.kv is not None, "prepared turns have a buffer"
        assert source.kv is not None, "prepared turns have a buffer"
        self.kv.copy_from(source.kv, num_tokens)

    def start(self) -> bool:
        """See ``DecodePort.start``."""
        assert self._port is not None, "a turn starts to decode after it was prepared"
        assert self._port.logits is not None, "the prompt always has a suffix"
        self.tokens.append(self._sampler.choose(self._port.logits))
        # Decoding moves states of its own: the next turn goes on from those at the end of the prompt.
        self._decoded = None if self._port.end_states is None else self._port.end_states.clone()
        self._ttft_s = time.perf_counter() - self.asked.started_s
        return self._goes_on()

    def step(self) -> bool:
        """See ``DecodePort.step``."""
        assert self.kv is not None, "prepared turns have a buffer"
        position = len(self.asked.prompt) + len(self.tokens) - 1
        logits = self._engine.runner.decode_step(self.tokens[-1], position, self.kv, self._decoded)
        self.tokens.append(self._sampler.choose(logits))
        return self._goes_on()

    def _goes_on(self) -> bool:
        return len(self.tokens) < self.asked.max_new_tokens and self.tokens[-1] not in self.asked.stop_tokens

    def end(self, outcome: BatchOutcome) -> PendingSave | None:
        """Note the answer in the session and start writing what is new; None for nothing to write."""
        assert self.kv is not None, "answered turns have a buffer"
        assert self._port is not None, "answered turns have ports"
        asked = self.asked
        self._port.keep_states()
        self.session.note_turn(asked.prompt, (*asked.grid.chunk_ends, *asked.grid.suffix_ends), self.kv, self.tokens)
        return self.session.start_save(first_chunk=self._first_unsaved(outcome)) if asked.save else None

    def _first_unsaved(self, outcome: BatchOutcome) -> int:
        """First chunk to write: the first new one, or all when the store lost or damaged a cell."""
        report = self._report(outcome)
        lost = {LoadOutcome.MISS.value, LoadOutcome.CORRUPT.value}
        return 0 if report is not None and lost & report.failed_loads.keys() else self.asked.grid.num_chunks

    def reply(self, outcome: BatchOutcome, pending: PendingSave | None, *, timeout_s: float | None = None) -> Reply:
        """The reply, once the save has ended; see ``PendingSave.wait``."""
        assert self._port is not None, "answered turns have ports"
        assert self._port.logits is not None, "the prompt always has a suffix"
        asked = self.asked
        return Reply(
            tokens=tuple(self.tokens),
            logits=self._port.logits,
            ttft_s=self._ttft_s,
            resident_tokens=asked.resident_ends[-1] if asked.resident_ends else 0,
            restored_tokens=asked.match.num_tokens,
            suffix_tokens=asked.grid.suffix_tokens,
            report=self._report(outcome),
            saved=SaveReport() if pending is None else pending.wait(timeout_s),
            lookup_timed_out=asked.match.timed_out,
            shared_tokens=self.grid.start if asked.match.chunk_ends else 0,
            itl_s=outcome.itl_s,
        )

    def _report(self, outcome: BatchOutcome) -> RestoreReport | None:
        return outcome.report if self.asked.match.chunk_ends else None
