"""The rounds of ``bench ranks``: splits of one model over ranks take turns on the same prompts, each checked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from cacheflow.bench.records.base import Environment
from cacheflow.bench.records.ranks import RanksRecord
from cacheflow.bench.suite import rotated
from cacheflow.bench.vllm.ask import compare, nudge
from cacheflow.bench.vllm.client import Completion
from cacheflow.bench.vllm.costs import PrefixSize
from cacheflow.bench.vllm.counts import EngineCounts, counts_between
from cacheflow.bench.vllm.fleet import Fleet, wait_until_at_rest
from cacheflow.bench.vllm.policies import LinkSetup, transfer_config
from cacheflow.bench.vllm.server import ServerOptions
from cacheflow.bench.vllm.workload import BenchModel, prompt

POLICY = "cacheflow"
ANSWER_TOKENS = 32
COUNTED_S = 5.0
"""Longest wait until the engine has counted a restoration: its metrics come with its next step."""
FAST_LINK_BYTES_PER_S = 1e12
MEMORY_MARGIN = 1.2
"""Free memory asked for, over what servers at rest take: one that starts takes more."""
SAVE, AUTO, OFF = ({"cacheflow": mode} for mode in ("recompute", "auto", "off"))


@dataclass(frozen=True, slots=True, order=True)
class RankSplit:
    """How a model is split over ranks; without the GPU axis stages hand activations over in order."""

    pipeline: int
    tensor: int
    gpu_axis: bool = True

    @property
    def name(self) -> str:
        """For files and logs."""
        return f"pp{self.pipeline}-tp{self.tensor}" + ("" if self.gpu_axis else "-in-order")

    @property
    def num_ranks(self) -> int:
        """Processes that compute."""
        return self.pipeline * self.tensor


def splits_of(pipeline_sizes: Sequence[int], tensor_sizes: Sequence[int]) -> list[RankSplit]:
    """Pipeline and tensor parallelism by themselves, one rank first; stages with and without the axis."""
    splits = [RankSplit(1, 1)]
    for size in sorted(set(pipeline_sizes) - {1}):
        splits += [RankSplit(size, 1), RankSplit(size, 1, gpu_axis=False)]
    return splits + [RankSplit(1, size) for size in sorted(set(tensor_sizes) - {1})]


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksOptions:
    """What a study runs.

    Attributes:
        server: Of one rank; each split changes its sizes, cores and memory.
        store_root: Folder under which each split keeps its store and its profiles.
    """

    server: ServerOptions
    store_root: Path
    size: PrefixSize
    repeats: int
    environment: Environment


@dataclass(slots=True)
class RanksStudy:
    """One model and its prompts.

    Attributes:
        tokens: Source text, long enough for every prompt.
        prefill_s: What one rank's own prefill of the prefix takes; 0 before ``prepare``.
        memory_bytes: Memory of each process of one rank's server, greatest first; empty before ``prepare``.
        references: Each split's own answer to each prompt, without restoration.
    """

    model: BenchModel
    tokens: Sequence[int]
    options: RanksOptions
    prefill_s: float = 0.0
    memory_bytes: list[int] = field(default_factory=list)
    references: dict[tuple[RankSplit, int], Completion] = field(default_factory=dict)

    def prepare(self) -> None:
        """Measure one rank by itself: its time for the prefix, the ground of all ratios, and its memory."""
        with self._fleet([RankSplit(1, 1)], FAST_LINK_BYTES_PER_S) as fleet, fleet.turn(RankSplit(1, 1).name) as server:
            times = []
            for measured in range(max(3, self.options.repeats)):
                server.client.evict()
                whole = self._prompt(measured % self.options.repeats)
                short = whole[-self.options.size.suffix_tokens :]
                idle_s = server.client.complete(short, max_tokens=1, params=OFF).ttft_s
                server.client.evict()
                times.append(server.client.complete(whole, max_tokens=1, params=OFF).ttft_s - idle_s)
            self.memory_bytes = sorted(server.memory_bytes(), reverse=True)
        self.prefill_s = median(times[1:])  # the first is a process's first

    def bytes_per_s(self, ratio: float) -> float:
        """Bandwidth at which one rank loads the prefix in ``ratio`` times what its own prefill takes."""
        return self.options.size.num_tokens * self.model.shape.kv_bytes_per_token / (ratio * self.prefill_s)

    def needed_bytes(self, splits: Sequence[RankSplit]) -> float:
        """Bytes of memory for a server of each split, all started; a rank takes at most what an only one does."""
        more_ranks = sum(split.num_ranks - 1 for split in splits)
        return MEMORY_MARGIN * (len(splits) * sum(self.memory_bytes) + more_ranks * self.memory_bytes[0])

    def rounds(
        self, splits: Sequence[RankSplit], *, ratio: float, together: bool, on_step: Callable[[str], None]
    ) -> Iterator[RanksRecord]:
        """Every repeat of one ratio; in a repeat each split has its turn, a different one first each time.

        Args:
            splits: What takes turns.
            ratio: See ``bytes_per_s``.
            together: Start all servers first, and stop those not in turn; else each turn starts and ends its own.
            on_step: Called with what comes next.

        Raises:
            ServerError: A server did not start, or failed in its turn.
        """
        bytes_per_s, repeats = self.bytes_per_s(ratio), range(self.options.repeats)
        with ExitStack() as started:
            if together:
                kept = started.enter_context(self._fleet(splits, bytes_per_s))
                for split in splits:
                    on_step(f"{split.name} saves")
                    self._save(kept, split, repeats)
            for repeat in repeats:
                for split in rotated(splits, repeat):
                    with nullcontext(kept) if together else self._fleet([split], bytes_per_s) as fleet:
                        if not together:
                            on_step(f"{split.name} saves")
                            self._save(fleet, split, [repeat])
                        on_step(split.name)
                        yield self._run(fleet, split, repeat=repeat, ratio=ratio)

    def _save(self, fleet: Fleet, split: RankSplit, repeats: Sequence[int]) -> None:
        """Have prompts computed and saved; their answers are the references. Then restore one, untimed."""
        with fleet.turn(split.name) as server:
            for repeat in repeats:
                server.client.evict()
                saving = self._prompt(repeat)
                answer = server.client.complete(saving, max_tokens=ANSWER_TOKENS, params=SAVE)
                self.references.setdefault((split, repeat), answer)
                nudge(server.client)
                wait_until_at_rest(server)
            server.client.evict()
            server.client.complete(self._prompt(repeats[0]), max_tokens=2, params=AUTO)

    def _run(self, fleet: Fleet, split: RankSplit, *, repeat: int, ratio: float) -> RanksRecord:
        with fleet.turn(split.name) as server:
            client = server.client
            nudge(client)
            client.evict()
            own = client.complete(self._prompt(repeat), max_tokens=1, params=OFF)
            client.evict()
            before = client.metrics()
            answer = client.complete(self._prompt(repeat), max_tokens=ANSWER_TOKENS, params=AUTO)
            deadline_s = time.monotonic() + COUNTED_S
            counts = counts_between(before, client.metrics())
            while not counts.restore_s and time.monotonic() < deadline_s:
                nudge(client)
                counts = counts_between(before, client.metrics())
        return self.record(split, answer, counts, own_s=own.ttft_s, repeat=repeat, ratio=ratio)

    def record(
        self, split: RankSplit, answer: Completion, counts: EngineCounts, *, own_s: float, repeat: int, ratio: float
    ) -> RanksRecord:
        """What is kept of one restoration; ``own_s`` is vLLM's own time to first token."""
        shape, size = self.model.shape, self.options.size
        reference = self.references[split, repeat]
        compared = compare(answer, reference, beside_neighbour=False)
        per_token = shape.num_layers / size.chunk_tokens
        restored = counts.restore_s > 0 and counts.bound_ratio > 0
        return RanksRecord(
            suite="ranks",
            policy=POLICY,
            device="cpu",
            dtype=self.options.server.dtype,
            **self.model.on_record(size, bytes_per_s=self.bytes_per_s(ratio), ratio=ratio),
            repeat=repeat,
            restore_s=counts.restore_s if restored else None,
            ttft_s=answer.ttft_s,
            bound_restore_s=counts.restore_s / counts.bound_ratio if restored else None,
            bound_ttft_s=None,
            recomputed_cells=round(counts.recomputed_tokens * per_token),
            loaded_cells=round(counts.loaded_tokens * per_token),
            wasted_bytes=round(counts.wasted_tokens * shape.kv_bytes_per_token),
            correct=compared.correct,
            environment=self.options.environment,
            loaded_bytes=round(counts.loaded_bytes),
            pipeline_parallel_size=split.pipeline,
            tensor_parallel_size=split.tensor,
            gpu_axis=split.gpu_axis,
            recompute_s=own_s,
            equal_tokens=compared.equal_tokens,
            compared_tokens=answer.num_tokens,
            note="" if restored else "not restored: vLLM's own prefill was expected to be as fast",
        )

    @contextmanager
    def _fleet(self, splits: Sequence[RankSplit], bytes_per_s: float) -> Iterator[Fleet]:
        with ExitStack() as stack:
            fleet = Fleet()
            for split in splits:
                whole = self.options.server
                options = replace(
                    whole,
                    pipeline_parallel_size=split.pipeline,
                    tensor_parallel_size=split.tensor,
                    omp_bind=cores_of(split.num_ranks),
                    kv_cache_gib=-(-whole.kv_cache_gib // split.num_ranks),  # each has its layers or heads
                )
                fleet.start(stack, split.name, options, self.transfer(split, bytes_per_s))
            yield fleet

    def transfer(self, split: RankSplit, bytes_per_s: float) -> dict[str, Any] | None:
        """``--kv-transfer-config`` of a split's server."""
        root = self.options.store_root / split.name
        setup = LinkSetup(
            bytes_per_s=bytes_per_s,
            chunk_tokens=self.options.size.chunk_tokens,
            store_dir=root / "store",
            profile_dir=root / "profiles",
            boundary_states=split.gpu_axis,
        )
        return transfer_config(POLICY, setup)

    def _prompt(self, repeat: int) -> list[int]:
        return prompt(self.tokens, repeat, self.options.size.num_tokens + self.options.size.suffix_tokens)


def cores_of(num_ranks: int) -> str:
    """A core for each rank, in vLLM's notation; ranks share cores where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(num_ranks))
