"""Several prefixes of one model, many concurrent restorations of all of them: the measured ground of ``bench batch``.

Every prefix is prefilled once in its chunks, its KV and logits are kept as the reference, and its cells are saved in
one store. Every run restores all of them at once from poisoned buffers, over one link with a bandwidth of its own, and
is compared bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cacheflow.bench.batch.simulate import BatchCase
from cacheflow.bench.contender import Contender
from cacheflow.bench.setup import room_bytes, save_prefix
from cacheflow.embedded.restorer import CUDA_CLAIM_S
from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.model import LoadedModel
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.transfer_port import StoreTicket, StoreTransferPort
from cacheflow.errors import ConfigError
from cacheflow.plan.costs import CostTable, build_problem
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.profiling.calibrate import Calibration, CalibrationOptions, OnStep
from cacheflow.restore.batch import BatchHandle, BatchOutcome, BatchRequest, Prepared
from cacheflow.restore.executor import BatchExecutor
from cacheflow.restore.options import ExecutorOptions
from cacheflow.state.batch import BatchScheduler
from cacheflow.stores.keys import Namespace, chain_hashes
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.tensors.pinned_memory import PinnedMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStudyOptions:
    """What is restored."""

    lengths: tuple[int, ...]
    suffix_tokens: int
    chunk_tokens: int = 512
    cost_repeats: int = 2
    executor: ExecutorOptions = ExecutorOptions()  # noqa: RUF009 -- frozen

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ConfigError: No length, or a count is below 1.
        """
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths are {self.lengths}; one or more of at least 1 token are needed")
        for key in ("suffix_tokens", "chunk_tokens", "cost_repeats"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}, must be at least 1")

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(self.lengths) + len(self.lengths) * self.suffix_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRun:
    """One request of a run: how it ended, and whether its KV and logits equalled the reference (``torch.equal``)."""

    arrival_s: float
    outcome: BatchOutcome
    correct: bool


class _Prompt:
    """One prompt: its grid, its buffers and its reference."""

    def __init__(self, runner: LayerRunner, tokens: list[int], grid: Grid) -> None:
        self.tokens, self.grid = tokens, grid
        self.kv: KVBuffer = runner.new_kv(len(tokens))
        self.reference: KVBuffer = runner.new_kv(len(tokens))
        self.logits = runner.prefill(tokens, (*grid.chunk_ends, *grid.suffix_ends), self.reference)
        self.chain = chain_hashes(tokens, grid.chunk_ends)


