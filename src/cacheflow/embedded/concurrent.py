"""Many sessions at once on one engine: their prefixes restored, and their answers decoded, side by side.

Everything that touches the model happens on one compute thread; see ``restore.executor``. An answer is the one
that ``Session.generate`` gives, bit for bit: only the order in which cells are restored differs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from cacheflow.embedded.asked import checked_answer
from cacheflow.embedded.batch_options import BatchOptions
from cacheflow.embedded.host import SessionHost
from cacheflow.embedded.reply import Reply
from cacheflow.embedded.restorer import CUDA_CLAIM_S
from cacheflow.embedded.session import Session
from cacheflow.embedded.ticket import SubmittedTurn, Ticket
from cacheflow.engine.arguments import number
from cacheflow.engine.sampling import Sampling
from cacheflow.engine.transfer_port import StoreTicket
from cacheflow.errors import ConfigError
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.restore.batch import BatchOutcome, BatchRequest
from cacheflow.restore.executor import BatchExecutor
from cacheflow.restore.pace import DecodePace
from cacheflow.state.batch import Admission, BatchScheduler


class ConcurrentBatch:
    """Takes requests from any thread until it is closed; while it is open the engine serves nothing else.

    As a context manager it waits for every reply on leaving, unless an exception ends it.
    """

    def __init__(
        self, engine: SessionHost, options: BatchOptions, *, on_close: Callable[[], None] = lambda: None
    ) -> None:
        """Start the threads; made by ``Engine.concurrent``."""
        restorer = engine.restorer
        on_cuda = engine.model.device.type == "cuda"
        scheduler = BatchScheduler(
            make_batch_policy(options.objective, restorer.policy),
            restorer.rates,
            starvation_s=options.starvation_s,
            min_claim_s=CUDA_CLAIM_S if on_cuda else 0.0,
        )
        itl_slo_s = None if options.itl_slo_ms is None else options.itl_slo_ms / 1e3
        self._engine, self._options, self._on_close = engine, options, on_close
        self._executor: BatchExecutor[StoreTicket] = BatchExecutor(
            scheduler,
            options=restorer.options,
            admission=Admission(options.kv_capacity_tokens, starvation_s=options.starvation_s),
            pace=DecodePace(budget_s=options.recompute_budget_ms / 1e3, itl_slo_s=itl_slo_s),
        )
        self._savers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheflow-save")
        self._lock = threading.Lock()
        self._busy: set[Session] = set()

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
    ) -> Ticket:
        """Ask for an answer; looks the prefix up, then returns.

        Args:
            session: Of this engine, with no other request in this batch.
            tokens: See ``Session.generate``, as for the other arguments.
            max_new_tokens: Longest answer.
            sampling: Greedy unless told otherwise.
            stop_tokens: The answer ends after one of these.
            save: Write what this turn prefilled to the store; the reply waits for it, other requests do not.
            deadline_s: Seconds from now until which the first token should be there, for objective ``slo``.

        Raises:
            PromptError: The prompt cannot be served, or needs more memory than ``kv_capacity_tokens``.
            ConfigError: An argument is of the wrong type or out of range; the session has a request here already, or is
                another engine's; or the batch is closed.
        """
        _check(self._engine, session, deadline_s)
        stop_tokens = checked_answer(sampling, stop_tokens, save)
        with self._lock:
            if session in self._busy:
                raise ConfigError("this session has a request in the batch already; wait for its reply")
            self._busy.add(session)
        try:
            turn = SubmittedTurn(
                self._engine,
                session,
                session.begin(tokens, max_new_tokens=max_new_tokens),
                sampling=sampling,
                stop_tokens=stop_tokens,
                exact_kv=self._options.kv_capacity_tokens is not None,
            )
            ticket = Ticket(turn)
            request: BatchRequest[StoreTicket] = BatchRequest(
                problem=turn.problem(),
                prepare=turn.prepare,
                num_tokens=turn.num_kv_tokens,
                deadline_s=None if deadline_s is None else float(deadline_s),
                tag=turn,
                on_end=lambda ended: self._answered(ticket, turn, ended, save=save),
            )
            ticket.handle = self._executor.submit(request)
        except BaseException:
            self._free(session)
            raise
        return ticket

    def close(self) -> None:
        """Give up what has no reply and end every thread; on return no read is under way. Closing again is harmless."""
        self._executor.close()
        self._savers.shutdown()
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

    def _answered(self, ticket: Ticket, turn: SubmittedTurn, ended: Future[BatchOutcome], *, save: bool) -> None:
        """Note the turn in its session and start its save, on the compute thread; the reply comes from another."""
        error = ended.exception()
        if error is not None:
            self._free(turn.session)
            ticket.reply.set_exception(error)
            return
        try:
            pending = turn.end(ended.result(), save=save)
        except Exception as error:  # noqa: BLE001 -- the reply fails with it
            self._free(turn.session)
            ticket.reply.set_exception(error)
            return

        def reply() -> None:
            answered: Reply | None = None
            failed: BaseException | None = None
            try:
                answered = turn.answered(ended.result(), pending)
            except Exception as error:  # noqa: BLE001 -- the reply fails with it
                failed = error
            self._free(turn.session)
            if answered is None:
                ticket.reply.set_exception(failed)
            else:
                ticket.reply.set_result(answered)

        self._savers.submit(reply)

    def _free(self, session: Session) -> None:
        with self._lock:
            self._busy.discard(session)


def _check(engine: SessionHost, session: Session, deadline_s: float | None) -> None:
    """Refuse what would harm others of the batch."""
    if not isinstance(session, Session) or not session.is_of(engine):
        raise ConfigError("the session is not one of this engine's: its KV would be saved under another model's key")
    if deadline_s is not None and number("deadline_s", deadline_s, above=0) == float("inf"):
        raise ConfigError(f"deadline_s is {deadline_s!r}, must be finite, or None")
