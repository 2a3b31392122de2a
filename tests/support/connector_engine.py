"""An in-process vLLM engine on the CPU with CacheFlow's connector, or without it to compare with."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cacheflow.vllm.options import ConnectorOptions, ServingOptions
from cacheflow.vllm.plugin import CONNECTORS
from support import kv_bytes
from support.garbage import uncollected
from support.v2_runner import NUM_TOKENS
from support.vllm_models import NUM_KV_BLOCKS, TINY, attention_of

POISON = 0x42
"""48.5 in bf16 and in fp32: wrong, but finite. vLLM's attention on the CPU multiplies what a block holds behind the
last token by zero, so NaN there would show although nobody may have written it."""


@dataclass
class Answer:
    """What came of one request.

    Attributes:
        tokens: Output tokens.
        kv: KV bytes ``[L, blocks, P]`` of the prompt's whole blocks, when its first token was there; see ``kv_bytes``.
        states: Bytes of the running states where the prompt's last whole block ends that leaves a token to compute, in
            a model that has any, and where vLLM has not let go of those yet.
        logprobs: Log-probabilities of each output token and of the likeliest others, where they were asked for.
        prompt_logprobs: Those of the prompt's tokens; nothing of the first.
        params: The response's ``kv_transfer_params``.
        finish_reason: ``length``, ``abort``; None while it runs.
    """

    tokens: list[int] = field(default_factory=list)
    kv: np.ndarray | None = None
    states: np.ndarray | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    params: dict | None = None
    finish_reason: str | None = None

    @property
    def records(self) -> list[dict]:
        """Explain records of its restorations."""
        return (self.params or {}).get("cacheflow", [])

    @property
    def record(self) -> dict:
        """The explain record of its only restoration."""
        (record,) = self.records
        return record


def log_probabilities(positions: Sequence[dict | None]) -> list[dict[int, float]]:
    """VLLM's, by position and token."""
    return [{token: each.logprob for token, each in (of or {}).items()} for of in positions]


