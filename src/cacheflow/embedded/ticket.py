"""One request of a concurrent batch: what it runs on, whom it shares a prefix with, and the ticket its caller holds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from cacheflow.embedded.answer import Answer
from cacheflow.embedded.archive import PendingSave
from cacheflow.embedded.host import SessionHost
from cacheflow.embedded.reply import Reply
from cacheflow.embedded.session import Session
from cacheflow.embedded.turn import Turn, first_unsaved
from cacheflow.engine.arguments import timeout
from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.sampling import Sampling, TokenSampler
from cacheflow.engine.saver import SaveReport
from cacheflow.engine.transfer_port import StoreTicket
from cacheflow.errors import CostRangeError
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.report import RestoreReport
from cacheflow.restore.batch import BatchHandle, BatchOutcome, Follow, Prepared


class SubmittedTurn:
    """A turn among others; ``prepare``, ``end`` on the compute thread, the rest on its submitter's or the saver's.

    Attributes:
        session: Whose turn.
        turn: The prompt.
        grid: What it restores itself; shorter than the turn's when it shares a prefix.
        kv: Its buffer; None before ``prepare``.
    """

    def __init__(
        self,
        engine: SessionHost,
        session: Session,
        turn: Turn,
        *,
        sampling: Sampling | None,
        stop_tokens: frozenset[int],
        exact_kv: bool,
    ) -> None:
        """Allocate nothing yet; ``exact_kv`` for a buffer no longer than the turn needs."""
        self.session, self.turn = session, turn
        self.grid = turn.restore_grid
        self.kv: KVBuffer | None = None
        self._engine, self._sampling, self._stop_tokens, self._exact_kv = engine, sampling, stop_tokens, exact_kv
        self._answer: Answer | None = None
        self._port: EngineComputePort | None = None

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of keys and values that it holds while it is served."""
        return max(self.turn.num_tokens, self.session.kv_capacity_tokens)

    def problem(self) -> RestoreProblem:
        """What ``grid`` costs. New tokens alone are served outside the measured range too, at a guess."""
        try:
            return self._engine.problem(self.grid)
        except CostRangeError:
            if self.grid.num_chunks:
                raise
            chunk_tokens = self._engine.chunking.chunk_tokens
            one = Grid(chunk_ends=(), num_blocks=self.grid.num_blocks, suffix_ends=(chunk_tokens,))
            guess = self._engine.problem(one)
            times = self.grid.suffix_tokens / chunk_tokens
            return RestoreProblem(
                grid=self.grid,
                compute_KB=guess.compute_KB,
                kv_only_KB=guess.kv_only_KB,
                load_bytes_KB=guess.load_bytes_KB,
                link=guess.link,
                suffix_B=guess.suffix_B * times,
                head_s=guess.head_s,
            )

    def prepare(self, running: Sequence[BatchHandle]) -> Prepared[StoreTicket]:
        """Allocate the buffer and open the ports; shares the longest prefix that another request brings."""
        engine, turn = self._engine, self.turn
        if self.kv is None:
            self.kv = self.session.buffer(turn.num_tokens, spare=not self._exact_kv)
        self.grid = turn.restore_grid
        follow = self._find_leader(running)
        self._port = EngineComputePort(
            engine.runner,
            grid=self.grid,
            tokens=turn.prompt,
            kv=self.kv,
            layers_per_block=engine.chunking.layers_per_block,
        )
        self._answer = Answer(
            engine.runner,
            self._port,
            self.kv,
            turn,
            sampler=TokenSampler(self._sampling),
            stop_tokens=self._stop_tokens,
        )
        return Prepared(
            problem=self.problem(),
            compute=self._port,
            transfer=self.session.archive.open(self.grid, turn.match, self.kv),
            decode=self._answer,
            follow=follow,
        )

    def _find_leader(self, running: Sequence[BatchHandle]) -> Follow | None:
        """Whom to follow; cuts ``grid`` where its part ends."""
        best: tuple[int, BatchHandle, SubmittedTurn] | None = None
        for handle in running:
            other = handle.tag
            if isinstance(other, SubmittedTurn) and (common := self._common_chunks(other)) > (best[0] if best else 0):
                best = (common, handle, other)
        if best is None:
            return None
        common, leader, source = best
        ends = self.turn.match.chunk_ends
        start, rest = ends[common - 1], ends[common:]
        self.grid = Grid(
            chunk_ends=rest, num_blocks=self.grid.num_blocks, suffix_ends=self.turn.grid.suffix_ends, start=start
        )
        own_chunks = sum(end <= start for end in source.grid.chunk_ends)
        return Follow(leader=leader, num_chunks=own_chunks, copy=lambda: self._copy_from(source, start))

    def _common_chunks(self, other: SubmittedTurn) -> int:
        """Leading chunks that both find in the store: equal chain hashes are equal tokens in equal chunks."""
        common = 0
        for mine, theirs in zip(self.turn.match.chain_hashes, other.turn.match.chain_hashes, strict=False):
            if mine != theirs:
                break
            common += 1
        return common

    def _copy_from(self, source: SubmittedTurn, num_tokens: int) -> None:
        assert self.kv is not None, "prepared requests have a buffer"
        assert source.kv is not None, "prepared requests have a buffer"
        self.kv.kv_L2THD[:, :, :num_tokens].copy_(source.kv.kv_L2THD[:, :, :num_tokens])

    def end(self, outcome: BatchOutcome, *, save: bool) -> PendingSave | None:
        """Note the answer in the session and start writing what is new."""
        assert self.kv is not None, "answered requests have a buffer"
        assert self._answer is not None, "answered requests have an answer"
        self.session.end(self.turn, self.kv, self._answer.tokens)
        if not save:
            return None
        return self.session.start_save(first_chunk=first_unsaved(self.turn, self._report(outcome)))

    def answered(self, outcome: BatchOutcome, pending: PendingSave | None) -> Reply:
        """The reply, once the save is through."""
        assert self._answer is not None, "answered requests have an answer"
        assert self._port is not None, "answered requests have ports"
        assert self._port.logits is not None, "the prompt always has a suffix"
        turn = self.turn
        return Reply(
            tokens=tuple(self._answer.tokens),
            logits=self._port.logits,
            ttft_s=self._answer.ttft_s,
            resident_tokens=turn.resident_tokens,
            restored_tokens=turn.match.num_tokens,
            suffix_tokens=turn.grid.suffix_tokens,
            report=self._report(outcome),
            saved=SaveReport() if pending is None else pending.wait(None),
            lookup_timed_out=turn.match.timed_out,
            shared_tokens=self.grid.start if turn.match.chunk_ends else 0,
            itl_s=outcome.itl_s,
        )

    def _report(self, outcome: BatchOutcome) -> RestoreReport | None:
        return outcome.report if self.turn.match.chunk_ends else None


