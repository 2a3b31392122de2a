"""A vLLM engine of several ranks on the CPU (pipeline stages, tensor-parallel ranks), in processes of its own.

``python -m support.rank_engine`` reads the names of folders from standard input, carries out the script in each and
pickles what came of its steps; ``rank_host.RankHost`` starts it. Ranks are processes of the engine's, or Ray's, and one
alone is in its process; what a test wants of them is sent to them as functions.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import numpy as np

from cacheflow.plan.problem import BoundarySource
from support import kv_bytes, v2_runner
from support.garbage import uncollected
from support.patience import no_late_reads
from support.ray_cluster import ray_cluster
from support.vllm_models import attention_of

BLOCK = 128
"""Tokens of a KV block on the CPU, but for latent attention; vLLM keeps one block for itself."""
POISON = 0x42
KILL_PATIENCE_S = 60.0

if v2_runner.WANTED:
    v2_runner.interpret_triton()  # here, because the workers import this module too


@dataclass(frozen=True, slots=True)
class Ranks:
    """How an engine is split."""

    pipeline: int = 1
    tensor: int = 1

    @property
    def total(self) -> int:
        return self.pipeline * self.tensor


@dataclass
class Script:
    """What to start and what to do with it, step by step; each ``do`` is one method of ``Session`` with arguments."""

    model: str
    ranks: Ranks
    chunk_tokens: int
    max_tokens: int
    options: dict | None = None
    eager: bool = True
    dtype: str = "float32"
    num_kv_blocks: int = 0
    executor: str = "mp"
    connector: str = "CacheFlowConnector"
    steps: list[tuple[str, str, dict]] = field(default_factory=list)

    @property
    def kills(self) -> bool:
        """Whether its last step leaves an engine that cannot be ended any more."""
        return self.steps[-1][0] == "killed"

    def do(self, name: str, label: str = "", /, **arguments: Any) -> Script:
        """Add a step; what it returns is kept under its label."""
        self.steps.append((name, label, arguments))
        return self


class ForkedRank(ForkServerProcess):
    """A rank's process, forked from one that has imported vLLM and nothing else: a spawned one would import it anew.

    It has the environment that its engine had as it started, as a spawned one would.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.environment = dict(os.environ)

    def run(self) -> None:
        os.environ.update(self.environment)
        super().run()


def fork_ranks() -> None:
    """Have vLLM fork ranks; what they are forked from begins before vLLM binds a rank, and it with it, to a core."""
    context = ForkServerContext()
    context.Process = ForkedRank
    context.set_forkserver_preload(["support.rank_engine", "vllm.v1.worker.cpu_worker"])
    ensure_running()
    from vllm.v1.executor import multiproc_executor  # takes seconds, in which that one imports the same

    multiproc_executor.get_mp_context = lambda: context


def main() -> None:
    """Carry out one script after the other."""
    from support import rank_engine  # so that what is pickled by name is found in the workers

    for line in sys.stdin:
        rank_engine.carry_out(Path(line.removesuffix("\n")))


def carry_out(folder: Path) -> None:
    """Start an engine, do what the script in a folder says, end the engine, and only then write what came of it."""
    script = pickle.loads((folder / "script").read_bytes())
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[n % len(cores)]) for n in range(script.ranks.total))
    on_ray = script.executor == "ray"
    if script.ranks.total > 1 and not on_ray:
        fork_ranks()
    with ray_cluster(script.ranks.total) if on_ray else nullcontext():
        session = Session(script, folder)
        try:
            answers = {label: getattr(session, name)(**arguments) for name, label, arguments in script.steps}
        finally:
            if not script.kills:
                session.close()  # before Ray ends, which takes the process with it where the engine still asks
    written = folder / "answers.part"
    written.write_bytes(pickle.dumps(answers))
    written.rename(folder / "answers")


