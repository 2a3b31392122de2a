"""The preallocated KV buffer of one sequence, and the cache object the decoder layers write into.

Shapes: ``L`` layers, ``T`` capacity in tokens, ``H`` kv heads, ``D`` head_dim, ``n`` tokens of a chunk; index 0 of the
axis of size 2 is keys (after rotary embedding), 1 is values.

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

from cacheflow.errors import ConfigError
from cacheflow.types import ModelShape

_ALIGN_TOKENS = 64
_RAW_DTYPE = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16, torch.float16: torch.uint16}


class KVBuffer:
    """Keys and values of one sequence in all layers, ``kv_L2THD``; slots beyond what was written hold NaN.

    Threads: one thread may compute while another copies loaded cells in, as long as they touch different cells.
    """

    def __init__(self, shape: ModelShape, *, capacity: int, dtype: torch.dtype, device: str | torch.device) -> None:
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
        self.kv_L2THD = torch.empty(
            (shape.num_layers, 2, room, shape.num_kv_heads, shape.head_dim), dtype=dtype, device=device
        )[:, :, :capacity]
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
        self.kv_L2THD.fill_(float("nan"))
        if self.device.type == "cuda":  # a copy stream would not wait for the fill
            torch.cuda.current_stream(self.device).synchronize()

    def cell(self, layer_lo: int, layer_hi: int, token_lo: int, token_hi: int) -> torch.Tensor:
        """View ``[layers, 2, n, H, D]`` of a cell; contiguous in its last three axes."""
        return self.kv_L2THD[layer_lo:layer_hi, :, token_lo:token_hi]

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
        return self._raw[layer_lo:layer_hi, :, token_lo:token_hi]

    def write_payload(self, payload: npt.NDArray[np.uint8], cell: tuple[int, int, int, int]) -> None:
        """Copy a payload (bytes of ``[layers, 2, n, H, D]``) into ``(layer_lo, layer_hi, token_lo, token_hi)``; CPU."""
        target = self.raw_cell(*cell)
        np.copyto(target, payload.view(target.dtype).reshape(target.shape))


class KeysAndValuesWritten(Exception):
    """Leaves a decoder layer right after it wrote keys and values; never escapes the runner."""


class ChunkCache:
    """What a decoder layer takes for its cache while one chunk runs: writes into the buffer, returns views.

    Duck-typed to transformers' ``Cache.update``; one per chunk and call sequence, not thread-safe.
    """

    __slots__ = ("_hi", "_kv", "_lo", "stop_layer")

    def __init__(self, kv: KVBuffer, token_lo: int, token_hi: int) -> None:
        """Cover tokens ``[token_lo, token_hi)`` of the buffer."""
        self._kv, self._lo, self._hi = kv.kv_L2THD, token_lo, token_hi
        self.stop_layer: int | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``key, value [1, H, n, D]`` and return views ``[1, H, T, D]`` of all tokens up to here.

        Raises:
            KeysAndValuesWritten: This is the layer to leave (``stop_layer``).
        """
        kv_2THD = self._kv[layer_idx]
        kv_2THD[0, self._lo : self._hi].copy_(key[0].transpose(0, 1))
        kv_2THD[1, self._lo : self._hi].copy_(value[0].transpose(0, 1))
        if layer_idx == self.stop_layer:
            raise KeysAndValuesWritten
        keys, values = kv_2THD[:, : self._hi].transpose(1, 2).unsqueeze(1).unbind(0)
        return keys, values
