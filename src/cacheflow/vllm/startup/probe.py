"""A short random prompt, KV blocks to try it in, and what the engine itself makes of it before anything is served."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from cacheflow.errors import ConfigError
from cacheflow.vllm.models.boundary_states import States
from cacheflow.vllm.models.layers import mapped
from cacheflow.vllm.models.model_access import ModelHandle
from cacheflow.vllm.models.workers import worker_of
from cacheflow.vllm.worker.layout import BlockLayout, Payload
from cacheflow.vllm.worker.state_blocks import StateBlocks

LEAST_CHUNK_TOKENS = 64
_INPUTS = frozenset(("input_ids", "positions", "intermediate_tensors", "inputs_embeds"))
"""What the model is called with in a partial forward."""
_NAME, _numbers = "_cacheflow_self_test_", itertools.count()
"""No name twice: vLLM's first runner remembers where the running states of a request stood after it has ended."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Random tokens, cut into equal chunks; the prompt goes on with its first token again.

    Attributes:
        tokens: Token ids.
        chunk_tokens: Tokens of a chunk, a multiple of the block size.
    """

    tokens: tuple[int, ...]
    chunk_tokens: int

    @property
    def chunk_ends(self) -> tuple[int, ...]:
        """Where each chunk ends."""
        return tuple(range(self.chunk_tokens, len(self.tokens) + 1, self.chunk_tokens))

    def chunk(self, index: int) -> tuple[int, ...]:
        """Tokens of one chunk."""
        return self.tokens[index * self.chunk_tokens : (index + 1) * self.chunk_tokens]

    def token_after(self, end: int) -> int:
        """The token at a position."""
        return self.tokens[end % len(self.tokens)]


def make_probe(handle: ModelHandle, *, num_chunks: int) -> Probe:
    """A probe of ``num_chunks`` short chunks, or as many as the model's longest prompt has room for; always the same.

    Short, whatever the chunk size of the saves: what is checked does not depend on it, and this is start-up time.
    """
    size = handle.block_size
    chunk = -(-LEAST_CHUNK_TOKENS // size) * size
    longest = int(handle.vllm_config.model_config.max_model_len)
    count = max(1, min(num_chunks, longest // chunk))
    generator = torch.Generator().manual_seed(11)
    vocabulary = int(handle.vllm_config.model_config.get_vocab_size())
    return Probe(tuple(torch.randint(vocabulary, (count * chunk,), generator=generator).tolist()), chunk)


@dataclass(frozen=True, slots=True)
class SeenStep:
    """How vLLM called the model in one step.

    Attributes:
        states: A copy of what a later pipeline stage was handed; None on the first.
        refusal: Why a partial forward cannot call the model so; empty when it can.
    """

    states: States | None = None
    refusal: str = ""


def run_by_engine(
    handle: ModelHandle, probe: Probe, block_ids: Sequence[int], states: Sequence[Sequence[int]] = ()
) -> list[SeenStep]:
    """Have the engine prefill the probe chunk by chunk, by its own steps, as it will prefill what users send.

    The running states after each chunk are left in its blocks of ``states``. All ranks must call it together.
    """
    seen, start, size = list[SeenStep](), 0, handle.block_size
    columns = {end // size - 1: blocks for end, blocks in zip(probe.chunk_ends, states, strict=False)}
    for end in probe.chunk_ends:
        next_token, tokens = probe.token_after(end), probe.tokens[:end]
        seen.append(step_by_engine(handle, tokens, block_ids, start=start, next_token=next_token, states=columns))
        start = end
    return seen


def step_by_engine(
    handle: ModelHandle,
    tokens: Sequence[int],
    block_ids: Sequence[int],
    *,
    start: int,
    next_token: int,
    states: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> SeenStep:
    """One step of the engine: compute the tokens from ``start`` on, of a prompt whose KV blocks are ``block_ids``.

    ``states`` has the blocks of a hybrid model's running states after so many KV blocks and one: where ``start`` and
    where the tokens end. The prompt goes on with ``next_token``, so that nothing of it is sampled. All ranks must call
    it together. The connector is not asked for anything meanwhile: it is being started.
    """
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.v1.core.sched.output import SchedulerOutput

    worker, calls = worker_of(handle.vllm_config), list[SeenStep]()

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401 -- vLLM's model
        calls.append(_seen(args, kwargs, embedded=handle.inputs.embedded))

    def execute(step: Any) -> None:  # noqa: ANN401 -- vLLM's SchedulerOutput
        with torch.inference_mode():
            if worker.execute_model(step) is None:
                worker.sample_tokens(None)

    name = f"{_NAME}{next(_numbers)}"
    step, last = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
    longest = int(handle.vllm_config.model_config.max_model_len)
    prompt = [*tokens, next_token][:longest]
    blocks = _engine_blocks(handle, block_ids, states, num_blocks=-(-len(prompt) // handle.block_size), end=len(tokens))
    step.scheduled_new_reqs = [_new_request(name, prompt, blocks, start=start)]
    step.num_scheduled_tokens = {name: len(tokens) - start}
    step.total_num_scheduled_tokens = len(tokens) - start
    last.finished_req_ids = {name}
    connector = kv_transfer_state._KV_CONNECTOR_AGENT  # noqa: SLF001 -- as vLLM's own warm-up does
    kv_transfer_state._KV_CONNECTOR_AGENT = None  # noqa: SLF001
    disable = getattr(getattr(handle.runner, "kv_connector", None), "set_disabled", lambda disabled: None)
    disable(True)
    hook = handle.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        execute(step)
        hook.remove()
        execute(last)
    finally:
        hook.remove()
        disable(False)
        kv_transfer_state._KV_CONNECTOR_AGENT = connector  # noqa: SLF001
    if handle.device.type == "cuda":
        torch.cuda.current_stream(handle.device).synchronize()
    num_tokens = len(tokens) - start
    if len(calls) > 1:
        return SeenStep(refusal=f"vLLM calls the model {len(calls)} times for one chunk")
    if not calls:  # a CUDA graph of the whole batch: the bytes it leaves can be compared all the same
        return SeenStep(refusal="" if handle.is_first_stage else "what this stage is handed cannot be seen")
    [seen] = calls
    if seen.states is None:
        return seen
    return replace(seen, states={name: each[:num_tokens] for name, each in seen.states.items()})


def _seen(args: tuple[Any, ...], kwargs: dict[str, Any], *, embedded: bool) -> SeenStep:
    received, extra = kwargs.get("intermediate_tensors"), sorted(set(kwargs) - _INPUTS)
    states = None if received is None else {name: each.clone() for name, each in received.tensors.items()}
    if args or extra:
        return SeenStep(states, f"vLLM calls the model with more than tokens: {', '.join(extra) or 'more arguments'}")
    if embedded is (kwargs.get("inputs_embeds") is None):
        ways = ("tokens", "embeddings")
        return SeenStep(states, f"vLLM calls the model with {ways[not embedded]}, not with {ways[embedded]}")
    return SeenStep(states)


def _engine_blocks(
    handle: ModelHandle,
    block_ids: Sequence[int],
    states: Mapping[int, Sequence[int]],
    *,
    num_blocks: int,
    end: int,
) -> tuple[list[int], ...]:
    """Blocks of a prompt by KV cache group; vLLM's null block, the first of all, stands for what is not kept."""
    blocks = list(block_ids[: -(-end // handle.block_size)])
    blocks += [0] * (num_blocks - len(blocks))
    by_group = [[0] * num_blocks for _ in handle.groups.states]
    for column, of_column in states.items():
        if column < num_blocks:
            for listed, block in zip(by_group, of_column, strict=True):
                listed[column] = block
    return handle.groups.by_group(blocks, by_group)


def _new_request(name: str, prompt: list[int], blocks: tuple[list[int], ...], *, start: int) -> Any:  # noqa: ANN401
    """A request as vLLM's scheduler gives it to workers, of which ``start`` tokens are computed."""
    from vllm.v1.core.sched.output import NewRequestData

    from vllm import SamplingParams

    return NewRequestData(
        req_id=name,
        prompt_token_ids=prompt,
        mm_features=[],
        sampling_params=SamplingParams(max_tokens=2, temperature=0.0),
        pooling_params=None,
        block_ids=blocks,
        num_computed_tokens=start,
        lora_request=None,
        prefill_token_ids=prompt,
    )


def gathered(layout: BlockLayout, block_ids: list[int]) -> list[Payload]:
    """Bytes ``[blocks, P]`` of blocks in each layer."""
    out = np.empty(layout.num_bytes(0, layout.num_layers, len(block_ids)), dtype=np.uint8)
    layout.gather(0, layout.num_layers, block_ids, out)
    return layout.by_layer(out, 0, layout.num_layers, len(block_ids))


def random_like(carry: Any, generator: torch.Generator) -> Any:  # noqa: ANN401 -- a nest of tensors
    """A nest with the same tensors' shapes, and random numbers in those of floats."""

    def change(each: torch.Tensor) -> torch.Tensor:
        if not each.is_floating_point():
            return each.clone()
        return torch.randn(each.shape, generator=generator).to(each.device, each.dtype)

    return mapped(carry, change)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Blocks at the end of the KV cache.

    Attributes:
        kv: For keys and values.
        states: For the running states of a hybrid model at each of some positions: a block of each group.
    """

    kv: list[int]
    states: list[tuple[int, ...]]


@contextmanager
def scratch_blocks(
    layout: BlockLayout, num_tokens: int, states: StateBlocks | None = None, *, num_states: int = 1
) -> Iterator[Scratch]:
    """Blocks that hold ``num_tokens``, and states at so many positions; all of them are zero afterwards, as before.

    Only before the first request: vLLM hands blocks out from the front and knows nothing of this.

    Raises:
        ConfigError: The KV cache has fewer blocks (one, the null block, is vLLM's).
    """
    for_kv, groups = -(-num_tokens // layout.block_size), 0 if states is None else states.num_groups
    needed = for_kv + num_states * groups
    if needed > layout.num_blocks - 1:
        raise ConfigError(
            f"{num_tokens} tokens need {needed} KV blocks of {layout.block_size}, the KV cache has {layout.num_blocks}"
        )
    block_ids = list(range(layout.num_blocks - needed, layout.num_blocks))
    kv, rest = block_ids[:for_kv], block_ids[for_kv:]
    try:
        yield Scratch(kv, [tuple(rest[index * groups : (index + 1) * groups]) for index in range(num_states)])
    finally:
        wipe(layout, kv)
        if states is not None:
            wipe(states.layout, rest)


def wipe(layout: BlockLayout, block_ids: list[int], *, value: int = 0) -> None:
    """Fill blocks of every layer with one byte value."""
    for layer in range(layout.num_layers):
        payload = np.full(layout.num_bytes(layer, layer + 1, len(block_ids)), value, dtype=np.uint8)
        layout.scatter(layer, layer + 1, block_ids, payload)