class Ticket:
    """A request that was submitted; every method may be called from any thread.

    Attributes:
        reply: Resolves with the reply.
        handle: The request in the executor.
    """

    def __init__(self, turn: SubmittedTurn) -> None:
        """Made by ``ConcurrentBatch.submit``, which sets ``handle``."""
        self.reply: Future[Reply] = Future()
        self.reply.set_running_or_notify_cancel()  # a future's own cancel would not end the restoration
        self.handle: BatchHandle
        self._turn = turn

    def result(self, timeout_s: float | None = None) -> Reply:
        """Wait for the reply.

        Raises:
            TimeoutError: It did not come within ``timeout_s``.
            RestoreCancelled: The request was cancelled, or the batch closed; the session is as before.
        """
        return self.reply.result(timeout("timeout_s", timeout_s))

    def first_token(self, timeout_s: float | None = None) -> RestoreReport:
        """Wait for the first token; the report counts seconds from the submission.

        Raises:
            TimeoutError: It did not come within ``timeout_s``.
            RestoreCancelled: See ``result``.
        """
        return self.handle.first_token.result(timeout("timeout_s", timeout_s))

    def done(self) -> bool:
        """Whether ``result`` would return, or raise, at once."""
        return self.reply.done()

    def cancel(self) -> None:
        """Give the request up; ``result`` raises ``RestoreCancelled`` soon, unless the reply is there."""
        self.handle.cancel()
