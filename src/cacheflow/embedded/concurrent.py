"""Many sessions at once on one engine: their prefixes restored, and their answers decoded, side by side.

Everything that touches the model happens on one compute thread; see ``restore.executor``. An answer is the one
that ``Session.generate`` gives, bit for bit: only the order in which cells are restored differs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Self

from cacheflow.embedded.archive import PendingSave
from cacheflow.embedded.batch_options import BatchOptions
from cacheflow.embedded.host import SessionHost
from cacheflow.embedded.reply import Reply
from cacheflow.embedded.session import Session
from cacheflow.embedded.turn import Conversation, Turn
from cacheflow.engine.arguments import number, timeout
from cacheflow.engine.sampling import Sampling
from cacheflow.engine.transfer_port import StoreTicket
from cacheflow.errors import ConfigError
from cacheflow.plan.report import RestoreReport
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.restore.batch import BatchHandle, BatchOutcome
from cacheflow.restore.decode_pace import DecodePace
from cacheflow.restore.executor import BatchExecutor
from cacheflow.state.batch import Admission, BatchScheduler
from cacheflow.threads import start_thread


class PendingReply:
    """The reply to a request of a batch, once it is there; every method may be called from any thread."""

    def __init__(self, handle: BatchHandle, reply: Future[Reply]) -> None:
        """Made by ``ConcurrentBatch.submit``."""
        self._handle, self._reply = handle, reply

    def result(self, timeout_s: float | None = None) -> Reply:
        """Wait for the reply.

        Raises:
            TimeoutError: It did not come within ``timeout_s``.
            RestoreCancelled: The request was cancelled, or the batch closed; the session is as before.
        """
        return self._reply.result(timeout("timeout_s", timeout_s))

    def first_token(self, timeout_s: float | None = None) -> RestoreReport:
        """Wait for the first token; the report counts seconds from the submission.

        Raises:
            TimeoutError: It did not come within ``timeout_s``.
            RestoreCancelled: See ``result``.
        """
        return self._handle.first_token.result(timeout("timeout_s", timeout_s))

    def done(self) -> bool:
        """Whether ``result`` would return, or raise, at once."""
        return self._reply.done()

    def cancel(self) -> None:
        """Give the request up; ``result`` raises ``RestoreCancelled`` soon, unless the reply is there."""
        self._handle.cancel()


class ConcurrentBatch:
    """Takes requests from any thread until it is closed; while it is open the engine serves nothing else.

    As a context manager it waits for every reply on leaving, unless an exception ends it.
    """

    def __init__(
        self, engine: SessionHost, options: BatchOptions, *, on_close: Callable[[], None] = lambda: None
    ) -> None:
        """Start the threads; made by ``Engine.concurrent``."""
        restorer = engine.restorer
        scheduler = BatchScheduler(
            make_batch_policy(options.objective, restorer.policy),
            restorer.rates,
            starvation_s=options.starvation_s,
            min_claim_s=restorer.min_claim_s,
        )
        itl_slo_s = None if options.itl_slo_ms is None else options.itl_slo_ms / 1e3
        self._engine, self._options, self._on_close = engine, options, on_close
        self._executor: BatchExecutor[StoreTicket] = BatchExecutor(
            scheduler,
            options=restorer.options,
            admission=Admission(options.kv_capacity_tokens, starvation_s=options.starvation_s),
            pace=DecodePace(budget_s=options.recompute_budget_ms / 1e3, itl_slo_s=itl_slo_s),
        )
        self._saving: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._busy: set[Conversation] = set()

    def submit(  # noqa: PLR0913 -- what ``Session.generate`` takes, keyword-only, and the session
        self,
        session: Session,
        tokens: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_tokens: frozenset[int] = frozenset(),
        save: bool = True,
        deadline_s: float | None = None,
    ) -> PendingReply:
        """Ask for an answer; looks the prefix up, then returns.

        Args:
            session: Of this engine, with no other request in this batch.
            tokens: See ``Session.generate``, as for the other arguments.
            max_new_tokens: Longest answer.
            sampling: Greedy unless given.
            stop_tokens: The answer ends after one of these.
            save: Write what this turn prefilled to the store; this reply waits for it, other requests and replies not.
            deadline_s: Seconds from now until which the first token should be there, for objective ``slo``.

        Raises:
            PromptError: The prompt cannot be served, or needs more memory than ``kv_capacity_tokens``.
            ConfigError: An argument is of the wrong type or out of range; the session has a request here already, or is
                another engine's; or the batch is closed.
        """
        _check(self._engine, session, deadline_s)
        with self._lock:
            if session in self._busy:
                raise ConfigError("this session has a request in the batch already; wait for its reply")
            self._busy.add(session)
        try:
            asked = session.ask(
                tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens, save=save
            )
            turn = Turn(self._engine, session, asked, kv_capacity_tokens=self._options.kv_capacity_tokens)
            reply: Future[Reply] = Future()
            reply.set_running_or_notify_cancel()  # a future's own cancel would not end the restoration
            request = replace(
                turn.request(first_token_within_s=None if deadline_s is None else float(deadline_s)),
                on_end=lambda ended: self._answered(reply, turn, ended),
            )
            handle = self._executor.submit(request)
        except BaseException:
            self._free(session)
            raise
        return PendingReply(handle, reply)

    def close(self) -> None:
        """Give up what has no answer and end every thread; on return no read is under way. Closing again is harmless.

        Replies whose answers are being saved are waited for, until the deadlines of the writes at most. A store that
        hangs in a read is waited for as ``Session.generate`` does.
        """
        self._executor.close()
        for thread in self._saving:
            thread.join()
        with self._lock:
            on_close, self._on_close = self._on_close, lambda: None
        on_close()

    def __enter__(self) -> Self:
        """Return the batch."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for every reply, unless an exception ends the batch; then close."""
        try:
            if kind is None:
                self._executor.drain()
        finally:  # also when waiting is interrupted
            self.close()

    def _answered(self, reply: Future[Reply], turn: Turn, ended: Future[BatchOutcome]) -> None:
        """Note the turn in its session and start its save, on the compute thread; another thread waits for that."""
        error = ended.exception()
        pending: PendingSave | None = None
        if error is None:
            try:
                pending = turn.end(ended.result())
            except Exception as failed:  # noqa: BLE001 -- the reply fails with it
                error = failed
        if error is not None:
            self._free(turn.session)
            reply.set_exception(error)
        elif pending is None:
            self._reply(reply, turn, ended.result(), None)
        else:
            work = (reply, turn, ended.result(), pending)
            thread = start_thread(self._reply, name="cacheflow-save", args=work)
            self._saving = [each for each in self._saving if each.is_alive()]
            if thread is not None:
                self._saving.append(thread)
            else:  # the writes go on, but nobody can wait for them
                self._reply(*work, timeout_s=0.0)

    def _reply(
        self,
        reply: Future[Reply],
        turn: Turn,
        outcome: BatchOutcome,
        pending: PendingSave | None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Wait for the save, then reply; on a thread of its own where there is something to wait for."""
        answered: Reply | Exception
        try:
            answered = turn.reply(outcome, pending, timeout_s=timeout_s)
        except Exception as failed:  # noqa: BLE001 -- the reply fails with it
            answered = failed
        self._free(turn.session)
        if isinstance(answered, Exception):
            reply.set_exception(answered)
        else:
            reply.set_result(answered)

    def _free(self, session: Conversation) -> None:
        with self._lock:
            self._busy.discard(session)


def _check(engine: SessionHost, session: Session, deadline_s: float | None) -> None:
    """Refuse what would harm others of the batch."""
    if not isinstance(session, Session) or not session.is_of(engine):
        raise ConfigError("the session is not one of this engine's: its KV would be saved under another model's key")
    if deadline_s is not None and number("deadline_s", deadline_s, above=0) == float("inf"):
        raise ConfigError(f"deadline_s is {deadline_s!r}, must be finite, or None")
