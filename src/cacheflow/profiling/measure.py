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
from cacheflow.types import Clock

KV_ONLY_LAYERS = 4
"""Layers timed for keys and values only, a call each; they differ too little to time all."""


class CostMeter:
    """Times one model on its device, on the calling thread.

    Attributes:
        events_over_wall: CUDA only: device time between events over wall time, one value a measurement; far from 1
            means that launching, not computing, was timed, or that the clocks disagree.
    """

    def __init__(
        self,
        runner: LayerRunner,
        *,
        max_tokens: int,
        layers: Sequence[int] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Allocate and fill a KV buffer of ``max_tokens``; time the given layers, all of them if None."""
        self.events_over_wall: list[float] = []
        self._clock = clock
        self._runner = runner
        self._layers = tuple(range(runner.num_layers)) if layers is None else tuple(layers)
        self._kv: KVBuffer = runner.new_kv(max_tokens)
        self._kv.kv_L2THD.normal_(generator=torch.Generator(device=self._kv.device).manual_seed(0))

    def measure_chunks(
        self, points: Sequence[ChunkPoint], *, repeats: int = 3, on_step: Callable[[], None] = lambda: None
    ) -> dict[ChunkPoint, ChunkCost]:
        """Median cost of each point over ``repeats`` interleaved rounds, after one warm-up of the shortest.

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
        """Median seconds of one layer for one token without a past: what a call costs however little it does."""
        samples = [self.time_point(ChunkPoint(1, 0)).full_s for _ in range(repeats)]
        return statistics.median(samples)

    def measure_big_pass_s(self, num_tokens: int, *, repeats: int = 2) -> float:
        """Median seconds of one layer for the whole prefix as a single chunk."""
        samples = [self.time_point(ChunkPoint(num_tokens, 0)).full_s for _ in range(repeats)]
        return statistics.median(samples)

    def time_point(self, point: ChunkPoint) -> ChunkCost:
        """Time one chunk; ``offset + num_tokens`` at most the meter's ``max_tokens``."""
        runner, end = self._runner, point.offset + point.num_tokens
        tokens = runner.token_tensor([1 + i % (runner.model.shape.vocab_size - 1) for i in range(point.num_tokens)])
        hidden = runner.embed(tokens)
        cache, rope = ChunkCache(self._kv, point.offset, end), runner.rope(point.offset, end)

        def run_layers(layers: Sequence[int], *, kv_only: bool) -> None:
            for layer in layers:
                runner.run(hidden, cache, rope, layers=(layer, layer + 1), kv_only_top=kv_only)

        few = self._layers[:KV_ONLY_LAYERS]
        full_s = self._seconds(lambda: run_layers(self._layers, kv_only=False))
        kv_only_s = self._seconds(lambda: run_layers(few, kv_only=True))
        return ChunkCost(full_s=full_s / len(self._layers), kv_only_s=kv_only_s / len(few))

    def _seconds(self, work: Callable[[], object]) -> float:
        if self._kv.device.type == "cuda":
            return self._cuda_seconds(work)
        started_s = self._clock()
        work()
        return self._clock() - started_s

    def _cuda_seconds(self, work: Callable[[], object]) -> float:
        """Wall time of work on the current stream; the events' own time is kept beside it as a check."""
        stream = torch.cuda.current_stream(self._kv.device)
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stream.synchronize()
        started_s = self._clock()
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        wall_s = self._clock() - started_s
        self.events_over_wall.append(begin.elapsed_time(end) / 1e3 / wall_s)
        return wall_s


def chunk_points(boundaries: Sequence[int], *, start: int = 0) -> Iterator[ChunkPoint]:
    """The points that chunks ending at ``boundaries`` consist of."""
    for end in boundaries:
        yield ChunkPoint(end - start, start)
        start = end
