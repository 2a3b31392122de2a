"""Streams of a device that does everything at once: a rehearsal on the CPU takes the same way through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cacheflow.tensors.streams import DeviceStream, StreamEvent


class HostEvent:
    """``StreamEvent`` that has passed when it is recorded."""

    __slots__ = ("at_s",)

    def __init__(self) -> None:
        """Note the time."""
        self.at_s = time.perf_counter()

    def done(self) -> bool:
        """See ``StreamEvent.done``."""
        return True

    def wait(self) -> None:
        """See ``StreamEvent.wait``."""

    def seconds_after(self, earlier: HostEvent) -> float:
        """See ``StreamEvent.seconds_after``."""
        return self.at_s - earlier.at_s


class HostStream:
    """``DeviceStream`` whose work is done when a call returns."""

    def copy(self, *copies: tuple[torch.Tensor, torch.Tensor]) -> None:
        """See ``DeviceStream.copy``."""
        with torch.inference_mode():
            for target, source in copies:
                target.copy_(source)

    def launch(self, work: Callable[[], object]) -> None:
        """See ``DeviceStream.launch``."""
        with torch.inference_mode():
            work()

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """See ``DeviceStream.send``."""
        return values.clone()

    def memory(self, num_bytes: int) -> torch.Tensor:
        """See ``DeviceStream.memory``."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def record(self, *, timed: bool = False) -> HostEvent:
        """See ``DeviceStream.record``."""
        del timed
        return HostEvent()

    def wait_for(self, event: StreamEvent) -> None:
        """See ``DeviceStream.wait_for``."""
        assert event.done(), "everything was done at once"


class HostStreams:
    """``DeviceStreams`` of the CPU; its memory is not pinned."""

    def current(self) -> HostStream:
        """See ``DeviceStreams.current``."""
        return HostStream()

    def new_stream(self) -> HostStream:
        """See ``DeviceStreams.new_stream``."""
        return HostStream()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """See ``DeviceStreams.pinned``."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def pin(self, memory: torch.Tensor) -> bool:
        """See ``DeviceStreams.pin``; nothing has to be."""
        del memory
        return True

    def unpin(self, memory: torch.Tensor) -> None:
        """See ``DeviceStreams.unpin``."""
        del memory

    def share(self, tensor: torch.Tensor, stream: DeviceStream) -> None:
        """See ``DeviceStreams.share``."""
        del tensor, stream
