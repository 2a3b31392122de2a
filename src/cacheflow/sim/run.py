"""One policy over one workload on one cluster."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cacheflow.errors import TraceError
from cacheflow.sim.cluster import Cluster, ClusterConfig
from cacheflow.sim.costs import ModelCosts
from cacheflow.sim.policies import SimPolicy
from cacheflow.sim.replica import Served
from cacheflow.sim.results import RunResult, Tally
from cacheflow.workloads.request import TraceRequest

Progress = Callable[[int], None]
"""Told how many requests are served, now and then."""
PROGRESS_EVERY = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of a simulation.

    Attributes:
        policy: Name of the system.
        result: What it adds up to.
        ttfts_s: Time to first token of every request, in the order in which they were served.
    """

    policy: str
    result: RunResult
    ttfts_s: array[float]


def simulate(
    requests: Iterable[TraceRequest],
    *,
    config: ClusterConfig,
    costs: ModelCosts,
    policy: SimPolicy,
    progress: Progress | None = None,
) -> Run:
    """Serve a workload; the same arguments give the same result, bit for bit.

    Args:
        requests: In the order of arrival; read once, as their time comes.
        config: The cluster.
        costs: What its GPUs take.
        policy: How it restores, and whom it serves first.
        progress: Told how far it is.

    Raises:
        TraceError: There is no request, or their order is wrong.
        ConfigError: A request fits no replica.
        CostRangeError: A cost outside of what was measured.
    """
    tally = Tally(
        slo_ttft_s=config.slo_ttft_s,
        kv_bytes_per_token=costs.shape.kv_bytes_per_token,
        checkpoint_bytes=costs.shape.checkpoint_bytes,
    )

    def count(served: Served) -> None:
        tally.add(served)
        if progress is not None and len(tally) % PROGRESS_EVERY == 0:
            progress(len(tally))

    cluster = Cluster(config, costs, policy)
    end_s = cluster.run(requests, count)
    if not len(tally):
        raise TraceError("the workload has no request; expected at least one")
    if progress is not None:
        progress(len(tally))
    return Run(policy=policy.name, result=tally.result(cluster.resources(), end_s=end_s), ttfts_s=tally.ttfts_s)