@dataclass
class ServingEngine:
    """An engine, stepped by the test."""

    llm: object
    layout: object
    groups: object
    kv_caches: dict[str, torch.Tensor]
    num_requests: int = 0
    options: ServingOptions | None = None
    keeps_kv: bool = True
    answers: dict[str, Answer] = field(default_factory=dict)
    _prompts: dict[str, list[int]] = field(default_factory=dict)
    internal_ids: dict[str, str] = field(default_factory=dict)

    @property
    def engine(self):
        return self.llm.llm_engine

    @property
    def core(self):
        return self.engine.engine_core.engine_core

    @property
    def scheduler(self):
        return self.core.scheduler

    @property
    def connector(self):
        return ours(self.scheduler.connector)

    @property
    def side(self):
        return self.connector.scheduler_side

    @property
    def worker(self):
        return self.worker_connector.worker_side

    @property
    def worker_connector(self):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return ours(get_kv_transfer_group())

    @property
    def store(self):
        return self.worker.store

    @property
    def runner(self):
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self):
        return self.runner.model

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def submit(
        self,
        tokens: Sequence[int],
        *,
        num_tokens: int = NUM_TOKENS,
        params: dict | None = None,
        salt: str | None = None,
        lora: object = None,
        media: dict | None = None,
        media_names: dict | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> str:
        """Add a request; returns the name its answer has in ``answers``.

        Of ``media``, images by kind, the prompt holds one token each, of which vLLM makes as many as the image has.
        """
        from vllm import SamplingParams

        self.num_requests += 1
        name = f"r{self.num_requests}"
        extra = None if params is None else {"kv_transfer_params": params}
        sampling = SamplingParams(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=extra,
            logprobs=logprobs, prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
        prompt = {"prompt_token_ids": list(tokens)}
        if salt is not None:
            prompt["cache_salt"] = salt
        if media is not None:
            prompt["multi_modal_data"] = media
        if media_names is not None:
            prompt["multi_modal_uuids"] = media_names
        before = set(self.scheduler.requests)
        self.engine.add_request(name, prompt, sampling, lora_request=lora)
        (internal,) = set(self.scheduler.requests) - before
        whole = list(self.scheduler.requests[internal].prompt_token_ids)
        self.answers[name], self._prompts[name], self.internal_ids[name] = Answer(), whole, internal
        return name

    def abort(self, name: str) -> None:
        self.engine.abort_request([name])
        self.answers[name].finish_reason = "abort"

    def step(self) -> None:
        """One engine step; captures the KV of prompts whose first token came."""
        for output in self.engine.step():
            answer = self.answers[output.request_id]
            completion = output.outputs[0]
            answer.tokens = list(completion.token_ids)
            if completion.logprobs:
                answer.logprobs = log_probabilities(completion.logprobs)
            if output.prompt_logprobs:
                answer.prompt_logprobs = log_probabilities(output.prompt_logprobs)
            if self.keeps_kv and answer.kv is None and not output.finished:
                block_ids, num_tokens = self.block_ids(output.request_id), len(self._prompts[output.request_id])
                answer.kv = self.gather(block_ids[: num_tokens // self.layout.block_size])
                if self.groups.states:
                    end = (num_tokens - 1) // self.layout.block_size * self.layout.block_size
                    blocks = self.state_blocks(output.request_id, end)
                    answer.states = self.gather_states(blocks) if blocks else None
            if output.finished:
                answer.finish_reason = completion.finish_reason
                answer.params = output.kv_transfer_params

    def block_ids(self, name: str) -> list[int]:
        return self.groups.kv_blocks(self.scheduler.kv_cache_manager.get_block_ids(self.internal_ids[name]))

    def state_blocks(self, name: str, num_tokens: int) -> tuple[int, ...]:
        """Blocks of a request's running states after so many tokens, of a model with recurrent layers."""
        by_group = self.scheduler.kv_cache_manager.get_block_ids(self.internal_ids[name])
        return self.groups.state_blocks(by_group, num_tokens)

    def request(self, name: str):
        """VLLM's request; None once it ended."""
        return self.scheduler.requests.get(self.internal_ids[name])

    def run(self, *, until: Callable[[], bool] | None = None, timeout_s: float = 120.0) -> None:
        """Step until nothing is left, or a condition holds."""
        end_s = time.monotonic() + timeout_s
        while self.busy and not (until is not None and until()):
            assert time.monotonic() < end_s, f"the engine did not come to an end in {timeout_s} s: it hangs"
            self.step()

    @property
    def unfinished(self) -> list[str]:
        """Names of the requests that have been asked and not been answered."""
        return [name for name, answer in self.answers.items() if answer.finish_reason is None]

    @property
    def busy(self) -> bool:
        return self.engine.has_unfinished_requests() or bool(self.scheduler.requests)

    def ask(self, tokens: Sequence[int], **wishes) -> Answer:
        """One request from its arrival to its end."""
        name = self.submit(tokens, **wishes)
        self.run()
        return self.answers[name]

    def log_gaps(self, tokens: Sequence[int], reply: Sequence[int]) -> list[float]:
        """How much less likely than the likeliest each token of a reply is, where vLLM computes it all as one prompt.

        All 0 for vLLM's own reply, but for near ties: steps of other sizes round in other ways.
        """
        answer = self.ask([*tokens, *reply], num_tokens=1, prompt_logprobs=1, params={"cacheflow": "off"})
        likely = answer.prompt_logprobs[len(tokens) :]
        return [max(of.values()) - of[token] for token, of in zip(reply, likely, strict=True)]

    def count_preemptions(self) -> list[str]:
        """Names of the requests that vLLM preempts from now on; grows."""
        preempted, preempt = [], self.scheduler._preempt_request  # noqa: SLF001 -- vLLM has no other way

        def noting(request, *args, **kwargs):
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = noting  # noqa: SLF001 -- vLLM has no other way
        return preempted

    def own(self, tokens: Sequence[int], **wishes) -> Answer:
        """What vLLM answers by itself; the KV cache holds nothing before and after."""
        self.evict()
        answer = self.ask(tokens, params={"cacheflow": "off"}, **wishes)
        self.evict()
        return answer

    def saved(self, tokens: Sequence[int], **wishes) -> Answer:
        """VLLM's own answer, of which the chunks are in the store and nothing is in the KV cache afterwards."""
        self.evict()
        answer = self.ask(tokens, params={"cacheflow": "recompute"}, **wishes)
        self.evict()
        return answer

    def numbers(self, kv: np.ndarray) -> np.ndarray:
        """KV bytes as floats."""
        return torch.from_numpy(kv.copy()).view(self.layout.dtype).double().numpy()

    def settle(self) -> None:
        """Wait until what was saved is in the store."""
        assert self.worker.saver.wait(20.0)

    def evict(self) -> None:
        """Forget every cached prefix and fill the whole KV cache with wrong numbers."""
        assert not self.busy
        self.settle()
        assert self.scheduler.reset_prefix_cache()
        self.poison()

    @property
    def states(self):
        """The running states of all recurrent layers, as one row; only in a model that has any."""
        from cacheflow.vllm.models.model_access import layer_number
        from cacheflow.vllm.worker.layout import BlockLayout, LayerView, blocks_first
        from cacheflow.vllm.worker.state_blocks import StateBlocks

        group_of = {name: index for index, names in enumerate(self.groups.state_names) for name in names}
        names = sorted(group_of, key=layer_number)
        count = self.layout.num_blocks
        views = [LayerView(name, blocks_first(self.kv_caches[name], count, name=name)) for name in names]
        return StateBlocks(
            BlockLayout(views, block_size=self.layout.block_size, layout_name="states"),
            group_L=[group_of[name] for name in names],
            layers_R=[len(names)],
            num_groups=len(self.groups.states),
        )

    def gather_states(self, blocks: Sequence[int]) -> np.ndarray:
        out = np.empty(self.states.num_bytes(0, 1), dtype=np.uint8)
        self.states.gather(0, 1, blocks, out)
        return out

    def poison(self, block_ids: Sequence[int] | None = None) -> None:
        ids = list(range(self.layout.num_blocks)) if block_ids is None else list(block_ids)
        kv_bytes.fill(self.layout, ids, POISON)

    def gather(self, block_ids: Sequence[int]) -> np.ndarray:
        return kv_bytes.gather(self.layout, block_ids)

    def configure(self, **changes) -> None:
        """Start the connector's two sides anew with other options, on the same store, as vLLM does when it starts."""
        from cacheflow.vllm.starting import Starting

        self.evict()  # the worker side tries things out in the KV cache
        connectors, store = (self.worker_connector, self.connector), self.store
        self.options = options = dataclasses.replace(self.options, **changes)
        self.worker.close()
        self.side.close()
        configs = {"vllm_config": self.runner.vllm_config, "kv_cache_config": self.runner.kv_cache_config}
        for each in connectors:
            each.begin(Starting(options=options, store=store, **configs))
        self._shake_hands()
        if "chunk_tokens" in changes:
            self.scheduler.max_num_scheduled_tokens = options.chunk_tokens

    def restart(self, options: dict) -> None:
        """End the connector's two sides and their store, and make them anew as an engine that starts with ``options``.

        Whatever was under way is given up, also by a test that failed; nothing is cached, nothing is known.
        """
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

        for name in self.unfinished:
            self.abort(name)
        self.run()
        connectors = {KVConnectorRole.WORKER: self.worker_connector, KVConnectorRole.SCHEDULER: self.connector}
        for each in connectors.values():
            each.shutdown()
        assert self.scheduler.reset_prefix_cache()
        self.poison()
        config = copy.copy(self.runner.vllm_config)
        chunk_tokens = config.scheduler_config.max_num_batched_tokens
        transfer = kv_transfer_config(Path(self.options.profile_dir), {"chunk_tokens": chunk_tokens, **options})
        extra = transfer["kv_connector_extra_config"]
        config.kv_transfer_config = dataclasses.replace(config.kv_transfer_config, kv_connector_extra_config=extra)
        self.options = ConnectorOptions.parse(extra).for_engine(chunk_tokens)
        for role, each in connectors.items():
            each.__init__(config, role, self.runner.kv_cache_config)
        self._shake_hands()

    def _shake_hands(self) -> None:
        """Worker to scheduler; from then on both serve."""
        from cacheflow.vllm.connector import CacheFlowHandshake

        self.worker_connector.register_kv_caches(self.kv_caches)
        facts = self.worker_connector.get_handshake_metadata().facts
        if facts.costs is not None:  # the scheduler is held to chunks, whatever pass was measured
            facts = dataclasses.replace(facts, costs=dataclasses.replace(facts.costs, engine_pass=None))
        self.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): CacheFlowHandshake(facts)})

    def balance_link(self, num_tokens: int, *, ratio: float = 1.0) -> None:
        """Throttle the link so that loading so many tokens takes ``ratio`` times what recomputing them takes."""
        from cacheflow.plan.rates import LiveRates
        from cacheflow.vllm.scheduler.stage_planner import PlanSpan

        decider = self.side.decider
        chunk_tokens = self.options.chunk_tokens
        span = PlanSpan(start=0, end=num_tokens // chunk_tokens * chunk_tokens, chunk_tokens=chunk_tokens)
        problem = decider.stages[0].problem(span, stored=False)
        compute_s = float(problem.compute_KB.sum()) * decider.rates.compute_factor
        bytes_per_s = float(problem.load_bytes_KB.sum()) / (ratio * compute_s)
        self.throttled.set_bandwidth(bytes_per_s)
        decider.stages[0].rates = LiveRates(bytes_per_s=bytes_per_s, compute_factor=decider.rates.compute_factor)

    @property
    def throttled(self):
        """The store's link."""
        from cacheflow.stores.throttled import ThrottledStore

        store = self.store
        while not isinstance(store, ThrottledStore):
            store = store.inner
        return store

    def set_rate(self, bytes_per_s: float) -> None:
        """Change the link, and what is expected of it."""
        from cacheflow.plan.rates import LiveRates

        self.throttled.set_bandwidth(bytes_per_s)
        self.side.decider.stages[0].rates = LiveRates(bytes_per_s=bytes_per_s)


def ours(connector):
    """CacheFlow's connector, which may be a child of vLLM's MultiConnector."""
    from cacheflow.vllm.connector import CacheFlowConnector

    children = getattr(connector, "sub_connectors", (connector,))
    return next(each for each in children if isinstance(each, CacheFlowConnector))


def kv_caches_of(runner) -> dict[str, torch.Tensor]:
    """The KV blocks of each layer, bottom first, as vLLM registers them."""
    from cacheflow.vllm.models.kv_groups import KvGroups
    from cacheflow.vllm.models.layers import owning_names
    from cacheflow.vllm.models.model_access import layer_number

    context = runner.vllm_config.compilation_config.static_forward_context
    names = owning_names(context, KvGroups.of(runner.kv_cache_config).attention_names)
    names.sort(key=layer_number)
    return {name: context[name].kv_cache for name in names}


@contextmanager
def registered_caches():
    """What vLLM registers with our connectors meanwhile, by layer."""
    from cacheflow.vllm.connector import CacheFlowConnector

    caches, register = {}, CacheFlowConnector.register_kv_caches

    def noting(self, kv_caches):
        caches.update(kv_caches)
        register(self, kv_caches)

    CacheFlowConnector.register_kv_caches = noting
    try:
        yield caches
    finally:
        CacheFlowConnector.register_kv_caches = register


def random_tokens(count: int, *, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, TINY["vocab_size"], (count,), generator=generator).tolist()


def hold_to_chunks(scheduler: object, chunk_tokens: int) -> None:
    """Have vLLM prefill in chunks of the save: of latent attention it would take whole prompts on the CPU."""
    scheduler.scheduler_config.enable_chunked_prefill = True
    scheduler.max_num_scheduled_tokens = chunk_tokens


def our_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("cacheflow"))


def kv_transfer_config(profile_dir: Path, options: dict, connector: str = "CacheFlowConnector") -> dict:
    return {
        "kv_connector": connector,
        "kv_connector_module_path": CONNECTORS[connector],
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "profile_dir": str(profile_dir), "calibrate_budget_s": 1.0, "self_test": False, "explain": True,
            "lookup_timeout_s": 20.0, **options,
        },
    }  # fmt: skip


