"""What the device can do at best, and what layers, attention kernels and decoded tokens cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from cacheflow.bench.gpu.study import GpuStudy, Values
from cacheflow.engine.attention import chunk_attention
from cacheflow.engine.cuda_attention import AttentionKernel, flash3, require_flash3
from cacheflow.engine.runner import LayerRunner
from cacheflow.errors import ConfigError
from cacheflow.profiling import ceilings
from cacheflow.profiling.measure import CostMeter
from cacheflow.profiling.survey import ChunkPoint

DECODED = 8
TIMED_ROWS = 4
"""Layers timed of a model: they are alike."""


def measure_ceilings(study: GpuStudy) -> bool:
    """Part 0: one large copy each way, one large product, what pinning costs."""
    streams, device = study.streams, study.device
    num_bytes = ceilings.COPY_BYTES if study.on_gpu else 1 << 20
    if study.on_gpu:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        study.put(0, "memory", {"free_bytes": free_bytes, "total_bytes": total_bytes, "cuda": torch.version.cuda})
    began_s = time.perf_counter()
    streams.pinned(num_bytes)
    pinned_s = (time.perf_counter() - began_s) * (1 << 30) / num_bytes
    study.put(
        0,
        "ceilings",
        {
            "product_flops_per_s": ceilings.product_flops_per_s(streams, device, size=8192 if study.on_gpu else 128),
            "memory_bytes_per_s": ceilings.memory_bytes_per_s(streams, device, num_bytes=num_bytes),
            "upload_bytes_per_s": ceilings.upload_bytes_per_s(streams, device, num_bytes=num_bytes),
            "download_bytes_per_s": ceilings.download_bytes_per_s(streams, device, num_bytes=num_bytes),
            "pinning_s_per_gib": pinned_s,
        },
    )
    study.collect()
    return True


def measure_layers(study: GpuStudy) -> bool:
    """Part 2: seconds of a layer by chunk and offset, of attention by kernel, of decoded tokens."""
    runner, flags = study.runner(), study.flags
    chunks = [max(1, flags.chunk_tokens // 2), flags.chunk_tokens, 2 * flags.chunk_tokens]
    offsets = [0, flags.tokens // 2, flags.tokens]
    rows = [(layer, layer + 1) for layer in range(min(TIMED_ROWS, runner.num_layers))]
    capacity = min(offsets[-1] + chunks[-1], runner.model.max_tokens)
    meter = CostMeter(runner, max_tokens=capacity, rows=rows)
    for chunk in chunks:
        for offset in (each for each in offsets if each + chunk <= capacity):
            meter.launch_over_wall.clear()
            meter.events_over_wall.clear()
            costs = [meter.time_point(ChunkPoint(chunk, offset)) for _ in range(3)]
            study.put(
                2,
                f"layer, {chunk} tokens at {offset}",
                {
                    "full_s": statistics.median(cost.full_s for cost in costs),
                    "kv_only_s": statistics.median(cost.kv_only_s for cost in costs),
                    "launch_over_wall": statistics.median(meter.launch_over_wall),
                    "events_over_wall": statistics.median(meter.events_over_wall),
                },
            )
    for name, values in _attention_kernels(study, runner, chunks, offsets):
        study.put(2, name, values)
    kv = runner.new_kv(capacity)
    kv.kv_L2THD.normal_()
    seconds = []
    for step in range(DECODED):
        began_s = time.perf_counter()
        runner.decode_step(1, capacity - DECODED + step, kv)
        seconds.append(time.perf_counter() - began_s)
    study.put(2, f"decoding at {capacity}", {"first_s": seconds[0], "median_s": statistics.median(seconds)})
    del meter, kv, runner
    study.collect()
    return True


def _attention_kernels(
    study: GpuStudy, runner: LayerRunner, chunks: Sequence[int], offsets: Sequence[int]
) -> Iterator[tuple[str, Values]]:
    shape, dtype = runner.model.shape, runner.model.dtype
    scale = shape.head_dim**-0.5
    kernels: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]] = {
        runner.model.attention.value: lambda q, k, v: chunk_attention(torch.nn.Identity(), q, k, v, None),
    }
    if study.on_gpu:
        # For its time alone: a chunk with tokens before it is not masked, which is a little more work.
        kernels["torch's choice"] = lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] == k.shape[2], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        try:
            require_flash3("cuda", dtype, shape.head_dim)
            kernels[AttentionKernel.FLASH3.value] = lambda q, k, v: flash3(q, k, v, scale, None)
        except ConfigError as error:
            yield "flash3", {"left_out": str(error)}
    for chunk, offset in [(chunk, offset) for chunk in (1, *chunks) for offset in (offsets[0], offsets[-1])]:
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
        lengths = (chunk, offset + chunk, offset + chunk)
        query, key, value = (
            torch.randn(1, length, each, shape.head_dim, device=study.device, dtype=dtype).transpose(1, 2)
            for each, length in zip(heads, lengths, strict=True)
        )
        for name, attend in kernels.items():
            began_s = time.perf_counter()
            attend(query, key, value)
            study.streams.current().record().wait()
            first_s = time.perf_counter() - began_s
            warm_s = ceilings.device_seconds(study.streams, lambda: attend(query, key, value))  # noqa: B023 -- called now
            yield f"attention {name}, {chunk} tokens at {offset}", {"first_s": first_s, "warm_s": warm_s}
