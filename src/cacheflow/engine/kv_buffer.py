"""The preallocated KV buffer of one sequence, and the cache object the decoder layers write into.

Shapes: ``L`` attention layers, ``T`` capacity in tokens, ``H`` kv heads, ``D`` head_dim, ``n`` tokens of a chunk; index
0 of the axis of size 2 is keys (after rotary embedding), 1 is values. ``C``, ``W``, ``H``, ``K``, ``V`` of running
states are those of ``running_states``.

Layout ``kv_L2THD``, token-major: keys of a (chunk, layer) are one contiguous run and so are its values, so a read lands
in place with two copies a layer and a CUDA flash kernel gets its native layout. Measured against head-major
``[L, 2, H, T, D]`` on two EPYC cores, attention of 512 queries over 4,096 keys, best of 15, token-major / head-major:
SmolLM2 heads (9/3 x 64) bf16 33.7 / 33.3 ms, fp32 34.1 / 33.4 ms, under the 3 % at which we would have turned it;
heads of Llama-3.1-8B (32/8 x 128) bf16 224 / 200 ms, fp32 232 / 217 ms: 7 to 12 % dearer, on a model nobody serves on
two cores. Gathering into a contiguous copy first won only there (bf16) and lost elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.engine.running_states import RunningStates
from cacheflow.errors import ConfigError
from cacheflow.hybrid_shape import HybridShape
from cacheflow.model_shape import ModelShape
from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.tensors.streams import StreamEvent

_ALIGN_TOKENS = 64
_RAW_DTYPE = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16, torch.float16: torch.uint16}


class KVBuffer:
    """Keys and values of one sequence in all attention layers, ``kv_L2THD``; slots beyond what was written hold NaN.

    Threads: one thread may compute while another copies loaded cells in, as long as they touch different cells.

    Attributes:
        checkpoint: Running states of the recurrent layers where the restored or prefilled tokens end; None without
            such layers.
        lane: Copies cells in and out while the device computes; None in host memory, where a call copies.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        capacity: int,
        dtype: torch.dtype,
        device: str | torch.device,
        lane: CopyLane | None = None,
    ) -> None:
        """Allocate ``capacity`` tokens, poisoned.

        Raises:
            ConfigError: ``capacity`` is below 1 or the dtype has no raw view.
        """
        if capacity < 1 or dtype not in _RAW_DTYPE:
            raise ConfigError(f"KV buffer: capacity {capacity} must be at least 1, dtype {dtype} in {list(_RAW_DTYPE)}")
        self.capacity = capacity
        # Whole multiples of 64 tokens a layer, so that every layer starts on a cache line whatever the capacity:
        # kernels may round differently with the alignment.
        room = -(-capacity // _ALIGN_TOKENS) * _ALIGN_TOKENS
        self._row_layers = shape.row_layers
        self.lane = lane
        # Whatever mode the caller is in: memory made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.kv_L2THD = torch.empty(
                (shape.num_rows, 2, room, shape.num_kv_heads, shape.head_dim), dtype=dtype, device=device
            )[:, :, :capacity]
            self.checkpoint = RunningStates(shape, dtype=dtype) if isinstance(shape, HybridShape) else None
        if lane is not None:
            lane.adopt(self.kv_L2THD)
        on_cpu = self.kv_L2THD.device.type == "cpu"
        self._raw: npt.NDArray[Any] | None = self.kv_L2THD.view(_RAW_DTYPE[dtype]).numpy() if on_cpu else None
        self.poison()

    @property
    def dtype(self) -> torch.dtype:
        """Element type of keys and values."""
        return self.kv_L2THD.dtype

    @property
    def device(self) -> torch.device:
        """Where the buffer lives."""
        return self.kv_L2THD.device

    def poison(self) -> None:
        """Evict everything: fill with NaN, so that a cell nobody restored shows in every output."""
        if self.lane is not None:
            self.lane.before_compute()
            self.lane.wait_downloads()
        self.kv_L2THD.fill_(float("nan"))
        if self.checkpoint is not None:
            self.checkpoint.poison()
        if self.lane is not None:
            self.lane.after_compute()

    def copy_from(self, other: KVBuffer, num_tokens: int) -> None:
        """Take keys and values of the first tokens of another buffer, and its checkpoint."""
        if other.lane is not None:
            other.lane.before_compute()
        self.kv_L2THD[:, :, :num_tokens].copy_(other.kv_L2THD[:, :, :num_tokens])
        if self.checkpoint is not None and other.checkpoint is not None:
            self.checkpoint.copy_from(other.checkpoint)

    def of_layer(self, layer: int) -> torch.Tensor:
        """View ``[2, T, H, D]`` of an attention layer."""
        return self.kv_L2THD[layer // self._row_layers]

    def cell(self, layer_lo: int, layer_hi: int, token_lo: int, token_hi: int) -> torch.Tensor:
        """View ``[attention layers, 2, n, H, D]`` of a cell; contiguous in its last three axes."""
        return self.kv_L2THD[self._attention(layer_lo, layer_hi), :, token_lo:token_hi]

    def raw_cell(self, layer_lo: int, layer_hi: int, token_lo: int, token_hi: int) -> npt.NDArray[Any]:
        """The same cell as a numpy view of unsigned integers (2-byte types as uint16); CPU only.

        numpy copies on the calling thread; torch's ``copy_`` fans out over threads that compete with those that
        compute. A loader thread placing 0.2 GB/s beside SmolLM2 on two cores slowed it by x1.02 with numpy and x1.14
        with torch (best of 4), at 2 GB/s by x1.54 and x1.56.

        Raises:
            ConfigError: The buffer is not in host memory.
        """
        if self._raw is None:
            raise ConfigError(f"raw views need a buffer on the CPU, this one is on {self.device}")
        return self._raw[self._attention(layer_lo, layer_hi), :, token_lo:token_hi]

    def _attention(self, layer_lo: int, layer_hi: int) -> slice:
        """Which attention layers lie in ``[layer_lo, layer_hi)``: the top one of each row."""
        return slice(layer_lo // self._row_layers, layer_hi // self._row_layers)

    def write_payload(self, payload: torch.Tensor, cell: tuple[int, int, int, int]) -> StreamEvent | None:
        """Copy keys and values to where a ``CellGeometry.extent`` says.

        Args:
            payload: Bytes of ``[layers, 2, n, H, D]``, uint8; pinned where there is a lane.
            cell: The extent.

        Returns:
            The event after which the payload may be written again; None where the copy is done already.
        """
        if self.lane is not None:
            return self.lane.upload(payload, self.cell(*cell))
        target = self.raw_cell(*cell)
        np.copyto(target, payload.numpy().view(target.dtype).reshape(target.shape))
        return None


class KeysAndValuesWritten(Exception):
    """Leaves a decoder layer right after it wrote keys and values; never escapes the runner."""


class ChunkCache:
    """What a decoder layer takes for its cache while one chunk runs: writes into the buffer, returns views.

    Duck-typed to transformers' ``Cache``; one per chunk and call sequence, not thread-safe.
    """

    __slots__ = ("_hi", "_kv", "_lo", "_states", "stop_layer")

    def __init__(self, kv: KVBuffer, token_lo: int, token_hi: int, states: RunningStates | None = None) -> None:
        """Cover tokens ``[token_lo, token_hi)`` of the buffer.

        Args:
            kv: Where keys and values are.
            token_lo: First token.
            token_hi: One past the last.
            states: Of recurrent layers at ``token_lo``, at ``token_hi`` once a layer has run; what they hold does not
                matter at token 0. None for a model without such layers.
        """
        self._kv, self._lo, self._hi, self._states = kv, token_lo, token_hi, states
        self.stop_layer: int | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``key, value [1, H, n, D]`` and return views ``[1, H, T, D]`` of all tokens up to here.

        Raises:
            KeysAndValuesWritten: This is the layer to leave (``stop_layer``).
        """
        kv_2THD = self._kv.of_layer(layer_idx)
        kv_2THD[0, self._lo : self._hi].copy_(key[0].transpose(0, 1))
        kv_2THD[1, self._lo : self._hi].copy_(value[0].transpose(0, 1))
        if layer_idx == self.stop_layer:
            raise KeysAndValuesWritten
        keys, values = kv_2THD[:, : self._hi].transpose(1, 2).unsqueeze(1).unbind(0)
        return keys, values

    # What a recurrent layer asks for and gives back.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The last inputs of a layer's convolution, ``[1, C, W]``, to be changed in place; None at the first token."""
        return None if self._lo == 0 else self._running.conv(layer_idx).unsqueeze(0)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A layer's state ``[1, H, K, V]``; None at the first token."""
        return None if self._lo == 0 else self._running.delta(layer_idx).unsqueeze(0)

    def update_conv_state(self, inputs: torch.Tensor, layer_idx: int, **_: object) -> torch.Tensor:
        """Keep the last of a chunk's inputs ``[1, C, n]``; returns them with those before them in front."""
        before, kept = self.get_conv_state(layer_idx), self._running.conv(layer_idx)
        whole = inputs if before is None else torch.cat([before, inputs], dim=-1)
        missing = max(0, kept.shape[-1] - whole.shape[-1])
        kept[:, :missing] = 0
        kept[:, missing:].copy_(whole[0, :, whole.shape[-1] - kept.shape[-1] + missing :])
        return whole

    def update_recurrent_state(self, state: torch.Tensor, layer_idx: int, **_: object) -> torch.Tensor:
        """Keep a layer's state ``[1, H, K, V]``."""
        self._running.delta(layer_idx).copy_(state[0])
        return state

    def is_recording_past(self, layer_idx: int) -> bool:
        """Never: no state is taken back."""
        return False

    # The same as transformers before 5.21 asks for it: off the layers of the cache.

    def has_previous_state(self, layer_idx: int, state_idx: int = 0) -> bool:
        """Whether a layer has a state: not at the first token."""
        return self._lo > 0

    @property
    def layers(self) -> LayerStates:
        """What the layers keep, by index."""
        return LayerStates(self)

    @property
    def _running(self) -> RunningStates:
        assert self._states is not None, "a chunk of a model with recurrent layers runs with their states"
        return self._states


class LayerStates:
    """The states of one layer, once indexed by it, of a chunk; duck-typed to the layers of transformers' ``Cache``.

    Attributes:
        record_past: Never: no state is taken back.
    """

    record_past = False

    def __init__(self, cache: ChunkCache, layer_idx: int = 0) -> None:
        """Look at a chunk's cache."""
        self._cache, self._layer_idx = cache, layer_idx

    def __getitem__(self, layer_idx: int) -> LayerStates:
        """The states of a layer."""
        return LayerStates(self._cache, layer_idx)

    @property
    def conv_states(self) -> tuple[torch.Tensor | None]:
        """The last inputs of its convolution, ``[1, C, W]``."""
        return (self._cache.get_conv_state(self._layer_idx),)

    @property
    def recurrent_states(self) -> tuple[torch.Tensor | None]:
        """Its state ``[1, H, K, V]``."""
        return (self._cache.get_recurrent_state(self._layer_idx),)