def new_llm(folder: Path, *, dtype: str, chunk_tokens: int, transfer: dict | None = None, **overrides):
    """Start an engine in this process."""
    from cacheflow.vllm.plugin import register
    from vllm import LLM

    register()
    arguments = {
        "enforce_eager": True, "max_model_len": 4096, "max_num_seqs": 8, "enable_prefix_caching": True, "seed": 0,
        "num_gpu_blocks_override": NUM_KV_BLOCKS, "max_num_batched_tokens": chunk_tokens, "skip_tokenizer_init": True,
        **attention_of(folder), **overrides,
    }  # fmt: skip
    return LLM(model=str(folder), dtype=dtype, kv_transfer_config=transfer, **arguments)


@contextmanager
def serving_engine(
    folder: Path,
    *,
    dtype: str,
    chunk_tokens: int = 128,
    options: dict | None = None,
    connector: str = "CacheFlowConnector",
    around: Callable[[dict], dict] | None = None,
    **overrides,
):
    """An engine with the connector; ``options=None``: without. Nothing is left of it afterwards.

    ``around``: the configuration vLLM is given, of the one CacheFlow alone would have.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from cacheflow.vllm.models.kv_groups import KvGroups
    from cacheflow.vllm.worker.layout import BlockLayout

    transfer = own = None
    if options is not None:
        transfer = kv_transfer_config(folder / "profiles", {"chunk_tokens": chunk_tokens, **options}, connector)
        own = ConnectorOptions.parse(transfer["kv_connector_extra_config"]).for_engine(chunk_tokens)
        transfer = transfer if around is None else around(transfer)
    with registered_caches() as caches, uncollected():
        llm = new_llm(folder, dtype=dtype, chunk_tokens=chunk_tokens, transfer=transfer, **overrides)
    try:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        attention = kv_caches_of(runner)
        caches = caches or attention
        layout = BlockLayout.from_kv_caches(caches, runner.kv_cache_config, layer_names=list(attention))
        serving = ServingEngine(llm, layout, KvGroups.of(runner.kv_cache_config), caches, options=own)
        del core, runner, caches, attention
        yield serving
        serving.llm = None
    finally:
        with uncollected() as collect:
            llm.llm_engine.engine_core.engine_core.shutdown()
            cleanup_dist_env_and_memory()
            # Now, not when the collector comes by: an engine's end takes vLLM's process groups with it, the next one's
            # too. As it is collected it shuts down once more, which would collect twice more.
            del llm
            collect()
