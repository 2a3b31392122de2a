"""What the I/O loop moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cacheflow.bench.gpu.study import READS, GpuStudy
from cacheflow.bench.restore.study import Study
from cacheflow.policies.registry import make_policy
from cacheflow.restore.options import ExecutorOptions


def measure_loop(study: GpuStudy) -> bool:
    """Part 3: what the I/O loop moves by size of cell and reads in flight, alone and beside a thread that launches."""
    ground = study.main()
    for layers_per_block in (1, 2, 4, 8):
        if layers_per_block > ground.model.shape.num_layers:
            break
        for reads in (3, READS):
            ground.regrain(layers_per_block, executor=ExecutorOptions(max_reads_in_flight=reads))
            alone = _loaded_bytes_per_s(ground)
            with _launching(study):
                beside = _loaded_bytes_per_s(ground)
            study.put(
                3,
                f"{ground.options.chunk_tokens} tokens x {layers_per_block} layers, {reads} reads",
                {"alone_bytes_per_s": alone, "beside_bytes_per_s": beside},
            )
    ground.regrain(2, executor=ExecutorOptions(max_reads_in_flight=READS))
    return True


def _loaded_bytes_per_s(ground: Study) -> float:
    run = ground.run(make_policy("load"), with_suffix=False, bytes_per_s=float("inf"))
    return run.restored.report.loaded_bytes / run.restored.report.restore_s


@contextmanager
def _launching(study: GpuStudy) -> Iterator[None]:
    """Another thread launches small kernels meanwhile, as recomputing does."""
    stop, small = threading.Event(), torch.zeros(64, device=study.device)

    def launch() -> None:
        while not stop.is_set():
            for _ in range(64):
                small.add_(1.0)
            study.streams.current().record().wait()

    thread = threading.Thread(target=launch, name="cacheflow-launching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
