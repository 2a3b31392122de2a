"""The running states of a sequence's recurrent layers, all at one position.

A Gated DeltaNet layer keeps the last inputs of its convolution, and one matrix a value head. Shapes: ``R`` recurrent
layers, ``C`` channels of the convolution, ``W`` inputs that it looks back on, ``H`` value heads, ``K`` width of a key,
``V`` of a value.

Payload of some layers, bottom first: of each the bytes of its ``conv_CW``, then of its ``delta_HKV``, in C order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.hybrid_shape import HybridShape

Raw = npt.NDArray[np.uint8]


class RunningStates:
    """States of every recurrent layer, NaN until they are written; in host memory.

    Threads: one may compute while another copies loaded states in, as long as they touch different layers.

    Attributes:
        conv_RCW: Last inputs of each layer's convolution, oldest first, in the model's dtype.
        delta_RHKV: The recurrence's state in the state's dtype.
    """

    def __init__(self, shape: HybridShape, *, dtype: torch.dtype) -> None:
        """Allocate the states of every recurrent layer of a model, poisoned."""
        self._shape = shape
        self._layers = [layer for layer in range(shape.num_layers) if shape.is_recurrent(layer)]
        self._index = {layer: index for index, layer in enumerate(self._layers)}
        num, heads = len(self._layers), (shape.num_state_v_heads, shape.state_k_dim, shape.state_v_dim)
        self.conv_RCW = torch.empty((num, shape.conv_channels, shape.conv_kernel - 1), dtype=dtype)
        self.delta_RHKV = torch.empty((num, *heads), dtype=getattr(torch, shape.state_dtype))
        self.poison()

    def poison(self) -> None:
        """Evict them: a state nobody restored shows in every output."""
        self.conv_RCW.fill_(float("nan"))
        self.delta_RHKV.fill_(float("nan"))

    def conv(self, layer: int) -> torch.Tensor:
        """View ``[C, W]`` of a recurrent layer."""
        return self.conv_RCW[self._index[layer]]

    def delta(self, layer: int) -> torch.Tensor:
        """View ``[H, K, V]`` of a recurrent layer."""
        return self.delta_RHKV[self._index[layer]]

    def copy_from(self, other: RunningStates, layers: tuple[int, int] | None = None) -> None:
        """Take the states of layers ``[lo, hi)`` of another, of all of them for None."""
        part = slice(None) if layers is None else self._part(layers)
        self.conv_RCW[part].copy_(other.conv_RCW[part])
        self.delta_RHKV[part].copy_(other.delta_RHKV[part])

    def clone(self) -> RunningStates:
        """The same states, in memory of their own."""
        copied = RunningStates(self._shape, dtype=self.conv_RCW.dtype)
        copied.copy_from(self)
        return copied

    def equals(self, other: RunningStates) -> bool:
        """Whether every bit is the same."""
        return torch.equal(self.conv_RCW, other.conv_RCW) and torch.equal(self.delta_RHKV, other.delta_RHKV)

    def payload(self, layers: tuple[int, int]) -> Raw:
        """A private copy of the states of layers ``[lo, hi)`` as bytes."""
        found = [part for layer in self._layers_in(layers) for part in self._raw(layer)]
        return np.concatenate(found)

    def write_payload(self, payload: Raw, layers: tuple[int, int]) -> None:
        """Copy the payload of layers ``[lo, hi)`` in; numpy's copy, see ``KVBuffer.raw_cell``."""
        start = 0
        for layer in self._layers_in(layers):
            for part in self._raw(layer):
                np.copyto(part, payload[start : start + part.size])
                start += part.size

    def _layers_in(self, layers: tuple[int, int]) -> list[int]:
        return self._layers[self._part(layers)]

    def _part(self, layers: tuple[int, int]) -> slice:
        lo, hi = (sum(self._shape.is_recurrent(below) for below in range(each)) for each in layers)
        return slice(lo, hi)

    def _raw(self, layer: int) -> tuple[Raw, Raw]:
        conv, delta = self.conv(layer), self.delta(layer)
        return conv.view(-1).view(torch.uint8).numpy(), delta.view(-1).view(torch.uint8).numpy()