class BatchStudy:
    """A model with several prefilled and saved prefixes and its costs."""

    def __init__(self, model: LoadedModel, tokens: Sequence[int], *, options: BatchStudyOptions) -> None:
        """Take the text; ``prepare`` does the work.

        Raises:
            ConfigError: Too few tokens, a prompt is longer than the model allows, or the model is a hybrid.
        """
        if model.shape.row_layers > 1:
            raise ConfigError(f"bench batch serves no hybrid models such as {model.name}; bench restore does")
        longest = max(options.lengths) + options.suffix_tokens
        if longest > model.max_tokens or len(tokens) < options.num_tokens:
            raise ConfigError(
                f"the longest prompt has {longest} tokens, the model allows {model.max_tokens}; all have "
                f"{options.num_tokens}, the text {len(tokens)}"
            )
        self.model, self.options = model, options
        self.runner = LayerRunner(model)
        self._tokens = list(tokens)
        self._namespace = Namespace(
            weights_fingerprint=model.fingerprint, dtype=model.shape.dtype, chunk_tokens=options.chunk_tokens
        ).digest
        self.prompts: list[_Prompt] = []
        self._costs: CostTable | None = None
        num_objects = sum(-(-length // options.chunk_tokens) for length in options.lengths) * model.shape.num_layers
        self._store = MemoryStore(capacity_bytes=room_bytes(model.shape, options.num_tokens, num_objects))
        if self.runner.lane is not None:
            self._store.lend_to(PinnedMemory(self.runner.lane.streams))

    def prepare(self, on_step: OnStep = lambda what, done, total: None) -> None:
        """Measure costs, prefill every prompt, save every prefix.

        Raises:
            StoreError: A prefix could not be saved.
        """
        options, shape = self.options, self.model.shape
        longest = max(*options.lengths, options.chunk_tokens) + options.suffix_tokens
        calibration = CalibrationOptions(
            chunk_tokens=options.chunk_tokens,
            max_tokens=min(longest, self.model.max_tokens),
            repeats=options.cost_repeats,
        )
        self._costs = Calibration(self.model, calibration, on_step).measure_costs()
        start = 0
        for index, length in enumerate(options.lengths):
            end = start + length + options.suffix_tokens
            grid = Grid.regular(
                num_tokens=length,
                chunk_tokens=options.chunk_tokens,
                num_blocks=shape.num_layers,
                suffix_tokens=options.suffix_tokens,
            )
            prompt = _Prompt(self.runner, self._tokens[start:end], grid)
            self._save(prompt)
            self.prompts.append(prompt)
            start = end
            on_step("prefilling references", index + 1, len(options.lengths))

    def problems(self, *, bytes_per_s: float, drift: float = 1.0) -> list[RestoreProblem]:
        """What each request costs over a link, a calibrated compute second taking ``drift`` seconds."""
        assert self._costs is not None, "prepare comes first"
        link = LinkCost(bytes_per_s=bytes_per_s)
        problems = [build_problem(self._costs, each.grid, self.model.shape, link=link) for each in self.prompts]
        return [problem.slowed(drift) for problem in problems]

    def bytes_per_s(self, ratio: float) -> float:
        """Bandwidth at which loading all prefixes takes ``ratio`` times as long as recomputing them."""
        problems = self.problems(bytes_per_s=1.0)
        num_bytes = sum(int(problem.load_bytes_KB.sum()) for problem in problems)
        return num_bytes / (ratio * sum(float(problem.compute_KB.sum()) for problem in problems))

    def run(
        self,
        contender: Contender,
        case: BatchCase,
        *,
        order: Sequence[int],
    ) -> list[RequestRun]:
        """Restore all prefixes at once, from poisoned buffers; ``order`` says which prompt each request is."""
        bytes_per_s = case.problems[0].link.bytes_per_s
        prompts = [self.prompts[index] for index in order]
        for prompt in prompts:
            prompt.kv.poison()
        if self.runner.lane is not None:
            self.runner.lane.settle()  # what evicting takes is no part of a restoration
        scheduler = BatchScheduler(
            contender.make(),
            LiveRates(bytes_per_s=bytes_per_s),
            starvation_s=case.starvation_s,
            min_claim_s=0.0 if self.runner.lane is None else CUDA_CLAIM_S,
        )
        link = ThrottledStore(self._store, bytes_per_s)
        ports = [self._port(prompt) for prompt in prompts]
        requests = [
            self._request(prompt, port, problem, link, deadline_s)
            for prompt, port, problem, deadline_s in zip(prompts, ports, case.problems, case.deadlines_s, strict=True)
        ]
        with BatchExecutor[StoreTicket](scheduler, options=self.options.executor) as executor:
            handles = _submit(executor, requests, case.arrivals_s)
        first_s = handles[0].arrival_s
        return [
            RequestRun(
                arrival_s=handle.arrival_s - first_s,
                outcome=handle.result(),
                correct=_equal(prompt, port.logits),
            )
            for handle, prompt, port in zip(handles, prompts, ports, strict=True)
        ]

    def close(self) -> None:
        """Free what was saved."""
        self._store.close()

    def _port(self, prompt: _Prompt) -> EngineComputePort:
        return EngineComputePort(self.runner, grid=prompt.grid, tokens=prompt.tokens, kv=prompt.kv)

    def _request(
        self,
        prompt: _Prompt,
        port: EngineComputePort,
        problem: RestoreProblem,
        link: ThrottledStore,
        deadline_s: float,
    ) -> BatchRequest[StoreTicket]:
        transfer = StoreTransferPort(
            link,
            geometry=CellGeometry(grid=prompt.grid, shape=self.model.shape),
            namespace=self._namespace,
            chain_hashes=prompt.chain,
            kv=prompt.kv,
        )
        prepared = Prepared(problem=problem, compute=port, transfer=transfer)
        return BatchRequest(
            problem=problem,
            prepare=lambda running: prepared,
            first_token_within_s=deadline_s,
        )

    def _save(self, prompt: _Prompt) -> None:
        geometry = CellGeometry(grid=prompt.grid, shape=self.model.shape)
        save_prefix(self._store, prompt.reference, geometry, self._namespace, prompt.chain)


def _submit(
    executor: BatchExecutor[StoreTicket], requests: Sequence[BatchRequest[StoreTicket]], arrivals_s: Sequence[float]
) -> list[BatchHandle]:
    """Submit requests when they are due; those with equal arrivals at the same moment."""
    handles: list[BatchHandle] = []
    started_s = time.perf_counter()
    while len(handles) < len(requests):
        first = len(handles)
        wait_s = arrivals_s[first] - (time.perf_counter() - started_s)
        if wait_s > 0:
            time.sleep(wait_s)  # the gap between arrivals, which the study is about
        due = [i for i in range(first, len(requests)) if arrivals_s[i] == arrivals_s[first]]
        handles += executor.submit_all([requests[i] for i in due])
    return handles


def _equal(prompt: _Prompt, logits: torch.Tensor | None) -> bool:
    kv_equal = torch.equal(prompt.kv.kv_L2THD, prompt.reference.kv_L2THD)
    return kv_equal and logits is not None and torch.equal(logits, prompt.logits)
