"""Small clusters and workloads for simulator tests."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

from cacheflow.model_shape import ModelShape
from cacheflow.shapes.roofline import GpuPeaks, Roofline
from cacheflow.sim.cluster import Cluster, ClusterConfig
from cacheflow.sim.costs import ChunkCosts, ModelCosts, roofline_costs
from cacheflow.sim.policies import make_system
from cacheflow.sim.replica import Served
from cacheflow.workloads.request import TraceRequest, num_blocks

TOKENS = 64
"""Tokens of a block."""
SHAPE = ModelShape(
    name="tiny-8", num_layers=8, hidden_size=1024, num_q_heads=8, num_kv_heads=4, head_dim=128, intermediate_size=4096,
    vocab_size=32_000,
)  # fmt: skip
GPU = GpuPeaks(name="slow", memory_bytes=10**10, memory_bytes_per_s=2e11, dense_flops_per_s=4e12, pcie_bytes_per_s=1e10)
CONFIG = ClusterConfig(
    num_replicas=1, kv_tokens=200 * TOKENS, nic_bytes_per_s=1e8, nic_latency_s=1e-3, store_tokens=10**6,
    host_bytes_per_s=1e9, block_tokens=TOKENS, recompute_budget_s=0.02, slo_ttft_s=0.5,
)  # fmt: skip


def tiny_costs() -> ChunkCosts:
    return roofline_costs(Roofline(shape=SHAPE, gpu=GPU), chunk_tokens=TOKENS)


def ask(request_id: int, blocks: Iterable[int], **changes) -> TraceRequest:
    """A request whose prompt has these blocks, the last one partial by a token."""
    block_ids = tuple(blocks)
    values = {
        "arrival_s": 0.0,
        "input_tokens": len(block_ids) * TOKENS - 1,
        "output_tokens": 1,
        "block_ids": block_ids,
        "block_tokens": TOKENS,
    }
    return TraceRequest(request_id=request_id, **(values | changes))


def mixed_requests(count: int, *, seed: int = 0, rate_per_s: float = 20.0) -> list[TraceRequest]:
    """Sessions whose prompts grow turn by turn, half of them closed-loop."""
    rng, fresh = random.Random(seed), itertools.count()
    sessions: list[tuple[tuple[int, ...], int | None, str]] = []
    found, now_s = [], 0.0
    for request_id in range(count):
        now_s += rng.expovariate(rate_per_s)
        index = rng.randrange(len(sessions) + 2)
        prefix, after, name = sessions[index] if index < len(sessions) else ((), None, f"s{len(sessions)}")
        block_ids = prefix + tuple(next(fresh) for _ in range(rng.randint(1, 12)))
        if len(block_ids) > 60:
            prefix, block_ids, after = (), (next(fresh),), None
        closed = request_id % 2 == 0
        found.append(
            ask(
                request_id,
                block_ids,
                arrival_s=now_s,
                output_tokens=rng.randint(1, 40),
                session_id=name if closed else "",
                after=after if closed else None,
                delay_s=rng.random() * 0.1 if closed and after is not None else 0.0,
            )
        )
        known = (block_ids[:-1], request_id if closed else None, name)
        if index < len(sessions):
            sessions[index] = known
        else:
            sessions.append(known)
    return found


def serve(
    requests: Iterable[TraceRequest],
    *,
    policy: str = "cacheflow",
    config: ClusterConfig = CONFIG,
    costs: ModelCosts | None = None,
    **changes,
) -> tuple[Cluster, dict[int, Served]]:
    """Run a cluster to the end; what was served, by request."""
    cluster = Cluster(replace(config, **changes), costs or tiny_costs(), make_system(policy))
    served: dict[int, Served] = {}
    cluster.run(requests, lambda each: served.__setitem__(each.request.request_id, each))
    return cluster, served


def blocks_of(request: TraceRequest) -> int:
    return num_blocks(request.input_tokens + request.output_tokens, TOKENS)
