"""A device without one: streams, events and pinned memory whose work is done late, in a sequence that a test chooses.

Behind the seam of ``tensors.streams``. What a stream is asked is kept and done later, one piece at a time: whenever the
host turns to the device, the test's ``choose`` says which stream goes on, or that none does. Whatever holds for every
choice holds for a real device, which makes one of them. Tensors are real ones in host memory, so a copy or a launch
that comes too early or too late shows in the bits. A copy and a launch take a second of their stream each.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from cacheflow.engine.kv_buffer import ChunkCache
from cacheflow.engine.runner import LayerRunner, Rope

NONE_GOES_ON = -1
"""A choice: the device does nothing until it is asked again."""


def _move(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.inference_mode():
        target.copy_(source)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.passed, self.at_s = device, False, 0.0

    def done(self) -> bool:
        with self.device.lock:
            self.device.work_some()
            return self.passed

    def wait(self) -> None:
        with self.device.lock:
            self.device.host_waits += 1
            self.device.waits_by_thread[threading.current_thread().name] += 1
            while not self.passed:
                assert self.device.step(), "the host waits for what no stream will ever do"

    def seconds_after(self, earlier: FakeEvent) -> float:
        assert self.passed
        assert earlier.passed
        return self.at_s - earlier.at_s


class FakeStream:
    def __init__(self, device: FakeDevice, name: str) -> None:
        self.device, self.name = device, name
        self.queue: deque[tuple[str, object]] = deque()
        self.now_s = 0.0

    def copy(self, *copies: tuple[torch.Tensor, torch.Tensor]) -> None:
        for target, source in copies:
            self._ask("copy", partial(_move, target, source))

    def launch(self, work: Callable[[], None]) -> None:
        self._ask("launch", work)

    def send(self, values: torch.Tensor) -> torch.Tensor:
        kept, sent = values.clone(), torch.full_like(values, 1 << 6)
        self._ask("send", partial(_move, sent, kept))
        return sent

    def memory(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 0x7F, dtype=torch.uint8)

    def record(self, *, timed: bool = False) -> FakeEvent:
        event = FakeEvent(self.device)
        self._ask("record", event)
        return event

    def wait_for(self, event: FakeEvent) -> None:
        self._ask("wait_for", event)

    def num_queued(self, kind: str) -> int:
        return sum(each == kind for each, _ in self.queue)

    def _ask(self, kind: str, what: object) -> None:
        with self.device.lock:
            self.device.asked[self.name, kind] += 1
            self.device.log.append((self.name, kind))
            self.queue.append((kind, what))
            self.device.on_ask()
            self.device.work_some()

    @property
    def can_go_on(self) -> bool:
        if not self.queue:
            return False
        kind, what = self.queue[0]
        return kind != "wait_for" or what.passed

    def go_on(self) -> None:
        kind, what = self.queue.popleft()
        if kind in ("copy", "launch", "send"):
            self.now_s += kind != "send"
            what()
        elif kind == "record":
            what.passed, what.at_s = True, self.now_s


class FakeDevice:
    """``DeviceStreams``; ``choose`` is given the number of streams that can go on and names one, or ``NONE_GOES_ON``.

    Attributes:
        asked: What each stream was asked, by stream and kind.
        host_waits: How often the host waited for the device.
        waits_by_thread: The same, by the thread's name.
        pinned_bytes: Sizes of the pinned allocations.
        registered: Addresses of memory that was pinned where it was.
        shared: How many tensors were shared with a stream.
        on_ask: Called after each thing that a stream is asked.
    """

    def __init__(self, choose: Callable[[int], int], *, favours: int = 0) -> None:
        """``favours`` is the stream, of those that can go on, that does when one must and none was named."""
        self.choose, self.favours = choose, favours
        self.lock = threading.RLock()
        self.asked: Counter[tuple[str, str]] = Counter()
        self.log: list[tuple[str, str]] = []
        self.host_waits = 0
        self.waits_by_thread: Counter[str] = Counter()
        self.pinned_bytes: list[int] = []
        self.registered: set[int] = set()
        self.shared = 0
        self.on_ask: Callable[[], None] = lambda: None
        self.compute = FakeStream(self, "compute")
        self.streams = [self.compute]

    def current(self) -> FakeStream:
        return self.compute

    def new_stream(self) -> FakeStream:
        """Named in the order in which a lane makes them."""
        names = ("up", "down")
        self.streams.append(FakeStream(self, names[(len(self.streams) - 1) % len(names)]))
        return self.streams[-1]

    def pinned(self, num_bytes: int) -> torch.Tensor:
        self.pinned_bytes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def pin(self, memory: torch.Tensor) -> bool:
        assert memory.data_ptr() not in self.registered
        self.registered.add(memory.data_ptr())
        return True

    def unpin(self, memory: torch.Tensor) -> None:
        self.registered.remove(memory.data_ptr())

    def share(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        self.shared += 1

    @property
    def ready(self) -> Sequence[FakeStream]:
        return [stream for stream in self.streams if stream.can_go_on]

    def work_some(self) -> None:
        """As many pieces as the test chooses."""
        while (ready := self.ready) and (choice := self.choose(len(ready))) != NONE_GOES_ON:
            ready[choice].go_on()

    def step(self) -> bool:
        """One piece, of whichever stream; False when there is none."""
        ready = self.ready
        if ready:
            choice = self.choose(len(ready))
            ready[self.favours if choice == NONE_GOES_ON else choice].go_on()
        return bool(ready)

    def finish(self) -> None:
        """Everything."""
        with self.lock:
            while self.step():
                pass


class PromptStream(FakeStream):
    """Does what it is asked before the call returns, once the streams that it waits for have; on the wall clock."""

    @property
    def now_s(self) -> float:
        return time.perf_counter()

    @now_s.setter
    def now_s(self, now_s: float) -> None:
        pass

    def _ask(self, kind: str, what: object) -> None:
        super()._ask(kind, what)
        with self.device.lock:
            while self.queue:
                assert self.device.step(), "the compute stream waits for what no other will ever do"


class PromptDevice(FakeDevice):
    """Computes at once, as a model on the CPU does; its other streams are as late as the test chooses."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        super().__init__(choose)
        self.compute = PromptStream(self, "compute")
        self.streams = [self.compute]


class Later:
    """What a launch will have computed."""

    def __init__(self, value: torch.Tensor | None = None) -> None:
        self.value = value


class LateRunner(LayerRunner):
    """The real layers, launched on a ``FakeDevice``: a call returns before its work is done."""

    def __init__(self, model, device: FakeDevice) -> None:
        super().__init__(model, streams=device)
        self.device = device

    def embed(self, tokens_1n: torch.Tensor) -> Later:
        return Later(super().embed(tokens_1n))

    def run(
        self, hidden: Later, cache: ChunkCache, rope: Rope, *, layers: tuple[int, int], kv_only_top: bool = False
    ) -> Later | None:
        out, real = Later(), super().run

        def work() -> None:
            assert hidden.value is not None, "activations are used before they were computed"
            out.value = real(hidden.value, cache, rope, layers=layers, kv_only_top=kv_only_top)

        self.device.compute.launch(work)
        return None if kv_only_top else out

    def logits(self, hidden: Later) -> torch.Tensor:
        self.device.compute.record().wait()
        return super().logits(hidden.value)
