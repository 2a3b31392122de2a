"""Partial forwards through vLLM's own layers: some tokens of one sequence, some layers, into given KV blocks.

Shapes: ``n`` tokens of a piece, ``C`` hidden_size, ``N`` KV blocks of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cacheflow.vllm.models.families import can_write_alone, write_keys_and_values
from cacheflow.vllm.models.model_access import ModelHandle


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """What goes from layer to layer; layers overwrite both.

    Attributes:
        hidden: ``[n, C]``.
        residual: ``[n, C]``; None below the first layer of the model.
    """

    hidden: torch.Tensor
    residual: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tokens ``[start, end)`` of one sequence, ready to run through any of the layers.

    Attributes:
        start: Position of its first token.
        end: One past its last.
        positions: ``[n]`` int64, on the device.
        slots: ``[n]`` int64: where each token's keys and values go.
        common: vLLM's ``CommonAttentionMetadata``.
    """

    start: int
    end: int
    positions: torch.Tensor
    slots: torch.Tensor
    common: Any


class PartialForward:
    """Runs pieces of sequences through this worker's layers; one per process, on the worker's main thread only.

    It has attention metadata builders of its own: vLLM's keep state between the steps of its batch. On CUDA a call
    returns once its kernels are queued and first waits for the call before it, so that at most one is running.
    """

    def __init__(self, handle: ModelHandle) -> None:
        self.handle = handle
        self._groups = _own_groups(handle)
        self._layers = [] if handle.inner is None else list(handle.inner.layers)[handle.start_layer : handle.end_layer]
        self._prepared: tuple[Piece, dict[str, Any]] | None = None
        self._running: torch.cuda.Event | None = None

    @property
    def writes_alone(self) -> bool:
        """Whether ``kv_only_top`` saves work: the backend can write keys and values without attending."""
        return bool(self._layers) and not self.handle.compiled and all(map(can_write_alone, self._layers))

    def attention_layers(self) -> list[Any]:
        """VLLM's ``Attention`` of each layer of this stage, bottom first."""
        context = self.handle.vllm_config.compilation_config.static_forward_context
        return [context[name] for name in self.handle.layer_names]

    def piece(self, start: int, end: int, block_ids: Sequence[int]) -> Piece:
        """Prepare tokens ``[start, end)`` of a sequence whose KV blocks are ``block_ids``, in order from token 0."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        size, device = self.handle.block_size, self.handle.device
        table = torch.tensor(block_ids[: -(-end // size)], dtype=torch.int32)
        positions = torch.arange(start, end, dtype=torch.int64)
        slots = table.long()[positions // size] * size + positions % size
        starts = torch.tensor([0, end - start], dtype=torch.int32)
        lengths = torch.tensor([end], dtype=torch.int32)
        on_device = positions.to(device, non_blocking=True)
        slots_on_device = slots.to(device, non_blocking=True)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device, non_blocking=True),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(device, non_blocking=True),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=1,
            num_actual_tokens=end - start,
            max_query_len=end - start,
            max_seq_len=end,
            block_table_tensor=table.unsqueeze(0).to(device, non_blocking=True),
            slot_mapping=slots_on_device,
            causal=True,
            is_prefilling=torch.ones(1, dtype=torch.bool),
            positions=on_device,
        )
        return Piece(start, end, on_device, slots_on_device, common)

    def embed(self, tokens: Sequence[int]) -> Activations:
        """Token embeddings, the input of the first layer; on the first pipeline stage only."""
        with torch.inference_mode():
            return Activations(self.handle.inner.embed_input_ids(self._ids(tokens)))

    def run(
        self, piece: Piece, activations: Activations, *, layers: tuple[int, int], kv_only_top: bool = False
    ) -> Activations | None:
        """Run a piece through layers ``[lo, hi)`` of this stage, writing its keys and values; in an eager engine.

        Overwrites ``activations``, the input of layer ``lo``; layers count from this stage's first. With
        ``kv_only_top`` layer ``hi - 1`` computes keys and values only.

        Returns:
            The input of layer ``hi``; None with ``kv_only_top``.
        """
        lo, hi = layers
        full = hi - 1 if kv_only_top and can_write_alone(self._layers[hi - 1]) else hi
        hidden, residual = activations.hidden, activations.residual
        with self._context(piece):
            for layer in self._layers[lo:full]:
                hidden, residual = layer(piece.positions, hidden, residual)
            if full < hi:
                assert self.handle.family is not None, "partial layers are only run where recomputation is supported"
                write_keys_and_values(self.handle.family, self._layers[full], piece.positions, hidden, residual)
        return None if kv_only_top else Activations(hidden, residual)

    def run_whole(self, piece: Piece, tokens: Sequence[int], boundary: Activations | None = None) -> Activations | None:
        """Run a piece through the whole stage as the engine itself would, compiled or not.

        ``boundary`` is the input of a later pipeline stage's first layer; None on the first stage.

        Returns:
            What this stage hands to the next; None on the last stage.
        """
        from vllm.sequence import IntermediateTensors

        received = None
        if boundary is not None:
            received = IntermediateTensors({"hidden_states": boundary.hidden, "residual": boundary.residual})
        with self._context(piece, whole=True):
            out = self.handle.runner.model(
                input_ids=self._ids(tokens),
                positions=piece.positions,
                intermediate_tensors=received,
                inputs_embeds=None,
            )
        if not isinstance(out, IntermediateTensors):
            return None
        return Activations(out["hidden_states"], out["residual"])

    def wait(self) -> None:
        """Wait until the last call's kernels have run; does nothing on the CPU."""
        if self._running is not None:
            self._running.synchronize()
            self._running = None

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor(tokens, dtype=torch.int32).to(self.handle.device, non_blocking=True)

    @contextmanager
    def _context(self, piece: Piece, *, whole: bool = False) -> Iterator[None]:
        """VLLM's forward context for one piece, nested in whatever context is active."""
        from vllm.forward_context import get_forward_context, set_forward_context

        self.wait()  # builders may reuse pinned buffers that queued copies still read
        metadata = self._metadata(piece)
        slots = dict.fromkeys(metadata, piece.slots)
        arguments = {"num_tokens": piece.end - piece.start, "slot_mapping": slots}
        with (
            torch.inference_mode(),
            _without_adapter(self.handle.runner, piece.end - piece.start),
            set_forward_context(metadata, self.handle.vllm_config, **arguments),
        ):
            if not whole:
                # vLLM names MoE layers by counting calls from the model's bottom; None makes each give its own name.
                get_forward_context().all_moe_layers = None
            yield
        if self.handle.device.type == "cuda":
            self._running = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._running.record(torch.cuda.current_stream(self.handle.device))

    def _metadata(self, piece: Piece) -> dict[str, Any]:
        """Attention metadata by layer; kept for one piece, because a builder may reuse its buffers for the next."""
        if self._prepared is None or self._prepared[0] is not piece:
            built = {}
            for group in self._groups:
                built.update(dict.fromkeys(group.layer_names, group.build_metadata(piece.common)))
            self._prepared = piece, built
        return self._prepared[1]


