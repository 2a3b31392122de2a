"""A short random prompt, KV blocks to try it in, and what the engine itself makes of it before anything is served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cacheflow.errors import ConfigError
from cacheflow.vllm.models.boundary_states import States
from cacheflow.vllm.models.layers import mapped
from cacheflow.vllm.models.model_access import ModelHandle
from cacheflow.vllm.models.workers import worker_of
from cacheflow.vllm.worker.layout import BlockLayout, Payload

LEAST_CHUNK_TOKENS = 64
_INPUTS = frozenset(("input_ids", "positions", "intermediate_tensors", "inputs_embeds"))
"""What the model is called with in a partial forward."""
_NAME = "_cacheflow_self_test_"


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


def run_by_engine(handle: ModelHandle, probe: Probe, block_ids: Sequence[int]) -> list[SeenStep]:
    """Have the engine prefill the probe chunk by chunk, by its own steps, as it will prefill what users send.

    All ranks must call it together.
    """
    seen, start = list[SeenStep](), 0
    for end in probe.chunk_ends:
        next_token = probe.token_after(end)
        seen.append(step_by_engine(handle, probe.tokens[:end], block_ids, start=start, next_token=next_token))
        start = end
    return seen


def step_by_engine(
    handle: ModelHandle, tokens: Sequence[int], block_ids: Sequence[int], *, start: int, next_token: int
) -> SeenStep:
    """One step of the engine: compute the tokens from ``start`` on, of a prompt whose KV blocks are ``block_ids``.

    The prompt goes on with ``next_token``, so that nothing of it is sampled. All ranks must call it together. The
    connector is not asked for anything meanwhile: it is being started.
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

    name = f"{_NAME}{start}"
    step, last = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
    longest = int(handle.vllm_config.model_config.max_model_len)
    prompt = [*tokens, next_token][:longest]
    step.scheduled_new_reqs = [_new_request(handle, name, prompt, block_ids, start=start, end=len(tokens))]
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


def _new_request(
    handle: ModelHandle, name: str, prompt: list[int], block_ids: Sequence[int], *, start: int, end: int
) -> Any:  # noqa: ANN401
    """A request as vLLM's scheduler gives it to workers, of which ``[start, end)`` is computed."""
    from vllm.v1.core.sched.output import NewRequestData

    from vllm import SamplingParams

    size = handle.block_size
    blocks = list(block_ids[: -(-end // size)])
    # What lies beyond is not kept: vLLM's null block, the first of all, stands for it.
    blocks += [0] * (-(-len(prompt) // size) - len(blocks))
    return NewRequestData(
        req_id=name,
        prompt_token_ids=prompt,
        mm_features=[],
        sampling_params=SamplingParams(max_tokens=2, temperature=0.0),
        pooling_params=None,
        block_ids=(blocks,),
        num_computed_tokens=start,
        lora_request=None,
        prefill_token_ids=prompt,
    )


def gathered(layout: BlockLayout, block_ids: list[int]) -> list[Payload]:
    """Bytes ``[blocks, P]`` of blocks in each layer."""
    layout.fence()
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


@contextmanager
def scratch_blocks(layout: BlockLayout, num_tokens: int) -> Iterator[list[int]]:
    """Blocks at the end of the KV cache that hold ``num_tokens``; all bytes of them are zero afterwards, as before.

    Only before the first request: vLLM hands blocks out from the front and knows nothing of this.

    Raises:
        ConfigError: The KV cache has fewer blocks (one, the null block, is vLLM's).
    """
    needed = -(-num_tokens // layout.block_size)
    if needed > layout.num_blocks - 1:
        raise ConfigError(
            f"{num_tokens} tokens need {needed} KV blocks of {layout.block_size}, the KV cache has {layout.num_blocks}"
        )
    block_ids = list(range(layout.num_blocks - needed, layout.num_blocks))
    try:
        yield block_ids
    finally:
        wipe(layout, block_ids)


def wipe(layout: BlockLayout, block_ids: list[int], *, value: int = 0) -> None:
    """Fill blocks of every layer with one byte value."""
    layout.fence()
    for layer in range(layout.num_layers):
        payload = np.full(layout.num_bytes(layer, layer + 1, len(block_ids)), value, dtype=np.uint8)
        layout.scatter(layer, layer + 1, block_ids, payload)
