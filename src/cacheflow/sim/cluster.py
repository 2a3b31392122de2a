"""A cluster: a router, replicas, one shared store; and the requests that come to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from cacheflow.errors import ConfigError, TraceError
from cacheflow.plan.problem import LinkCost
from cacheflow.plan.stages import RankLayout
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.costs import ModelCosts
from cacheflow.sim.kv_cache import BlockLru
from cacheflow.sim.link import SharedBandwidth
from cacheflow.sim.policies import SimPolicy
from cacheflow.sim.ranks import RankCosts
from cacheflow.sim.replica import Replica, ReplicaSpec, Served
from cacheflow.sim.results import Resources
from cacheflow.sim.router import make_router
from cacheflow.workloads.request import TraceRequest, num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """A cluster of equal replicas.

    Attributes:
        num_replicas: Engines.
        kv_tokens: Tokens of keys and values that fit into a replica's memory.
        nic_bytes_per_s: Bandwidth of each replica's link to the shared store.
        nic_latency_s: Its latency.
        store_tokens: Tokens that fit into the shared store.
        store_bytes_per_s: The store's own bandwidth, which all links share; ``inf`` where it does not matter.
        host_tokens: Tokens that fit into each replica's host tier; 0 for none.
        host_bytes_per_s: Bandwidth from host memory to the GPU.
        host_latency_s: Its latency.
        block_tokens: Tokens of a prefix block, and of a chunk.
        pass_tokens: Most tokens of one pass of prefill (vLLM's ``max_num_batched_tokens``).
        max_num_seqs: Requests a replica runs at once.
        recompute_budget_s: Seconds of restoring and prefilling after which decoding requests get a token.
        router: Name of the router.
        slo_ttft_s: Limit of the time to first token that counts as good.
        pipeline_parallel_size: Pipeline stages of a replica.
        tensor_parallel_size: Tensor-parallel ranks of a stage.
        link_per_rank: Each GPU of a replica has a link to the store like the given one; otherwise they share it.
    """

    num_replicas: int = 8
    kv_tokens: int
    nic_bytes_per_s: float
    nic_latency_s: float = 5e-4
    store_tokens: int
    store_bytes_per_s: float = float("inf")
    host_tokens: int = 0
    host_bytes_per_s: float = 64e9
    host_latency_s: float = 2e-5
    block_tokens: int = 512
    pass_tokens: int = 2048
    max_num_seqs: int = 256
    recompute_budget_s: float = 0.05
    router: str = "affinity"
    slo_ttft_s: float = 2.0
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    link_per_rank: bool = True

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: One is out of range; names it.
        """
        for name, least in (
            ("num_replicas", 1), ("kv_tokens", 1), ("block_tokens", 1), ("pass_tokens", 1), ("max_num_seqs", 1),
            ("store_tokens", 0), ("host_tokens", 0), ("nic_latency_s", 0), ("host_latency_s", 0),
        ):  # fmt: skip
            if not least <= getattr(self, name) < float("inf"):
                raise ConfigError(f"cluster: {name} is {getattr(self, name)}, must be at least {least}, and finite")
        if self.nic_bytes_per_s == float("inf"):
            raise ConfigError("cluster: nic_bytes_per_s is inf, must be finite: a link has a bandwidth")
        for name in (
            "nic_bytes_per_s", "store_bytes_per_s", "host_bytes_per_s", "recompute_budget_s", "slo_ttft_s",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"cluster: {name} is {getattr(self, name)}, must be above 0")
        _ = self.layout  # refuses sizes below 1

    @property
    def layout(self) -> RankLayout:
        """How a replica's GPUs share the model."""
        return RankLayout(
            pipeline_parallel_size=self.pipeline_parallel_size,
            tensor_parallel_size=self.tensor_parallel_size,
            link_per_rank=self.link_per_rank,
        )

    @property
    def kv_blocks(self) -> int:
        """Blocks of a replica's memory."""
        return self.kv_tokens // self.block_tokens

    def check_fits(self, request: TraceRequest) -> None:
        """Refuse a request that no replica could ever run.

        Raises:
            ConfigError: Its prompt and answer take more blocks than a GPU has, or its blocks are of another size.
        """
        if request.block_tokens != self.block_tokens:
            raise ConfigError(
                f"request {request.request_id} has blocks of {request.block_tokens} tokens, "
                f"the cluster of {self.block_tokens}: read the trace with block_tokens={self.block_tokens}"
            )
        needed = num_blocks(request.input_tokens + request.output_tokens, self.block_tokens)
        if needed > self.kv_blocks:
            raise ConfigError(
                f"request {request.request_id} takes {request.input_tokens:,} + {request.output_tokens:,} tokens, "
                f"a replica holds {self.kv_blocks * self.block_tokens:,}: "
                "give GPUs with more memory (--gpu, kv_tokens) or leave such requests out (--max-tokens)"
            )

    def replica_spec(self) -> ReplicaSpec:
        """What each replica is made of."""
        sharing = 1 if self.link_per_rank else self.layout.num_ranks
        return ReplicaSpec(
            kv_blocks=self.kv_blocks,
            block_tokens=self.block_tokens,
            pass_tokens=self.pass_tokens,
            store_link=LinkCost(bytes_per_s=self.nic_bytes_per_s / sharing, latency_s=self.nic_latency_s),
            host_link=LinkCost(bytes_per_s=self.host_bytes_per_s, latency_s=self.host_latency_s),
            host_blocks=self.host_tokens // self.block_tokens,
            max_num_seqs=self.max_num_seqs,
            recompute_budget_s=self.recompute_budget_s,
            slo_ttft_s=self.slo_ttft_s,
            num_ranks=self.layout.num_ranks,
        )


class Cluster:
    """Replicas, a router and a store under one clock; serves each request once.

    A turn of a session that names the one before (``after``) comes ``delay_s`` after that one's last token, and not
    before its own time in the trace.
    """

    def __init__(self, config: ClusterConfig, costs: ModelCosts, policy: SimPolicy) -> None:
        """Start empty.

        Raises:
            UnknownPolicyError: The router is not known.
            ConfigError: A GPU holds no block, or the GPUs cannot share the model.
        """
        self.config, self.loop = config, EventLoop()
        self._router = make_router(config.router, config.num_replicas)
        store = BlockLru(config.store_tokens // config.block_tokens)
        # One rank is simulated for all of its replica: the others draw as much from the store.
        num_ranks, own_bytes_per_s = config.layout.num_ranks, config.store_bytes_per_s / config.layout.num_ranks
        shared = None if config.store_bytes_per_s == float("inf") else SharedBandwidth(own_bytes_per_s)
        rank_costs: ModelCosts | RankCosts = costs
        if num_ranks > 1:
            rank_costs = RankCosts(costs, config.layout, boundary_states=policy.boundary_states)
        spec = config.replica_spec()
        self.replicas = [
            Replica(self.loop, spec, rank_costs, policy, store=store, shared=shared) for _ in range(config.num_replicas)
        ]
        self._served: Callable[[Served], None] = lambda served: None
        for index, each in enumerate(self.replicas):
            each.changed = partial(self._router.changed, index)
            each.first_token = self._router.first_token
            each.served = self._end
        self._requests: Iterator[TraceRequest] = iter(())
        self._under_way: set[int] = set()
        # Of each session the turn that ended last, and when: one entry a session, however long the trace.
        self._last_turn: dict[str, tuple[int, float]] = {}
        self._followers: dict[int, list[TraceRequest]] = {}

    def run(self, requests: Iterable[TraceRequest], served: Callable[[Served], None]) -> float:
        """Serve all requests.

        Args:
            requests: In the order of arrival; read as their time comes.
            served: Called with each, when it has its last token.

        Returns:
            When the last token was there.

        Raises:
            ConfigError: A request that no replica can hold.
            TraceError: Time goes backwards, or a turn that follows another has no session.
            CostRangeError: A cost outside of what was measured.
        """
        self._served = served
        self._requests = iter(requests)
        self._schedule_next()
        self.loop.run()
        return self.loop.now_s

    def resources(self) -> Resources:
        """What GPUs and links have done so far; bytes of all ranks, busy times of the one that stands for them."""
        num_ranks = self.config.layout.num_ranks
        return Resources(
            num_replicas=len(self.replicas),
            given_busy_s=sum(each.gpu.given_busy_s for each in self.replicas),
            decode_busy_s=sum(each.gpu.decode_busy_s for each in self.replicas),
            store_busy_s=sum(each.store_link.busy_s for each in self.replicas),
            store_bytes=sum(each.store_link.moved_bytes for each in self.replicas) * num_ranks,
            host_bytes=sum(each.host_link.moved_bytes for each in self.replicas) * num_ranks,
        )

    def _schedule_next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            return
        if request.arrival_s < self.loop.now_s:
            raise TraceError(
                f"request {request.request_id} arrives at {request.arrival_s} s, the one before it at "
                f"{self.loop.now_s} s; expected the order of arrival"
            )
        if request.after is not None and not request.session_id:
            raise TraceError(f"request {request.request_id} comes after {request.after}, but has no session_id")
        self.config.check_fits(request)
        # Arrivals before whatever else happens at that time.
        self.loop.at(request.arrival_s, partial(self._arrive, request), priority=-1)

    def _arrive(self, request: TraceRequest) -> None:
        self._schedule_next()
        self._under_way.add(request.request_id)
        if request.after is None:
            self._submit(request)
        elif request.after in self._under_way:
            self._followers.setdefault(request.after, []).append(request)
        else:
            turn, ended_at_s = self._last_turn.get(request.session_id, (None, 0.0))
            # Where another turn has ended since, the pause is over.
            self._follow(request, ended_at_s if turn == request.after else 0.0)

    def _follow(self, request: TraceRequest, ended_at_s: float) -> None:
        self.loop.at(max(self.loop.now_s, ended_at_s + request.delay_s), partial(self._submit, request))

    def _submit(self, request: TraceRequest) -> None:
        self.replicas[self._router.choose(request)].submit(request)

    def _end(self, served: Served) -> None:
        request = served.request
        self._under_way.discard(request.request_id)
        if request.session_id:
            self._last_turn[request.session_id] = (request.request_id, self.loop.now_s)
        for follower in self._followers.pop(request.request_id, ()):
            self._follow(follower, self.loop.now_s)
        self._served(served)
