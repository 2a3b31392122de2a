"""The demo's session: one conversation that is never evicted, and copies of it restored under every policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cacheflow.bench.environment import environment
from cacheflow.bench.make_record import make_record, of_model, recompute_seconds
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.suite import rotated
from cacheflow.bench.timeline import Timeline
from cacheflow.embedded.engine import Engine, EngineOptions
from cacheflow.embedded.reply import Reply
from cacheflow.embedded.session import Session
from cacheflow.engine.model import LoadedModel, load_model
from cacheflow.errors import ConfigError, StoreError
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Grid, regular_ends
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import RestoreReport
from cacheflow.policies.registry import make_policy
from cacheflow.profiling.calibrate import Calibration, CalibrationOptions, OnStep
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.workloads.coding import SYSTEM, coding_session

ANSWER_TOKENS = 24
MAX_TOKENS = 4096
SUITE = "demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTurn:
    """One turn as tokens: what is new, and how much conversation lies before it."""

    tokens: tuple[int, ...]
    history_tokens: int


@dataclass(slots=True, kw_only=True)
class Demo:
    """A conversation played twice: resident as the reference, evicted and restored under every policy.

    Attributes:
        timelines: One per policy, of the last turn's first repeat.
        all_equal: Whether every restored turn equalled the reference so far.
        last_prefix_tokens: Prefix of the last turn that was restored.
    """

    model: LoadedModel
    policies: tuple[str, ...]
    timelines: list[Timeline] = field(default_factory=list)
    all_equal: bool = True
    last_prefix_tokens: int = 0
    _store: ThrottledStore = field(init=False)
    _engine: Engine = field(init=False)
    _session: Session = field(init=False)
    _reference: Reply = field(init=False)
    _history: tuple[int, ...] = ()
    _saved_ends: tuple[int, ...] = ()

    @classmethod
    def open(cls, model: str, *, policies: tuple[str, ...], num_turns: int) -> Demo:
        """Load a model that has a tokenizer.

        Raises:
            ConfigError: It has none, there are not two turns, or see ``load_model``.
        """
        if num_turns < 2:
            raise ConfigError(f"the demo restores from the second turn on, {num_turns} turn is too few")
        loaded = load_model(model)
        if loaded.tokenizer is None:
            raise ConfigError(f"model {model!r} has no tokenizer; the demo needs one to read source text")
        return cls(model=loaded, policies=policies)

    def calibrate(self, on_step: OnStep) -> None:
        """Measure costs, check the model against itself, open store and session."""
        options = CalibrationOptions(max_tokens=MAX_TOKENS, repeats=1)
        costs = Calibration(self.model, options, on_step).measure_costs()
        capacity = 2 * MAX_TOKENS * self.model.shape.kv_bytes_per_token
        self._store = ThrottledStore(MemoryStore(capacity_bytes=capacity), 1e12)
        self._engine = Engine(
            self.model, store=self._store, costs=costs, link=LinkCost(bytes_per_s=1e9), options=EngineOptions()
        )
        self._session = self._engine.session()

    def close(self) -> None:
        """Close the store that ``calibrate`` opened."""
        self._store.close()

    def turns(self, chars_per_turn: tuple[int, ...]) -> Iterator[DemoTurn]:
        """The user's turns as tokens of the model's chat format; each needs the answer to the one before."""
        for index, turn in enumerate(coding_session(chars_per_turn)):
            system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n" if index == 0 else "<|im_end|>\n"
            text = f"{system}<|im_start|>user\n{turn.content}<|im_end|>\n<|im_start|>assistant\n"
            tokens = tuple(self._tokenizer(text)["input_ids"])
            yield DemoTurn(tokens=tokens, history_tokens=len(self._session.tokens))

    def text(self, tokens: tuple[int, ...]) -> str:
        """Tokens as text."""
        return str(self._tokenizer.decode(list(tokens)))

    def answer_resident(self, turn: DemoTurn) -> Reply:
        """Answer a turn with the KV still in memory: the reference."""
        self._history, self._saved_ends = tuple(self._session.tokens), self._session.chunk_ends
        self._reference = self._session.generate(turn.tokens, max_new_tokens=ANSWER_TOKENS, save=False)
        return self._reference

    def save(self) -> None:
        """Save the KV of the turn that was just answered.

        Raises:
            StoreError: Not every object could be written.
        """
        report = self._session.save()
        if not report.complete:
            raise StoreError(f"{report.num_failed} objects could not be saved")

    def restore_everywhere(
        self, turn: DemoTurn, *, repeats: int, alone: bool, on_step: OnStep
    ) -> Iterator[RestoreRecord]:
        """Answer the turn from an evicted state under every policy, ``repeats`` times, policies alternating."""
        prefix = Grid(chunk_ends=self._saved_ends, num_blocks=self._engine.num_blocks)
        self.last_prefix_tokens, self.timelines = prefix.num_tokens, []
        problem = self._engine.problem(prefix)
        bytes_per_s = float(problem.load_bytes_KB.sum() / problem.compute_KB.sum())
        self._store.set_bandwidth(bytes_per_s)
        self._engine.link = LinkCost(bytes_per_s=bytes_per_s)
        objectives = (False, True) if alone else (True,)
        done, total = 0, len(objectives) * repeats * len(self.policies)
        for repeat in range(repeats):
            for with_suffix in objectives:
                runs: dict[str, tuple[RestoreReport, bool]] = {}
                for name in rotated(self.policies, repeat):
                    on_step(f"{prefix.num_tokens} evicted tokens, {name}", done, total)
                    runs[name] = self._run(turn, name, with_suffix=with_suffix)
                    done += 1
                    on_step(f"{prefix.num_tokens} evicted tokens, {name}", done, total)
                yield from self._records(runs, prefix, turn, repeat=repeat, with_suffix=with_suffix)

    def _run(self, turn: DemoTurn, policy: str, *, with_suffix: bool) -> tuple[RestoreReport, bool]:
        """Restore the conversation in a fresh session; the report, and whether everything equalled the reference."""
        restorer = self._engine.restorer
        restorer.policy, restorer.rates = make_policy(policy), LiveRates(bytes_per_s=self._engine.link.bytes_per_s)
        session = self._engine.session(history=self._history)
        if with_suffix:
            reply = session.generate(turn.tokens, max_new_tokens=ANSWER_TOKENS, save=False)
            report = reply.report
            equal = reply.tokens == self._reference.tokens and torch.equal(reply.logits, self._reference.logits)
        else:
            report, equal = session.warm(), True
        if report is None:
            raise ConfigError(f"policy {policy}: the store had nothing of the conversation")
        restored, reference = session.resident_kv(), self._session.resident_kv()
        assert restored is not None, "the session has just been restored"
        assert reference is not None, "the reference is never evicted while policies run"
        equal = equal and torch.equal(restored, reference[:, :, : restored.shape[2]])
        self.all_equal = self.all_equal and equal
        return report, equal

    def _records(
        self,
        runs: dict[str, tuple[RestoreReport, bool]],
        prefix: Grid,
        turn: DemoTurn,
        *,
        repeat: int,
        with_suffix: bool,
    ) -> list[RestoreRecord]:
        grid = self._with_suffix(prefix, turn) if with_suffix else prefix
        problem = self._engine.problem(grid)
        least = bound(problem.slowed(self._drift(runs, problem)))
        if with_suffix and repeat == 0:
            self.timelines = [Timeline.of(runs[name][0], bound_s=least.ttft_s) for name in self.policies]
        context = {
            **of_model(self.model),
            "suite": SUITE,
            "chunk_tokens": self._engine.chunking.chunk_tokens,
            "load_compute_ratio": 1.0,
            "repeat": repeat,
            "environment": environment(),
        }
        bytes_per_s = self._engine.link.bytes_per_s
        return [
            make_record(runs[name][0], least, grid, bytes_per_s=bytes_per_s, correct=runs[name][1], **context)
            for name in self.policies
        ]

    def _drift(self, runs: dict[str, tuple[RestoreReport, bool]], problem: RestoreProblem) -> float:
        """Seconds a calibrated compute second took in this round, by its own recompute run."""
        if "recompute" not in runs:
            return 1.0
        return recompute_seconds(runs["recompute"][0]) / float(problem.compute_KB.sum())

    def _with_suffix(self, prefix: Grid, turn: DemoTurn) -> Grid:
        end = len(self._history) + len(turn.tokens)
        return Grid(
            chunk_ends=prefix.chunk_ends,
            num_blocks=prefix.num_blocks,
            suffix_ends=regular_ends(prefix.num_tokens, end, self._engine.chunking.chunk_tokens),
        )

    @property
    def _tokenizer(self) -> Any:  # noqa: ANN401 -- a transformers tokenizer
        return self.model.tokenizer
