"""A replica: one engine with a GPU, its memory, a link to the shared store and, where it has one, a host tier.

A request waits until its prompt and its answer fit into GPU memory (first come, first served; nothing is preempted),
then its prefix is restored and its new tokens run as the batch scheduler decides, then it decodes. What is in GPU
memory costs nothing, what a tier holds is restored, from the host before the store, the rest is prefilled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from cacheflow.plan.grid import Grid, regular_ends
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.costs import ModelCosts
from cacheflow.sim.device import RequestTimes, VirtualDevice
from cacheflow.sim.gpu import Gpu
from cacheflow.sim.granularity import coarse_cut, coarsen
from cacheflow.sim.kv_cache import BlockLru, Changed, KvCache, Lease
from cacheflow.sim.link import SharedBandwidth, SimulatedLink
from cacheflow.sim.policies import SimPolicy
from cacheflow.sim.ranks import RankCosts
from cacheflow.state.batch import BatchScheduler
from cacheflow.workloads.request import TraceRequest, num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What one replica is made of.

    Attributes:
        kv_blocks: Blocks of GPU memory for keys and values.
        block_tokens: Tokens of a block, and of a chunk.
        pass_tokens: Most tokens of one pass of prefill.
        store_link: Its network card.
        host_link: Its way to host memory.
        host_blocks: Blocks of the host tier; 0 for none.
        max_num_seqs: Requests it runs at once.
        recompute_budget_s: Seconds of restoring and prefilling after which decoding requests get a token.
        slo_ttft_s: Deadline of a first token, from its arrival.
        num_ranks: GPUs that share the model, each with links and memory like these.
    """

    kv_blocks: int
    block_tokens: int
    pass_tokens: int
    store_link: LinkCost
    host_link: LinkCost
    host_blocks: int
    max_num_seqs: int
    recompute_budget_s: float
    slo_ttft_s: float
    num_ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A request that has its last token.

    Attributes:
        request: What was asked.
        first_token_at_s: When its first token was there.
        last_token_at_s: When its last one was.
        hit_tokens: Prompt tokens that were in GPU memory.
        restored_tokens: Those that a tier held, restored by either side.
        loaded_bytes: Bytes of them that were loaded and used.
        wasted_bytes: Bytes that were loaded and not used.
    """

    request: TraceRequest
    arrival_s: float
    first_token_at_s: float
    last_token_at_s: float
    hit_tokens: int
    restored_tokens: int
    loaded_bytes: int
    wasted_bytes: int


@dataclass(slots=True)
class _Running:
    request: TraceRequest
    arrival_s: float
    lease: Lease
    hit_tokens: int
    restored_tokens: int
    host_chunks: int = 0
    elsewhere_s: float = 0.0
    first_token_at_s: float = 0.0
    completion: RequestTimes | None = None


class Replica:
    """One engine: takes requests and reports when they are served.

    Attributes:
        gpu: Its compute resource.
        store_link: Its link to the shared store.
        host_link: Its link to host memory.
        cache: Its GPU memory.
    """

    def __init__(
        self,
        loop: EventLoop,
        spec: ReplicaSpec,
        costs: ModelCosts | RankCosts,
        policy: SimPolicy,
        *,
        store: BlockLru,
        shared: SharedBandwidth | None = None,
    ) -> None:
        """Start empty.

        Args:
            loop: The virtual clock.
            spec: What it is made of.
            costs: What its GPU takes.
            policy: How it restores.
            store: The shared store's blocks.
            shared: The shared store's own bandwidth; None when it does not matter.
        """
        self._loop, self._spec, self._costs, self._policy, self._store = loop, spec, costs, policy, store
        self._host = BlockLru(spec.host_blocks)
        self._pass_tokens = costs.longest_pass(spec.pass_tokens)
        self.changed: Changed = lambda block_id, held: None
        """Told of prefix blocks that come to GPU memory or leave it."""
        self.first_token: Callable[[TraceRequest], None] = lambda request: None
        self.served: Callable[[Served], None] = lambda served: None
        self.cache = KvCache(spec.kv_blocks, changed=lambda block_id, held: self.changed(block_id, held))
        self.store_link = SimulatedLink(loop, spec.store_link, shared=shared)
        self.host_link = SimulatedLink(loop, spec.host_link)
        self.gpu = Gpu(loop, costs.decode_step_s, budget_s=spec.recompute_budget_s, ended=self._end)
        scheduler = BatchScheduler(policy.batch, LiveRates(bytes_per_s=spec.store_link.bytes_per_s))
        self._device = VirtualDevice(
            loop, scheduler, self.store_link, reads_in_flight=1, compute=self.gpu, link_of=self._link_of
        )
        self.gpu.wake = self._device.pump
        self._queue: deque[tuple[TraceRequest, float]] = deque()
        self._running: dict[int, _Running] = {}

    @property
    def num_unserved(self) -> int:
        """Requests that wait, run or decode."""
        return len(self._queue) + len(self._running)

    def submit(self, request: TraceRequest) -> None:
        """Take a request that arrives now."""
        self._queue.append((request, self._loop.now_s))
        self._admit()

    def _admit(self) -> None:
        while self._queue and len(self._running) < self._spec.max_num_seqs:
            request, arrival_s = self._queue[0]
            needed = num_blocks(request.input_tokens + request.output_tokens, self._spec.block_tokens)
            lease = self.cache.lease(request.block_ids, needed, limit=self._reusable(request))
            if lease is None:
                return
            self._queue.popleft()
            self._start(request, arrival_s, lease)

    def _reusable(self, request: TraceRequest) -> int:
        """Full blocks of a prompt that may be reused; its last token is always computed, because it gives the first."""
        return (request.input_tokens - 1) // self._spec.block_tokens

    def _start(self, request: TraceRequest, arrival_s: float, lease: Lease) -> None:
        tokens, limit = self._spec.block_tokens, self._reusable(request)
        hit = len(lease.shared)
        on_host = max(hit, self._host.run(request.block_ids, limit))
        known = max(on_host, self._store.run(request.block_ids, limit))
        running = _Running(request, arrival_s, lease, hit * tokens, restored_tokens=(known - hit) * tokens)
        self._running[request.request_id] = running
        cut = on_host - hit
        link = self._mixed_link(cut, known - on_host)
        prefill = self._problem(request, hit, hit, link)
        exact = prefill
        if known > hit and not self._policy.prefills:
            exact = replace(self._problem(request, hit, known, link), prefill_s=prefill.suffix_s)
            problem = coarsen(exact, self._policy.grain_of(exact), cut=cut)
            running.host_chunks = problem.grid.num_chunks if on_host == known else coarse_cut(problem, exact, cut)
            if self._policy.leaves_to_prefill(problem):
                exact = prefill
        if exact is prefill:
            running.restored_tokens = 0
            problem = coarsen(prefill, self._policy.grain_of(prefill))
        if isinstance(self._costs, RankCosts):
            running.elsewhere_s = self._costs.elsewhere_s(exact)
        self._device.submit(
            request.request_id,
            problem,
            self._end_prefill,
            first_token_due_s=arrival_s + self._spec.slo_ttft_s,
            arrival_s=arrival_s,
        )

    def _problem(self, request: TraceRequest, hit: int, known: int, link: LinkCost) -> RestoreProblem:
        """What it costs to restore the blocks from ``hit`` to ``known`` and to prefill the rest of a prompt."""
        tokens = self._spec.block_tokens
        grid = Grid(
            chunk_ends=regular_ends(hit * tokens, known * tokens, tokens),
            num_blocks=self._costs.shape.num_rows,
            suffix_ends=regular_ends(known * tokens, request.input_tokens, self._pass_tokens),
            start=hit * tokens,
        )
        return self._costs.problem(grid, link=link)

    def _link_of(self, request_id: int, chunk: int) -> SimulatedLink:
        return self.host_link if chunk < self._running[request_id].host_chunks else self.store_link

    def _mixed_link(self, host_chunks: int, store_chunks: int) -> LinkCost:
        """One link that takes as long as both after each other; the scheduler knows but one."""
        store, host = self._spec.store_link, self._spec.host_link
        if not host_chunks:
            return store
        seconds = host_chunks / host.bytes_per_s + store_chunks / store.bytes_per_s
        latency_s = max(host.latency_s, store.latency_s if store_chunks else 0.0)
        return LinkCost(bytes_per_s=(host_chunks + store_chunks) / seconds, latency_s=latency_s)

    def _end_prefill(self, completion: RequestTimes) -> None:
        running = self._running[completion.request_id]
        running.completion = completion
        if running.elsewhere_s > 0:
            at_s = self._loop.now_s + running.elsewhere_s
            self._loop.at(at_s, lambda: self._end_elsewhere(running, completion), priority=1)
        else:
            self._begin_decode(running, completion)

    def _end_elsewhere(self, running: _Running, completion: RequestTimes) -> None:
        self._begin_decode(running, completion)
        self._device.pump()  # nobody else may be there to let the GPU decode

    def _begin_decode(self, running: _Running, completion: RequestTimes) -> None:
        request = running.request
        running.first_token_at_s = completion.first_token_at_s + running.elsewhere_s
        full = request.block_ids[: request.input_tokens // self._spec.block_tokens]
        self.cache.publish(running.lease, full)
        # Writing is not modelled: the blocks are there at once, and cost no bandwidth.
        self._host.put(full)
        self._store.put(full)
        self.first_token(request)
        if request.output_tokens == 1:
            self._end(request.request_id)
        else:
            self.gpu.decode(
                request.request_id, context_tokens=request.input_tokens + 1, num_tokens=request.output_tokens - 1
            )

    def _end(self, request_id: int) -> None:
        running = self._running.pop(request_id)
        self.cache.release(running.lease)
        completion = running.completion
        assert completion is not None, "a request decodes after its first token"
        self.served(
            Served(
                request=running.request,
                arrival_s=running.arrival_s,
                first_token_at_s=running.first_token_at_s,
                last_token_at_s=self._loop.now_s,
                hit_tokens=running.hit_tokens,
                restored_tokens=running.restored_tokens,
                loaded_bytes=completion.loaded_bytes * self._spec.num_ranks,
                wasted_bytes=completion.wasted_bytes * self._spec.num_ranks,
            )
        )
        self._admit()