class Session:
    """An engine, stepped in this process; its workers are others."""

    def __init__(self, script: Script, folder: Path) -> None:
        from cacheflow.vllm.plugin import register
        from vllm import LLM

        register()
        from support.connector_engine import kv_transfer_config

        transfer = None
        if script.options is not None:
            options = {"chunk_tokens": script.chunk_tokens, "store": "file", **script.options}
            transfer = kv_transfer_config(folder.parent / "profiles", options, script.connector)
        self.script = script
        self.llm = LLM(
            model=script.model, dtype=script.dtype, skip_tokenizer_init=True, enforce_eager=script.eager, seed=0,
            tensor_parallel_size=script.ranks.tensor, pipeline_parallel_size=script.ranks.pipeline,
            distributed_executor_backend="uni" if script.ranks.total == 1 else script.executor, max_num_seqs=8,
            enable_prefix_caching=True,
            max_model_len=script.max_tokens,
            num_gpu_blocks_override=script.num_kv_blocks or script.max_tokens // BLOCK + 2,
            max_num_batched_tokens=script.chunk_tokens, kv_transfer_config=transfer,
            **attention_of(script.model),
        )  # fmt: skip
        assert set(self.on_ranks(runner_generation)) == {"v2" if v2_runner.WANTED else "v1"}

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    def close(self) -> None:
        """End the engine; nothing of it is left for the next one of this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        with uncollected() as collect:
            self.core.shutdown()
            cleanup_dist_env_and_memory()
            del self.llm
            collect()

    def on_ranks(self, function: Any, *args: Any) -> list[Any]:
        """Run a function of this module on every rank's worker."""
        return self.core.model_executor.collective_rpc(function, args=args)

    def ask(self, requests: list[dict], *, kv: bool = True) -> list[dict]:
        """Requests that arrive together, to their end.

        Args:
            requests: For each ``tokens``, and where wanted ``num_tokens`` and ``params``.
            kv: Return the prompt's whole KV blocks too, of all layers and heads.

        Returns:
            For each request its ``tokens``, ``ttft_s``, ``params`` and ``kv``, ``[layer, tp rank, block, byte]``.
        """
        from cacheflow.vllm.models.kv_groups import KvGroups
        from vllm import SamplingParams

        engine, scheduler = self.llm.llm_engine, self.core.scheduler
        block_size = scheduler.block_size
        answers: dict[str, dict] = {}
        internal: dict[str, str] = {}
        began_s = time.perf_counter()
        for index, request in enumerate(requests):
            params = request.get("params")
            sampling = SamplingParams(
                max_tokens=request.get("num_tokens", 16), temperature=0.0, ignore_eos=True, detokenize=False,
                extra_args={"kv_transfer_params": params} if params else None,
            )  # fmt: skip
            name, before = f"{began_s}-{index}", set(scheduler.requests)
            engine.add_request(name, {"prompt_token_ids": request["tokens"]}, sampling)
            (internal[name],) = set(scheduler.requests) - before
            answers[name] = {"num_prompt": len(request["tokens"])}
        while not all("tokens" in answer for answer in answers.values()):
            for output in engine.step():
                answer = answers[output.request_id]
                if "ttft_s" not in answer:
                    answer["ttft_s"] = time.perf_counter() - began_s
                    if kv and not output.finished:
                        by_group = scheduler.kv_cache_manager.get_block_ids(internal[output.request_id])
                        ids = KvGroups.of(scheduler.kv_cache_config).kv_blocks(by_group)
                        answer["kv"] = self.kv(ids[: answer["num_prompt"] // block_size])
                if output.finished:
                    answer["tokens"], answer["params"] = list(output.outputs[0].token_ids), output.kv_transfer_params
        return list(answers.values())

    def ask_patiently(self, requests: list[dict]) -> list[dict]:
        """``ask``, and no read is late before the restoration is."""
        with no_late_reads():
            return self.ask(requests)

    def kv(self, block_ids: list[int]) -> np.ndarray:
        parts = self.on_ranks(gather, block_ids)
        layers: dict[int, dict[int, np.ndarray]] = {}
        for first, tp_rank, kv in parts:
            for offset, layer_kv in enumerate(kv):
                layers.setdefault(first + offset, {})[tp_rank] = layer_kv
        return np.stack([np.stack([layers[layer][rank] for rank in sorted(layers[layer])]) for layer in sorted(layers)])

    def evict(self) -> None:
        """Forget every prefix and fill the KV cache with wrong numbers."""
        while self.core.scheduler.requests or self.core.batch_queue:
            self.llm.llm_engine.step()
        assert self.core.scheduler.reset_prefix_cache()
        self.on_ranks(poison)

    def killed(self, rank: int, request: dict) -> str:
        """Kill a rank while a request is under way; the error that says so, empty when none came."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=2000, temperature=0.0, ignore_eos=True, detokenize=False,
            extra_args={"kv_transfer_params": request.get("params") or {}},
        )  # fmt: skip
        pids = self.on_ranks(process_id)
        self.llm.llm_engine.add_request("doomed", {"prompt_token_ids": request["tokens"]}, sampling)
        self.llm.llm_engine.step()
        os.kill(pids[rank], signal.SIGKILL)
        end_s = time.monotonic() + KILL_PATIENCE_S
        try:
            while time.monotonic() < end_s:
                self.llm.llm_engine.step()
        except Exception as error:  # noqa: BLE001 -- whatever vLLM says is the answer
            return f"{type(error).__name__}: {error}"
        return ""

    def soak(self, requests: list[dict], *, num_restorations: int, seed: int = 0) -> list[dict]:
        """Restore again and again, up to three requests at a time, some of them aborted in the middle.

        Returns:
            For each request that ended which of ``requests`` it was, its tokens and its explain records.
        """
        import random

        chances = random.Random(seed)
        ended: list[dict] = []
        restored = 0
        while restored < num_restorations:
            self.evict()
            chosen = [chances.randrange(len(requests)) for _ in range(chances.randint(1, 3))]
            aborted = chances.random() < 0.2
            if aborted:
                self._ask_and_abort(requests[chosen[0]], num_steps=chances.randint(1, 6))
                continue
            for index, answer in zip(chosen, self.ask([requests[each] for each in chosen], kv=False), strict=True):
                records = answer["params"]["cacheflow"]
                restored += sum(record["outcome"] == "done" for record in records)
                ended.append({"index": index, "tokens": answer["tokens"], "records": records})
        return ended

    def _ask_and_abort(self, request: dict, *, num_steps: int) -> None:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        extra = {"kv_transfer_params": request["params"]}
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=extra)
        engine.add_request("aborted", {"prompt_token_ids": request["tokens"]}, sampling)
        for _ in range(num_steps):
            engine.step()
        engine.abort_request(["aborted"])

    def free_blocks(self) -> int:
        return self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def settle(self) -> list[dict]:
        """Wait until every rank has written what it saves; each rank's counts."""
        return self.on_ranks(settled)

    def kept(self, num_chunks: int, store: str) -> dict[str, int]:
        """Wait until it is known of so many chunks whether they are kept; by outcome, and files dated ahead."""
        self.llm.llm_engine.step()  # in which workers hear what has ended
        first, *others = self.on_ranks(kept, num_chunks)
        assert not any(others), "what all ranks do is counted once"
        later_s = time.time() + 60.0
        return first | {"files": sum(path.stat().st_mtime > later_s for path in objects(Path(store), "kv"))}

    def hold_to_chunks(self) -> None:
        """See ``connector_engine.hold_to_chunks``."""
        from support.connector_engine import hold_to_chunks

        hold_to_chunks(self.core.scheduler, self.script.chunk_tokens)

    def stored(self, kind: str, store: str) -> dict[str, int]:
        """Bytes of the stored objects of a kind, by name."""
        return {path.name: path.stat().st_size for path in objects(Path(store), kind)}

    def forget(self, kind: str, store: str) -> int:
        """Remove the stored objects of a kind; how many there were."""
        found = objects(Path(store), kind)
        for path in found:
            path.unlink()
        return len(found)

    def call(self, function: Any, args: tuple = ()) -> list[Any]:
        """Run a function on every rank."""
        return self.on_ranks(function, *args)

    def scheduler_side(self, function: Any, args: tuple = ()) -> Any:
        """Run a function on the connector's scheduler side."""
        return function(self.core.scheduler.connector.scheduler_side, *args)


def runner_of(worker: Any) -> Any:
    return worker.worker.model_runner if hasattr(worker, "worker") else worker.model_runner


def runner_generation(worker: Any) -> str:
    from cacheflow.vllm.compat import runner_kind

    return runner_kind(runner_of(worker)).value


def layout_of(worker: Any) -> Any:
    from cacheflow.vllm.models.kv_groups import KvGroups
    from cacheflow.vllm.models.model_access import layer_number
    from cacheflow.vllm.worker.layout import BlockLayout

    runner = runner_of(worker)
    context = runner.vllm_config.compilation_config.static_forward_context
    names = sorted(KvGroups.of(runner.kv_cache_config).attention_names, key=layer_number)
    caches = {name: context[name].kv_cache for name in names}
    return BlockLayout.from_kv_caches(caches, runner.kv_cache_config, layer_names=names)


def gather(worker: Any, block_ids: list[int]) -> tuple[int, int, np.ndarray]:
    """First layer, tensor-parallel rank and KV bytes of this rank."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    from cacheflow.vllm.models.model_access import layer_number

    layout = layout_of(worker)
    first = layer_number(layout.layer_names[0])[0]
    return first, get_tensor_model_parallel_rank(), kv_bytes.gather(layout, block_ids)


def poison(worker: Any) -> None:
    layout = layout_of(worker)
    kv_bytes.fill(layout, range(layout.num_blocks), POISON)


def process_id(_: Any) -> int:
    return os.getpid()


def our_side(worker: Any) -> Any:
    """This rank's worker side."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker_side


def settled(worker: Any) -> dict:
    side = our_side(worker)
    assert side.saver.wait(20.0)
    return {**side.counts.chunks_saved}


def kept(worker: Any, num_chunks: int) -> dict[str, int]:
    """What rank 0 has counted once it knows of so many chunks; nothing on others."""
    side, ends_s = our_side(worker), time.monotonic() + 60.0
    while side.facts.rank == 0 and side.counts.kept.total() < num_chunks:
        assert time.monotonic() < ends_s, side.counts.kept
        time.sleep(0.01)
        side.forget(set())
    return dict(side.counts.kept)


def written_bytes(worker: Any) -> int:
    """Payload bytes that this rank has written to the store."""
    return our_side(worker).store.stats().written_bytes


def break_reads(worker: Any, rank: tuple[int, int], fault: str, kind: str) -> None:
    """From now on reads of objects of a kind fail on one rank ``(pipeline, tensor)``; ``fault`` empty: heal."""
    from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore

    side = our_side(worker)
    shard = side.facts.shard
    if isinstance(side.store, FaultyStore):
        side.store = side.store.inner
    if fault and (shard.pp_rank, shard.tp_rank) == rank:
        rule = FaultRule(fault=Fault(fault), matches=lambda key: key.kind.value == kind)
        plan = FaultPlan(rules=(rule,), seed=1)
        side.store = FaultyStore(side.store, plan)


def drained(worker: Any) -> None:
    """Wait until all that this rank has written is in every tier of its store."""
    assert our_side(worker).store.drain(20.0)


def leave_fast_tier(worker: Any) -> int:
    """Everything leaves the fastest tier, as if others had thrown it out; how many objects this rank removed."""
    from cacheflow.stores.keys import key_of

    fast = our_side(worker).store.tiers[0].store
    fast.learn()
    return fast.delete([key_of(name) for name in fast._index.sizes()])  # noqa: SLF001 -- there is no list of objects


def prefetched(worker: Any, num_objects: dict[int, int]) -> int:
    """Wait until a rank has brought so many objects, by its number; how many it has."""
    from cacheflow.stores.base import PrefetchOutcome

    side, ends_s = our_side(worker), time.monotonic() + 30.0
    while (found := side.store.stats().prefetches)[PrefetchOutcome.FETCHED] < num_objects[side.facts.rank]:
        assert time.monotonic() < ends_s, found
        time.sleep(0.01)
    return found[PrefetchOutcome.FETCHED]


def read_by_tier(worker: Any) -> list[int]:
    """Reads that each tier has served this rank."""
    from cacheflow.types import LoadOutcome

    return [tier.store.get_outcomes[LoadOutcome.OK] for tier in our_side(worker).store.stats().tiers]


def set_bandwidth(worker: Any, bytes_per_s: float) -> None:
    """Throttle each rank's link anew."""
    our_side(worker).store.set_bandwidth(bytes_per_s)


def take_only(side: Any, way: str) -> None:
    """Let stages above the first start from stored boundary states only, or only from what is handed over."""
    for planner in side.decider.stages[1:]:
        planner.sources = lambda *, num_boundaries, below: [BoundarySource(way)]


def objects(store: Path, kind: str) -> list[Path]:
    """The stored objects of a kind."""
    return [path for path in (store / "objects").rglob("*") if path.is_file() and f"_{kind}_" in path.name]


if __name__ == "__main__":
    main()