def _own_groups(handle: ModelHandle) -> list[Any]:
    """Attention groups like the runner's, with metadata builders that nothing else uses."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.utils import AttentionGroup

    groups = []
    with set_current_vllm_config(handle.vllm_config):
        for theirs in handle.runner.attn_groups[0]:
            own = AttentionGroup(theirs.backend, list(theirs.layer_names), theirs.kv_cache_spec, 0)
            own.create_metadata_builders(handle.vllm_config, handle.device, _kernel_block_size(handle.runner))
            own.kernel_block_stride = theirs.kernel_block_stride
            groups.append(own)
    return groups


def _kernel_block_size(runner: Any) -> int | None:  # noqa: ANN401 -- a vLLM runner of either generation
    sizes = getattr(runner, "_kernel_block_sizes", None) or getattr(runner, "kernel_block_sizes", None)
    return int(sizes[0]) if sizes else None


@contextmanager
def _without_adapter(runner: Any, num_tokens: int) -> Iterator[None]:  # noqa: ANN401 -- a vLLM model runner
    """Have LoRA layers compute the base model for so many tokens, and afterwards what they were set to before.

    Before the engine's first batch they are set to nothing: they would index with what the memory happens to hold.
    """
    manager = getattr(runner, "lora_manager", None)
    if manager is None:
        yield
        return
    from vllm.lora.layers import LoRAMapping

    adapters = manager._adapter_manager  # noqa: SLF001 -- holds the last batch's mapping
    before = adapters._last_mapping  # noqa: SLF001
    adapters.set_adapter_mapping(LoRAMapping((0,) * num_tokens, (0,), is_prefill=True))
    try:
        yield
    finally:
        if before is not None:
            adapters.set_adapter_mapping(before)
