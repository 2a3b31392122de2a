"""Measures what a model costs on this machine: a chunk at an offset, its keys and values alone, the head.

Keys and values in the buffer are finite random numbers, because denormals and NaN would cost other times. Measurements
of different points are interleaved round by round, so that a slow spell of a shared machine spreads over all of them;
each point's value is its median. ``survey`` does so within a time limit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from cacheflow.engine.kv_buffer import ChunkCache, KVBuffer
from cacheflow.engine.runner import LayerRunner
from cacheflow.profiling.survey import ChunkCost, ChunkPoint, median_cost
from cacheflow.tensors.streams import DeviceStream
from cacheflow.types import Clock

KV_ONLY_ROWS = 4
"""Rows timed for keys and values only, a call each; they differ too little to time all."""


class CostMeter:
    """Times one model on its device, on the calling thread: rows of layers, a row being the smallest block.

    Attributes:
        events_over_wall: CUDA only: device time between events over wall time, one value a measurement; far from 1
            means that the clocks disagree, or that the device waited for its first work.
        launch_over_wall: CUDA only: time until all was launched over wall time; near 1 means that launching, not
            computing, was timed.
    """

    def __init__(
        self,
        runner: LayerRunner,
        *,
        max_tokens: int,
        rows: Sequence[tuple[int, int]] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Allocate and fill a KV buffer of ``max_tokens``; time layers ``[lo, hi)`` as rows, the model's if None."""
        self.events_over_wall: list[float] = []
        self.launch_over_wall: list[float] = []
        self._seen: set[ChunkPoint] = set()
        self._clock = clock
        self._runner = runner
        high = runner.model.shape.row_layers
        whole = [(lo, lo + high) for lo in range(0, runner.num_layers, high)]
        self._rows = tuple(whole if rows is None else rows)
        self._kv: KVBuffer = runner.new_kv(max_tokens)
        generator = torch.Generator(device=self._kv.device).manual_seed(0)
        self._kv.kv_L2THD.normal_(generator=generator)
        if self._kv.checkpoint is not None:
            self._kv.checkpoint.conv_RCW.normal_(generator=generator)
            self._kv.checkpoint.delta_RHKV.normal_(generator=generator)

    def measure_chunks(
        self, points: Sequence[ChunkPoint], *, repeats: int = 3, on_step: Callable[[], None] = lambda: None
    ) -> dict[ChunkPoint, ChunkCost]:
        """Median cost of each point over ``repeats`` interleaved rounds, after one warm-up of the shortest.

        On CUDA every point is run once before it is timed: see ``time_point``.

        Args:
            points: What to time; ``offset + num_tokens`` at most the meter's ``max_tokens``.
            repeats: Rounds.
            on_step: Called after every single measurement, ``len(points) * repeats`` times.
        """
        if points:
            self.time_point(min(points, key=lambda point: point.num_tokens + point.offset))
        samples: dict[ChunkPoint, list[ChunkCost]] = {point: [] for point in points}
        for _ in range(repeats):
            for point in samples:
                samples[point].append(self.time_point(point))
                on_step()
        return {point: median_cost(costs) for point, costs in samples.items()}

    def measure_head_s(self, *, repeats: int = 9) -> float:
        """Median seconds of norm and LM head for one token."""
        hidden = self._runner.embed(self._runner.token_tensor([0]))
        return statistics.median(self._seconds(lambda: self._runner.logits(hidden)) for _ in range(repeats))

    def measure_call_overhead_s(self, *, repeats: int = 9) -> float:
        """Median seconds of one row for one token without a past: what a call costs however little it does."""
        samples = [self.time_point(ChunkPoint(1, 0)).full_s for _ in range(repeats)]
        return statistics.median(samples)

    def measure_big_pass_s(self, num_tokens: int, *, repeats: int = 2) -> float:
        """Median seconds of one row for the whole prefix as a single chunk."""
        samples = [self.time_point(ChunkPoint(num_tokens, 0)).full_s for _ in range(repeats)]
        return statistics.median(samples)

    def time_point(self, point: ChunkPoint) -> ChunkCost:
        """Time one chunk; ``offset + num_tokens`` at most the meter's ``max_tokens``.

        On CUDA the first time of a point is not timed: it loads kernels, chooses algorithms and gets memory.
        """
        if self._runner.lane is not None and point not in self._seen:
            self._seen.add(point)
            num_before = len(self.launch_over_wall)
            self.time_point(point)
            del self.events_over_wall[num_before:], self.launch_over_wall[num_before:]
        runner, end = self._runner, point.offset + point.num_tokens
        tokens = runner.token_tensor([1 + i % (runner.model.shape.vocab_size - 1) for i in range(point.num_tokens)])
        hidden = runner.embed(tokens)
        cache = ChunkCache(self._kv, point.offset, end, self._kv.checkpoint)
        rope = runner.rope(point.offset, end)

        def run_rows(rows: Sequence[tuple[int, int]], *, kv_only: bool) -> None:
            for layers in rows:
                runner.run(hidden, cache, rope, layers=layers, kv_only_top=kv_only)

        few = self._rows[:KV_ONLY_ROWS]
        full_s = self._seconds(lambda: run_rows(self._rows, kv_only=False))
        kv_only_s = self._seconds(lambda: run_rows(few, kv_only=True))
        return ChunkCost(full_s=full_s / len(self._rows), kv_only_s=kv_only_s / len(few))

    def _seconds(self, work: Callable[[], object]) -> float:
        if self._runner.lane is not None:
            return self._device_seconds(work, self._runner.lane.streams.current())
        started_s = self._clock()
        work()
        return self._clock() - started_s

    def _device_seconds(self, work: Callable[[], object], stream: DeviceStream) -> float:
        """Wall time of work on the current stream; what events and launching took of it is kept beside it."""
        stream.record().wait()
        started_s = self._clock()
        begin = stream.record(timed=True)
        work()
        end = stream.record(timed=True)
        launched_s = self._clock() - started_s
        end.wait()
        wall_s = self._clock() - started_s
        self.events_over_wall.append(end.seconds_after(begin) / wall_s)
        self.launch_over_wall.append(launched_s / wall_s)
        return wall_s


def chunk_points(boundaries: Sequence[int], *, start: int = 0) -> Iterator[ChunkPoint]:
    """The points that chunks ending at ``boundaries`` consist of."""
    for end in boundaries:
        yield ChunkPoint(end - start, start)
        start = end
