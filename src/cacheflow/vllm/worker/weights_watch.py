"""Notices that a worker's weights have changed since it started: announced by vLLM's own ways, or found by a sample.

vLLM lets weights be replaced in a running engine (``apply_model``, ``reload_weights``, weight transfer from a trainer),
and any user of ``collective_rpc`` can edit them. KV of other weights is wrong KV. Changes through vLLM's methods and
through the model's ``load_weights`` are announced here by wrappers (``plugin``). An edit that uses none of them is
found by comparing a few bytes of every weight, each time that chunks are saved and that a restoration ends. On CUDA
they are compared on a stream of their own, as they were before the step's forward, which the host does not wait for.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from cacheflow.tensors.streams import DeviceStreams, StreamEvent, streams_of
from cacheflow.vllm.step import WeightsChange

SAMPLE_BYTES = 64
"""Bytes compared of each weight, evenly spaced. An optimizer's step, a merge or a scaling changes nearly all of a
matrix, so that a few bytes of all weights hardly miss it; an edit of single rows may be missed."""

_watches: weakref.WeakKeyDictionary[Any, WeightsWatch] = weakref.WeakKeyDictionary()
"""By vLLM's model runner."""


class WeightsWatch:
    """One worker's weights. Worker's main thread alone.

    Attributes:
        change: The last change; None while there was none.
    """

    def __init__(self, model: torch.nn.Module, streams: DeviceStreams | None = None) -> None:
        """Remember a sample of every weight; later calls of the model's ``load_weights`` announce a change.

        ``streams`` are the device's; None: those of the weights' device, where it has any.
        """
        self._model = model
        self.change: WeightsChange | None = None
        self._before_forward: StreamEvent | None = None
        load_weights = getattr(model, "load_weights", None)
        if load_weights is not None:
            model.load_weights = self._announcing(load_weights)  # type: ignore[assignment]
        self._take_sample()
        self._streams = streams or next(filter(None, map(streams_of, self._views)), None)
        self._beside = None if self._streams is None else self._streams.new_stream()

    @property
    def version(self) -> int:
        """How often the weights have changed."""
        return 0 if self.change is None else self.change.version

    def announce(self, how: str) -> None:
        """Note that the weights are other ones from now on; also where an attempt to change them failed half-way."""
        self.change = WeightsChange(version=self.version + 1, how=how, announced=True)
        self._take_sample()

    def accept(self) -> None:
        """Take the weights as they are for the known ones: nothing that was computed with others counts any more."""
        self._take_sample()

    def begin_step(self) -> None:
        """Call before every forward: what changed weights was asked before it."""
        if self._streams is not None:
            self._before_forward = self._streams.current().record()

    def check(self) -> None:
        """Compare the sample: a difference is a change that nobody announced. 0.4 ms for 273 weights (CPU)."""
        how = self._difference()
        if how:
            self.change = WeightsChange(version=self.version + 1, how=how, announced=False)
            self._take_sample()

    def _announcing(self, load_weights: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load_weights)
        def announcing(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- whatever the model takes and returns
            try:
                return load_weights(*args, **kwargs)
            finally:
                self.announce("load_weights")

        return announcing

    def _take_sample(self) -> None:
        """Where each weight lies, views of its sampled bytes by device, and these bytes."""
        self._before_forward = None  # of a comparison in this step, which must see the sample made first
        self._places = [
            (module._parameters, name, weight, weight.data_ptr())  # noqa: SLF001 -- a replaced parameter must show
            for module in self._model.modules()
            for name, weight in module._parameters.items()  # noqa: SLF001
            if weight is not None and weight.numel() and weight.device.type != "meta"
        ]
        self._views: dict[torch.device, list[torch.Tensor]] = {}
        for _, _, weight, _ in self._places:
            self._views.setdefault(weight.device, []).append(_sampled(weight.detach()))
        self._sample = {device: torch.cat(views) for device, views in self._views.items()}

    def _difference(self) -> str:
        """What differs from the sample; empty when nothing does."""
        for parameters, name, weight, address in self._places:
            if parameters.get(name) is not weight or weight.data_ptr() != address:
                return f"the weight {name} was replaced"
        for device in self._differing_devices():
            return f"weights on {device} differ from those that were loaded"
        return ""

    def _differing_devices(self) -> list[torch.device]:
        """Where the sample differs; on CUDA the host waits for what came before the step's forward, not for that."""
        found: list[torch.device] = []

        def compare() -> None:
            views_of = self._views.items()
            found.extend(each for each, views in views_of if not torch.equal(torch.cat(views), self._sample[each]))

        if self._streams is None or self._beside is None:
            compare()
        else:
            self._beside.wait_for(self._before_forward or self._streams.current().record())
            self._beside.launch(compare)
            self._beside.record().wait()
        return found


def watch_weights(runner: Any) -> WeightsWatch:  # noqa: ANN401 -- a vLLM model runner
    """The watch over a runner's model; the same one every time."""
    watch = _watches.get(runner)
    if watch is None:
        watch = _watches[runner] = WeightsWatch(runner.get_model())
    return watch


def announce_change(runner: Any, how: str) -> None:  # noqa: ANN401 -- a vLLM model runner
    """Note that a runner's weights were changed by one of vLLM's ways; nothing where nobody watches them."""
    watch = _watches.get(runner)
    if watch is not None:
        watch.announce(how)


def _sampled(weight: torch.Tensor) -> torch.Tensor:
    """A view of at most ``SAMPLE_BYTES`` bytes of a weight, however it is strided; ``[n]`` uint8."""
    storage = weight.untyped_storage()
    first = weight.storage_offset() * weight.element_size()
    strides = zip(weight.shape, weight.stride(), strict=True)
    num_bytes = (1 + sum((size - 1) * stride for size, stride in strides)) * weight.element_size()
    everything = torch.empty(0, dtype=torch.uint8, device=weight.device).set_(storage, 0, (storage.nbytes(),), (1,))
    count = min(SAMPLE_BYTES, num_bytes)
    step = max(1, (num_bytes - 1) // count)
    step -= step % 2 == 0 and step > 1  # odd: high and low bytes of the numbers in turn
    return torch.as_strided(everything, (count,), (step,), first)
