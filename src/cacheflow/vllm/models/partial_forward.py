"""Partial forwards through vLLM's own model: some tokens of one sequence, some layers, into given KV blocks.

Shapes: ``n`` tokens of a segment, ``N`` KV blocks of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from cacheflow.errors import CacheFlowError
from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.tensors.streams import StreamEvent
from cacheflow.vllm.adapters import Adapter
from cacheflow.vllm.models.boundary_states import States
from cacheflow.vllm.models.kv_groups import keeps_within_passes
from cacheflow.vllm.models.layers import Carry, ModelLayers
from cacheflow.vllm.models.model_access import ModelHandle


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Tokens ``[start, end)`` of one sequence, ready to run through any of the layers.

    Attributes:
        start: Position of its first token.
        end: One past its last.
        token_ids: ``[n]`` int32, on the device.
        next_token_ids: ``[n]`` int32, on the device: the token after each; what a drafter reads.
        positions: ``[n]`` int64, on the device.
        slots: ``[n]`` int64: where each token's keys and values go.
        commons: vLLM's ``CommonAttentionMetadata`` of each of its KV cache groups.
        boundary: What the first layer of a later pipeline stage is given, and overwrites; None on the first stage.
        adapter: Its LoRA adapter; None for the model as it is.
    """

    start: int
    end: int
    token_ids: torch.Tensor
    next_token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    commons: tuple[Any, ...]
    boundary: States | None
    adapter: Adapter | None


