"""vLLM's OffloadingConnector on a machine without a GPU, over a link of a given bandwidth.

vLLM 0.32 refuses its CPU offloading backend on the CPU platform because it copies with CUDA streams. This spec keeps
vLLM's scheduler side (keys, LRU, lookups) and replaces the copier: one thread per direction moves whole KV blocks
between the engine's cache and host memory. Loads are paced: they are cut into pieces, and a piece is not copied before
the link would have delivered it. Runs inside vLLM's processes; the only module of the bench that imports vLLM.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from cacheflow.bench.vllm.rivals.pacing import Pacer
from cacheflow.errors import ConfigError
from cacheflow.types import Bytes


@dataclass(frozen=True, slots=True)
class _Copy:
    """One block of one layer: ``dst[:] = src``."""

    src: Bytes
    dst: Bytes


class PacedHostOffloadingSpec(CPUOffloadingSpec):
    """``CPUOffloadingSpec`` with a host-to-host copier; option ``throttle_bytes_per_s`` slows loads down."""

    def __init__(self, config: OffloadingConfig) -> None:
        """Check that blocks map one to one.

        Raises:
            ConfigError: Offloaded chunks of several blocks were asked for.
        """
        super().__init__(config)
        self._copier: HostCopier | None = None
        if self.blocks_per_chunk != 1:
            raise ConfigError(f"offloading: blocks_per_chunk is {self.blocks_per_chunk}, this copier knows only 1")

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The copier between these caches and host memory; one for the life of the spec."""
        if self._copier is None:
            bytes_per_s = float(self.extra_config.get("throttle_bytes_per_s", "inf"))
            self._copier = HostCopier(kv_caches, num_chunks=self.num_chunks, bytes_per_s=bytes_per_s)
        return self._copier


class HostCopier(OffloadingWorker):
    """Copies blocks in the order of submission, loads at the speed of the link, stores at the memory's."""

    def __init__(self, kv_caches: CanonicalKVCaches, *, num_chunks: int, bytes_per_s: float) -> None:
        """Allocate host memory for ``num_chunks`` blocks of every layer and start two threads."""
        self._engine_TNP = [each.tensor.numpy().view(np.uint8) for each in kv_caches.tensors]
        self._host_TCP = [np.zeros((num_chunks, cache.shape[1]), np.uint8) for cache in self._engine_TNP]
        self._tensors_of_group = [[ref.tensor_idx for ref in refs] for refs in kv_caches.group_data_refs]
        self._results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._done: set[int] = set()
        self._changed = threading.Condition()
        self._loads = _Lane(self, "offloading-load", Pacer(bytes_per_s))
        self._stores = _Lane(self, "offloading-store", Pacer(float("inf")))

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Queue a copy of engine blocks to host memory."""
        assert isinstance(dst_spec, CPULoadStoreSpec)
        pairs = self._pairs(src_spec, dst_spec)
        copies = [_Copy(self._engine_TNP[t][block], self._host_TCP[t][chunk]) for t, block, chunk in pairs]
        self._stores.submit(job_id, copies)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Queue a copy of host memory to engine blocks."""
        assert isinstance(src_spec, CPULoadStoreSpec)
        pairs = self._pairs(dst_spec, src_spec)
        copies = [_Copy(self._host_TCP[t][chunk], self._engine_TNP[t][block]) for t, block, chunk in pairs]
        self._loads.submit(job_id, copies)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Transfers that ended since the last call."""
        finished = []
        while True:
            try:
                finished.append(self._results.get_nowait())
            except queue.Empty:
                return finished

    def wait(self, job_ids: set[int]) -> None:
        """Block until these transfers have ended."""
        with self._changed:
            self._changed.wait_for(lambda: job_ids <= self._done)

    def shutdown(self) -> None:
        """Finish what is queued and end the threads."""
        self._loads.close()
        self._stores.close()

    def finish(self, result: TransferResult) -> None:
        """Make a result known; called by the lanes."""
        self._results.put(result)
        with self._changed:
            self._done.add(result.job_id)
            self._changed.notify_all()

    def _pairs(self, engine: GPULoadStoreSpec, host: CPULoadStoreSpec) -> Iterator[tuple[int, int, int]]:
        """``(tensor, engine block, host chunk)``; blocks are listed group by group, in the same order on both sides."""
        position = 0
        for group, size in enumerate(engine.group_sizes):
            for at in range(position, position + size):
                for tensor in self._tensors_of_group[group]:
                    yield tensor, int(engine.block_ids[at]), int(host.chunk_ids[at])
            position += size


class _Lane:
    """One thread that copies jobs of one direction, one after the other."""

    def __init__(self, owner: HostCopier, name: str, pacer: Pacer) -> None:
        self._owner, self._pacer = owner, pacer
        self._jobs: queue.SimpleQueue[tuple[int, list[_Copy], float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job_id: int, copies: list[_Copy]) -> None:
        self._jobs.put((job_id, copies, time.perf_counter()))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job_id, copies, submitted_s = job
            for copy in copies:
                self._pacer.pass_bytes(copy.src.nbytes, there_since_s=submitted_s)
                np.copyto(copy.dst, copy.src)
            num_bytes = sum(copy.src.nbytes for copy in copies)
            result = TransferResult(job_id, True, num_bytes, time.perf_counter() - submitted_s)
            self._owner.finish(result)
