"""Streams, events and pinned memory: all that is asked of a device that works while the host goes on.

What the device is asked in one stream it does in sequence; two streams meet at events alone. Tests have a device of
their own behind ``DeviceStreams``, which needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

_PORTABLE = 1
"""``cudaHostRegisterPortable``: page-locked for every device."""


class StreamEvent(Protocol):
    """A place in what a stream was asked; it has passed once the device has done all before it."""

    def done(self) -> bool:
        """Whether it has passed; does not wait."""
        ...

    def wait(self) -> None:
        """Have the calling thread wait for it."""
        ...

    def seconds_after(self, earlier: Any) -> float:  # noqa: ANN401 -- another of its kind
        """Device seconds between two events that have passed and were recorded with ``timed``."""
        ...


class DeviceStream(Protocol):
    """One queue of the device; every method returns at once."""

    def copy(self, *copies: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Copy into the first of each pair what is in the second; both live until that has been done.

        One of them is pinned, or both are on the device.
        """
        ...

    def launch(self, work: Callable[[], object]) -> None:
        """Do what ``work`` asks of the device; tensors that it makes and drops are this stream's to use again."""
        ...

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """A copy on the device of a tensor of the host's, which may change at once; for this stream alone."""
        ...

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Memory on the device, uint8, that is this stream's to use again once the tensor is dropped."""
        ...

    def record(self, *, timed: bool = False) -> StreamEvent:
        """An event after all that the stream was asked so far."""
        ...

    def wait_for(self, event: StreamEvent) -> None:
        """Do what is asked from now on only once an event of another stream has passed."""
        ...


class DeviceStreams(Protocol):
    """A device's streams and the host memory that they copy from and to."""

    def current(self) -> DeviceStream:
        """The stream in which the calling thread computes."""
        ...

    def new_stream(self) -> DeviceStream:
        """Another one."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Page-locked host memory, uint8; slow to get."""
        ...

    def pin(self, memory: torch.Tensor) -> bool:
        """Page-lock host memory that is there, such as a mapped file, until ``unpin``; whether it could be. Slow."""
        ...

    def unpin(self, memory: torch.Tensor) -> None:
        """End that; no copy from it may be under way."""
        ...

    def share(self, tensor: torch.Tensor, stream: DeviceStream) -> None:
        """Give a tensor's memory to nobody else before ``stream`` has done what it was asked by then."""
        ...


class CudaEvent:
    """``StreamEvent`` of CUDA."""

    __slots__ = ("_device", "_event")

    def __init__(self, stream: torch.cuda.Stream, *, timed: bool) -> None:
        """Record it."""
        self._device = stream.device
        self._event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def done(self) -> bool:
        """See ``StreamEvent.done``."""
        # A store's thread asks too, whose current device, the first, might otherwise get a context of this process.
        with torch.cuda.device(self._device):
            return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """See ``StreamEvent.wait``; other threads of Python run meanwhile."""
        self._event.synchronize()

    def seconds_after(self, earlier: CudaEvent) -> float:
        """See ``StreamEvent.seconds_after``."""
        return float(earlier._event.elapsed_time(self._event)) / 1e3

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Have a stream wait for it."""
        stream.wait_event(self._event)


class CudaStream:
    """``DeviceStream`` of CUDA."""

    __slots__ = ("stream",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """Ask this stream."""
        self.stream = stream

    def copy(self, *copies: tuple[torch.Tensor, torch.Tensor]) -> None:
        """See ``DeviceStream.copy``."""
        # In inference mode whatever the caller's: memory made in it can be written in it alone.
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)

    def launch(self, work: Callable[[], object]) -> None:
        """See ``DeviceStream.launch``."""
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            work()

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """See ``DeviceStream.send``; torch keeps the pinned copy until the device has read it."""
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            return values.pin_memory().to(self.stream.device, non_blocking=True)

    def memory(self, num_bytes: int) -> torch.Tensor:
        """See ``DeviceStream.memory``."""
        with torch.inference_mode(False), torch.cuda.stream(self.stream):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.stream.device)

    def record(self, *, timed: bool = False) -> CudaEvent:
        """See ``DeviceStream.record``."""
        return CudaEvent(self.stream, timed=timed)

    def wait_for(self, event: StreamEvent) -> None:
        """See ``DeviceStream.wait_for``."""
        assert isinstance(event, CudaEvent), "events of one device"
        event.hold(self.stream)


class CudaStreams:
    """``DeviceStreams`` of one CUDA device; never synchronises the device."""

    def __init__(self, device: torch.device) -> None:
        """Create nothing yet."""
        self._device = device

    def current(self) -> CudaStream:
        """See ``DeviceStreams.current``."""
        return CudaStream(torch.cuda.current_stream(self._device))

    def new_stream(self) -> CudaStream:
        """See ``DeviceStreams.new_stream``."""
        return CudaStream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """See ``DeviceStreams.pinned``."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def pin(self, memory: torch.Tensor) -> bool:
        """See ``DeviceStreams.pin``."""
        with torch.cuda.device(self._device):
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            status = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)
        return int(status) == 0

    def unpin(self, memory: torch.Tensor) -> None:
        """See ``DeviceStreams.unpin``."""
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]

    def share(self, tensor: torch.Tensor, stream: DeviceStream) -> None:
        """See ``DeviceStreams.share``."""
        assert isinstance(stream, CudaStream), "a stream of this device"
        tensor.record_stream(stream.stream)


def streams_of(device: torch.device) -> CudaStreams | None:
    """The streams of a device; None for the CPU, whose calls return when their work is done."""
    return CudaStreams(device) if device.type == "cuda" else None