class PartialForward:
    """Runs segments of sequences through this worker's layers; one per process, on the worker's main thread only.

    It has attention metadata builders of its own: vLLM's keep state between the steps of its batch. On CUDA a call
    returns once its kernels are queued, and they wait for the cells that were placed before it. The host waits in one
    case, before the builders' buffers are filled anew: until what they held for the segment before has been copied out.
    """

    def __init__(self, handle: ModelHandle, lane: CopyLane | None = None) -> None:
        """Run the handle's layers; ``lane`` is that of the KV blocks, None on the CPU."""
        self.handle, self._lane = handle, lane
        self._groups = _own_groups(handle)
        attention = handle.groups.attention
        self._slotted = [
            name for group in self._groups if group.kv_cache_group_id == attention for name in group.layer_names
        ]
        self._prepared: tuple[Segment, dict[str, Any]] | None = None
        self._copied_out: StreamEvent | None = None
        modules = handle.model.modules() if handle.compiled else ()
        self._compiled = [each for each in modules if getattr(each, "do_not_compile", True) is False]

    @property
    def lane(self) -> CopyLane | None:
        """That of the KV blocks."""
        return self._lane

    @property
    def queues(self) -> bool:
        """Whether a call returns once its kernels are queued."""
        return self._lane is not None

    def record(self) -> StreamEvent | None:
        """An event after all that was asked so far; None on the CPU."""
        return None if self._lane is None else self._lane.streams.current().record(timed=True)

    def attention_layers(self) -> list[Any]:
        """VLLM's ``Attention`` of each row of this stage, bottom first."""
        context = self.handle.vllm_config.compilation_config.static_forward_context
        return [context[name] for name in self.handle.layer_names]

    def segment(  # noqa: PLR0913 -- a sequence's, keyword-only but for the first four
        self,
        start: int,
        tokens: Sequence[int],
        block_ids: Sequence[int],
        boundary: States | None = None,
        *,
        state_blocks: Sequence[int] = (),
        next_token: int | None = None,
        adapter: Adapter | None = None,
    ) -> Segment:
        """Prepare the tokens from ``start`` on of a sequence whose KV blocks are ``block_ids``, in order from token 0.

        ``boundary`` is what a later pipeline stage is handed for them; layers overwrite it. ``state_blocks``, one of
        each group of a hybrid model's states, hold the states before the tokens, and after a run those after them;
        before the first token of a sequence what they hold does not matter. ``next_token`` comes after the tokens;
        where it is not known a drafter's last position is not right.
        """
        from vllm.v1.attention.backend import CommonAttentionMetadata

        end, size = start + len(tokens), self.handle.block_size
        table = torch.tensor(block_ids[: -(-end // size)], dtype=torch.int32)
        positions = torch.arange(start, end, dtype=torch.int64)
        slots = table.long()[positions // size] * size + positions % size
        starts = torch.tensor([0, end - start], dtype=torch.int32)
        lengths = torch.tensor([end], dtype=torch.int32)
        on_device, slots_on_device = self._send(positions), self._send(slots)
        common = CommonAttentionMetadata(
            query_start_loc=self._send(starts),
            query_start_loc_cpu=starts,
            seq_lens=self._send(lengths),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=1,
            num_actual_tokens=end - start,
            max_query_len=end - start,
            max_seq_len=end,
            block_table_tensor=self._send(table.unsqueeze(0)),
            slot_mapping=slots_on_device,
            causal=True,
            is_prefilling=torch.ones(1, dtype=torch.bool),
            positions=on_device,
        )
        after = tokens[-1] if next_token is None else next_token
        followed = self._send(torch.tensor([*tokens, after], dtype=torch.int32))
        return Segment(
            start, end, followed[:-1], followed[1:], on_device, slots_on_device,
            self._by_group(common, table.numel(), state_blocks), boundary, adapter,
        )  # fmt: skip

    def _by_group(self, common: Any, num_columns: int, state_blocks: Sequence[int]) -> tuple[Any, ...]:  # noqa: ANN401
        """The metadata of every KV cache group; in those of states a sequence has one block for all positions."""
        groups = self.handle.groups
        commons = [common] * (1 + len(groups.states))
        for group, block in zip(groups.states, state_blocks, strict=True):
            table = torch.full((1, num_columns), block, dtype=torch.int32)
            commons[group] = replace(common, block_table_tensor=self._send(table))
        return tuple(commons)

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        """Numbers of a segment where the model reads them."""
        return values if self._lane is None else self._lane.streams.current().send(values)

    def run(
        self, segment: Segment, carry: Carry | None, *, layers: tuple[int, int], kv_only_top: bool = False
    ) -> Carry | None:
        """Run a segment through rows ``[lo, hi)`` of this stage, writing their keys and values; in an eager engine.

        Args:
            segment: What.
            carry: What row ``lo - 1`` returned for it, which is overwritten; not looked at where ``lo`` is 0.
            layers: Which rows, counted from this stage's first.
            kv_only_top: Row ``hi - 1`` computes keys and values only.

        Returns:
            The carry for row ``hi``; None with ``kv_only_top`` and after a drafter's row.
        """
        row_lo, row_hi = layers
        own = min(row_hi, self._layers.num_rows)
        with self._context(segment), self._eager():
            if row_lo < own:
                alone = kv_only_top and own == row_hi
                carry = self._layers.run(lambda: self._call(segment), carry, (row_lo, own), kv_only_top=alone)
            if own == row_hi:
                return carry
            assert carry is not None, "all layers have run"
            self._draft(segment, self._layers.pass_through(lambda: self._call(segment), carry))
        return None

    def run_whole(self, segment: Segment) -> States | None:
        """Run a segment through the whole stage as the engine itself would, compiled or not.

        Returns:
            What this stage hands to the next; None on the last stage.
        """
        with self._context(segment, whole=True):
            out = self._call(segment)
            if self.handle.drafter is not None:
                self._draft(segment, out)
            return _handed_over(out)

    def _draft(self, segment: Segment, target_out: object) -> None:
        assert self.handle.drafter is not None, "rows beyond the layers are a drafter's"
        self.handle.drafter.write(target_out, segment.next_token_ids, self._positions(segment))

    def hand_over(self, segment: Segment, carry: Carry) -> States:
        """What this stage hands to the next for a segment whose top row returned ``carry``; not on the last stage."""
        with self._context(segment), self._eager():
            states = _handed_over(self._layers.pass_through(lambda: self._call(segment), carry))
        assert states is not None, "the last stage hands nothing over"
        return states

    def prelude(self, segment: Segment) -> tuple[list[torch.nn.Module], list[torch.Tensor]]:
        """See ``ModelLayers.prelude``."""
        with self._context(segment), self._eager():
            return self._layers.prelude(lambda: self._call(segment))

    @property
    def _layers(self) -> ModelLayers:
        assert self.handle.layers is not None, "partial forwards are asked for only where recomputation is supported"
        return self.handle.layers

    def _call(self, segment: Segment) -> object:
        from vllm.sequence import IntermediateTensors

        received = None if segment.boundary is None else IntermediateTensors(segment.boundary)
        return self.handle.runner.model(
            **self.handle.inputs.arguments(segment.token_ids),
            positions=self._positions(segment),
            intermediate_tensors=received,
        )

    def _positions(self, segment: Segment) -> torch.Tensor:
        if getattr(self.handle.vllm_config.model_config, "uses_mrope", False):
            return segment.positions.repeat(3, 1)  # height and width of text are its time
        return segment.positions

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """Have vLLM run the model's Python code for a while, of which a compiled one runs none; its bits may differ."""
        for module in self._compiled:
            module.do_not_compile = True
        try:
            yield
        finally:
            for module in self._compiled:
                module.do_not_compile = False

    @contextmanager
    def _context(self, segment: Segment, *, whole: bool = False) -> Iterator[None]:
        """VLLM's forward context for one segment, nested in whatever context is active."""
        from vllm.forward_context import get_forward_context, set_forward_context

        if self._lane is not None:
            self._lane.before_compute()
        metadata = self._metadata(segment)
        slots = dict.fromkeys(self._slotted, segment.slots)
        arguments = {"num_tokens": segment.end - segment.start, "slot_mapping": slots}
        with (
            torch.inference_mode(),
            _adapter_set(self.handle.runner, segment.adapter, segment.end - segment.start),
            set_forward_context(metadata, self.handle.vllm_config, **arguments),
        ):
            if not whole:
                # vLLM names MoE layers by counting calls from the model's bottom; None makes each give its own name.
                get_forward_context().all_moe_layers = None
            yield

    def _metadata(self, segment: Segment) -> dict[str, Any]:
        """Attention metadata by layer; kept for one segment, because a builder may reuse its buffers for the next."""
        if self._prepared is None or self._prepared[0] is not segment:
            if self._copied_out is not None:
                self._copied_out.wait()
            built = {}
            for group in self._groups:
                built.update(
                    dict.fromkeys(group.layer_names, group.build_metadata(segment.commons[group.kv_cache_group_id]))
                )
            self._prepared = segment, built
            self._copied_out = self.record()
        return self._prepared[1]


def _handed_over(out: object) -> States | None:
    from vllm.sequence import IntermediateTensors

    return dict(out.tensors) if isinstance(out, IntermediateTensors) else None


def _own_groups(handle: ModelHandle) -> list[Any]:
    """Attention groups like the runner's, with metadata builders that nothing else uses."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.utils import AttentionGroup

    groups = []
    with set_current_vllm_config(handle.vllm_config):
        for index, theirs in attention_groups(handle):
            spec = _without_states_within(theirs.kv_cache_spec)
            own = AttentionGroup(theirs.backend, list(theirs.layer_names), spec, index)
            own.create_metadata_builders(handle.vllm_config, handle.device, _kernel_block_size(handle.runner, index))
            own.kernel_block_stride = theirs.kernel_block_stride
            groups.append(own)
    return groups


def _without_states_within(spec: Any) -> Any:  # noqa: ANN401 -- vLLM's KVCacheSpec
    """The same for layers that leave no states within a pass: here that would be in the block of those at its end."""
    return replace(spec, num_prefill_checkpoint_blocks=0) if keeps_within_passes(spec) else spec


def attention_groups(handle: ModelHandle) -> list[tuple[int, Any]]:
    """The runner's attention groups, of running states too, with the KV cache group that each is part of."""
    return [(index, each) for index, of_group in enumerate(handle.runner.attn_groups) for each in of_group]


def _kernel_block_size(runner: Any, group: int) -> int | None:  # noqa: ANN401 -- a vLLM runner of either generation
    sizes = getattr(runner, "_kernel_block_sizes", None) or getattr(runner, "kernel_block_sizes", None)
    return int(sizes[group]) if sizes and sizes[group] is not None else None


@contextmanager
def _adapter_set(runner: Any, adapter: Adapter | None, num_tokens: int) -> Iterator[None]:  # noqa: ANN401 -- vLLM's runner
    """Have LoRA layers compute so many tokens with an adapter, or the base model, then what was set before.

    Before the engine's first batch they are set to nothing: they would index with what the memory happens to hold.

    Raises:
        CacheFlowError: The adapter is not loaded, and none that the engine's own batch may use can make room for it.
    """
    manager = getattr(runner, "lora_manager", None)
    if manager is None:
        yield
        return
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

    adapters = manager._adapter_manager  # noqa: SLF001 -- holds the last batch's mapping
    before = adapters._last_mapping  # noqa: SLF001
    number = 0 if adapter is None else adapter.number
    mapping = LoRAMapping((number,) * num_tokens, (number,), is_prefill=True)
    if adapter is None:
        adapters.set_adapter_mapping(mapping)
    else:
        loaded = number in manager.list_adapters() or len(adapters) < adapters.capacity
        active = number in adapters._active_adapters or None in adapters.lora_index_to_id  # noqa: SLF001
        if not (loaded and active):
            raise CacheFlowError(f"adapter {adapter.name} has no room beside those in use: raise --max-loras")
        request = LoRARequest(adapter.name, number, adapter.path)
        if adapter.stacked_experts:
            request.is_3d_lora_weight = True
        manager.set_active_adapters({request}, mapping)
    try:
        yield
    finally:
        if before is not None:
            adapters.set_adapter_mapping(before)
