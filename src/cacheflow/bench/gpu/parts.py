"""The parts of the study, in the sequence of what must be known first; each is left out where its time is not left.

0 what the device can do at best, 1 whether bits are right, 2 what layers, kernels and decoded tokens cost, 3 what the
I/O loop moves, 4 the main table, 5 other cells, 6 a short prefix and real stores, 8 the longest prefix.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cacheflow.bench import setup
from cacheflow.bench.environment import accelerator_name, environment
from cacheflow.bench.gpu.flags import GpuFlags
from cacheflow.bench.gpu.host_streams import HostStreams
from cacheflow.bench.record import BenchRecord, GpuRecord, RestoreRecord
from cacheflow.bench.restore.link import PinnedStudyLink, StoreStudyLink, StudyLink
from cacheflow.bench.restore.rounds import Round, is_done, ratio_on_record, run_round
from cacheflow.bench.restore.study import Study, StudyOptions
from cacheflow.bench.suite import SuiteRun
from cacheflow.engine.attention import chunk_attention
from cacheflow.engine.cuda_attention import AttentionKernel, flash3, require_flash3
from cacheflow.engine.families import DTYPES, FAMILIES
from cacheflow.engine.random_models import tiny_model
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.selftest import self_test
from cacheflow.errors import ConfigError, SelfTestError
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.profiling import ceilings
from cacheflow.profiling.measure import CostMeter
from cacheflow.profiling.survey import ChunkPoint
from cacheflow.restore.options import ExecutorOptions
from cacheflow.tensors.streams import DeviceStreams, streams_of
from cacheflow.types import Clock

SUITE = "restore"
READS = 8
DECODED = 8
TIMED_ROWS = 4
"""Layers timed of a model: they are alike."""
LAST_POLICIES = ("recompute", "load", "cake", "cacheflow")

Values = Mapping[str, str | int | float | None]


@dataclass(frozen=True, slots=True)
class Part:
    """A part, and the seconds it should take on an H100 with an 8B model; it is not begun with less time left."""

    number: int
    least_s: float
    run: Callable[[GpuStudy], bool]


class GpuStudy:
    """What the parts share: the model, the clock, the results file."""

    def __init__(self, flags: GpuFlags, suite: SuiteRun[BenchRecord], *, ends_s: float, clock: Clock) -> None:
        """Watch the clock until ``ends_s``."""
        self.flags, self._suite, self._ends_s, self._clock = flags, suite, ends_s, clock
        self.device = torch.device(flags.device)
        self.streams: DeviceStreams = streams_of(self.device) or HostStreams()
        self.on_gpu = flags.device == "cuda"
        self._main: Study | None = None
        self._environment = environment(accelerator=accelerator_name(flags.device))

    @property
    def left_s(self) -> float:
        """Seconds of the time limit that are left."""
        return self._ends_s - self._clock()

    def put(self, part: int, name: str, values: Values, *, correct: bool | None = None) -> None:
        """Put a finding on record."""
        self._suite.add(
            GpuRecord(
                suite="gpu",
                part=part,
                name=name,
                device=self.flags.device,
                values=dict(values),
                correct=correct,
                environment=self._environment,
            )
        )

    def say(self, text: str) -> None:
        """Print a line."""
        self._suite.say(text)

    def has(self, part: int, name: str) -> bool:
        """Whether a finding is on record."""
        records = [each for each in self._records if isinstance(each, GpuRecord)]
        return any((each.part, each.name, each.device) == (part, name, self.flags.device) for each in records)

    @property
    def _records(self) -> list[BenchRecord]:
        return [*self._suite.done, *self._suite.added]

    def runner(self) -> LayerRunner:
        """The model's layers."""
        return LayerRunner(setup.open_model(self.flags), streams=self.streams)

    def main(self) -> Study:
        """The study of the usual prefix, in the usual cells; prepared once."""
        if self._main is None:
            self._main = self.study(self.flags.tokens, chunk_tokens=self.flags.chunk_tokens, layers_per_block=2)
        return self._main

    def study(
        self,
        num_tokens: int,
        *,
        chunk_tokens: int,
        layers_per_block: int,
        link: StudyLink | None = None,
        cost_repeats: int | None = None,
    ) -> Study:
        """A prefix prefilled, saved and measured; over pinned memory unless told otherwise."""
        model = setup.open_model(self.flags)
        options = StudyOptions(
            num_tokens=num_tokens,
            suffix_tokens=self.flags.suffix,
            chunk_tokens=chunk_tokens,
            layers_per_block=layers_per_block,
            cost_repeats=cost_repeats or self.flags.cost_repeats,
            executor=ExecutorOptions(max_reads_in_flight=READS),
        )
        tokens = setup.prompt_tokens(model, num_tokens + self.flags.suffix)
        study = Study(model, tokens, options=options, link=link or PinnedStudyLink(), streams=self.streams)
        study.prepare()
        return study

    def free(self) -> None:
        """Let go of the main study's memory."""
        if self._main is not None:
            self._main.close()
        self._main = None
        self.collect()

    def collect(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def rounds(self, study: Study, *, gbps: Sequence[float], policies: Sequence[str], repeats: int) -> bool:
        """Restore to the first token under policies side by side; False when the time did not allow all of it."""
        for repeat in range(repeats):
            for each in gbps:
                bytes_per_s = each * 1e9 / 8
                records = [record for record in self._records if isinstance(record, RestoreRecord)]
                load_s = study.prefix_bytes / study.link_bytes_per_s(bytes_per_s)
                ratio = ratio_on_record(study, records, suite=SUITE, bytes_per_s=bytes_per_s)
                round_ = Round(
                    policies=tuple(policies),
                    ratio=float(f"{load_s / study.recompute_s():.2g}") if ratio is None else ratio,
                    bytes_per_s=bytes_per_s,
                    with_suffix=True,
                    repeat=repeat,
                )
                if is_done(round_, study, records, suite=SUITE):
                    continue
                expected_s = len(policies) * (load_s + study.recompute_s()) / 2
                if expected_s > self.left_s:
                    self.say(f"left out from {each:g} Gbit/s on: {expected_s:.0f} s needed, {self.left_s:.0f} s left")
                    return False
                named = {**self._environment, **study.device_notes}
                for run in run_round(study, round_, suite=SUITE, environment=named, on_run=lambda name: None):
                    self._suite.add(run.record)
        return True


def run_parts(flags: GpuFlags, suite: SuiteRun[BenchRecord], *, clock: Clock = time.monotonic) -> bool:
    """Run what is asked for, is not on record, and has its time; False when something was left out."""
    ends_s, complete = clock() + flags.time_limit_s, True
    setup.open_model(flags)  # a missing device or shape is one line, before anything is measured
    study = GpuStudy(flags, suite, ends_s=ends_s, clock=clock)
    for part in PARTS:
        if part.number not in flags.parts or study.has(part.number, "done"):
            continue
        least_s = part.least_s / flags.pace
        if least_s > study.left_s:
            study.say(f"part {part.number} is left out: it needs {least_s:.0f} s, {study.left_s:.0f} s are left")
            complete = False
            continue
        began_s = clock()
        try:
            finished = part.run(study)
        except Exception as error:  # noqa: BLE001 -- what was measured is to be shown, and other parts may have their time
            study.put(part.number, "failed", {"error": f"{type(error).__name__}: {error}"[:500]})
            study.say(f"part {part.number} failed: {type(error).__name__}: {error}")
            study.free()
            complete = False
            continue
        if finished:
            study.put(part.number, "done", {"seconds": clock() - began_s})
        elif part.number == EXACTNESS:
            study.say("bits differ: no time is worth measuring, the study ends here")
            return True
        else:
            complete = False
    study.free()
    return complete


def measure_ceilings(study: GpuStudy) -> bool:
    """Part 0: one large copy each way, one large product, what pinning costs."""
    streams, device = study.streams, study.device
    num_bytes = ceilings.COPY_BYTES if study.on_gpu else 1 << 20
    if study.on_gpu:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        study.put(0, "memory", {"free_bytes": free_bytes, "total_bytes": total_bytes, "cuda": torch.version.cuda})
    began_s = time.perf_counter()
    streams.pinned(num_bytes)
    pinned_s = (time.perf_counter() - began_s) * (1 << 30) / num_bytes
    study.put(
        0,
        "ceilings",
        {
            "product_flops_per_s": ceilings.product_flops_per_s(streams, device, size=8192 if study.on_gpu else 128),
            "memory_bytes_per_s": ceilings.memory_bytes_per_s(streams, device, num_bytes=num_bytes),
            "upload_bytes_per_s": ceilings.upload_bytes_per_s(streams, device, num_bytes=num_bytes),
            "download_bytes_per_s": ceilings.download_bytes_per_s(streams, device, num_bytes=num_bytes),
            "pinning_s_per_gib": pinned_s,
        },
    )
    study.collect()
    return True


EXACTNESS = 1


def check_exactness(study: GpuStudy) -> bool:
    """Part 1: every family in every dtype against its own forward; every policy over both kinds of link."""
    exact = True
    models = [(family, None) for family in FAMILIES] + [("mistral", 24)]  # the last with a window that cuts in
    for family, window in models:
        for dtype in DTYPES[study.flags.device]:
            try:
                report = self_test(tiny_model(family, dtype=dtype, device=study.flags.device, sliding_window=window))
                values: Values = {"kv_error": report.kv_error, "logits_error": report.logits_error}
                passed = report.passed
            except SelfTestError as error:
                values, passed = {"error": str(error)}, False
            name = f"{family} {dtype}" + ("" if window is None else f", window {window}")
            study.put(EXACTNESS, name, values, correct=passed)
            exact = exact and passed
    wrong = [name for name in RESTORE_POLICIES for link in _links(study) if not _is_exact(study, name, link)]
    study.put(EXACTNESS, "policies", {"wrong": ",".join(wrong) or None}, correct=not wrong)
    return exact and not wrong


def _links(study: GpuStudy) -> Iterator[StudyLink]:
    yield PinnedStudyLink()
    yield StoreStudyLink(setup.namespace_of(setup.open_model(study.flags), 64))


def _is_exact(study: GpuStudy, policy: str, link: StudyLink) -> bool:
    model = tiny_model("llama", dtype="bfloat16", device=study.flags.device)
    options = StudyOptions(num_tokens=500, suffix_tokens=40, chunk_tokens=64, cost_repeats=1)
    small = Study(model, [1 + i % 300 for i in range(540)], options=options, link=link, streams=study.streams)
    small.prepare()
    run = small.run(make_policy(policy), with_suffix=True, bytes_per_s=small.bytes_per_s(1.0))
    small.close()
    return run.correct


def measure_layers(study: GpuStudy) -> bool:
    """Part 2: seconds of a layer by chunk and offset, of attention by kernel, of decoded tokens."""
    runner, flags = study.runner(), study.flags
    chunks = [max(1, flags.chunk_tokens // 2), flags.chunk_tokens, 2 * flags.chunk_tokens]
    offsets = [0, flags.tokens // 2, flags.tokens]
    rows = [(layer, layer + 1) for layer in range(min(TIMED_ROWS, runner.num_layers))]
    capacity = min(offsets[-1] + chunks[-1], runner.model.max_tokens)
    meter = CostMeter(runner, max_tokens=capacity, rows=rows)
    for chunk in chunks:
        for offset in (each for each in offsets if each + chunk <= capacity):
            meter.launch_over_wall.clear()
            meter.events_over_wall.clear()
            costs = [meter.time_point(ChunkPoint(chunk, offset)) for _ in range(3)]
            study.put(
                2,
                f"layer, {chunk} tokens at {offset}",
                {
                    "full_s": statistics.median(cost.full_s for cost in costs),
                    "kv_only_s": statistics.median(cost.kv_only_s for cost in costs),
                    "launch_over_wall": statistics.median(meter.launch_over_wall),
                    "events_over_wall": statistics.median(meter.events_over_wall),
                },
            )
    for name, values in _attention_kernels(study, runner, chunks, offsets):
        study.put(2, name, values)
    kv = runner.new_kv(capacity)
    kv.kv_L2THD.normal_()
    seconds = []
    for step in range(DECODED):
        began_s = time.perf_counter()
        runner.decode_step(1, capacity - DECODED + step, kv)
        seconds.append(time.perf_counter() - began_s)
    study.put(2, f"decoding at {capacity}", {"first_s": seconds[0], "median_s": statistics.median(seconds)})
    del meter, kv, runner
    study.collect()
    return True


def _attention_kernels(
    study: GpuStudy, runner: LayerRunner, chunks: Sequence[int], offsets: Sequence[int]
) -> Iterator[tuple[str, Values]]:
    shape, dtype = runner.model.shape, runner.model.dtype
    scale = shape.head_dim**-0.5
    kernels: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]] = {
        runner.model.attention.value: lambda q, k, v: chunk_attention(torch.nn.Identity(), q, k, v, None),
    }
    if study.on_gpu:
        # For its time alone: a chunk with tokens before it is not masked, which is a little more work.
        kernels["torch's choice"] = lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] == k.shape[2], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        try:
            require_flash3("cuda", dtype, shape.head_dim)
            kernels[AttentionKernel.FLASH3.value] = lambda q, k, v: flash3(q, k, v, scale, None)
        except ConfigError as error:
            yield "flash3", {"left_out": str(error)}
    for chunk, offset in [(chunk, offset) for chunk in (1, *chunks) for offset in (offsets[0], offsets[-1])]:
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
        lengths = (chunk, offset + chunk, offset + chunk)
        query, key, value = (
            torch.randn(1, length, each, shape.head_dim, device=study.device, dtype=dtype).transpose(1, 2)
            for each, length in zip(heads, lengths, strict=True)
        )
        for name, attend in kernels.items():
            began_s = time.perf_counter()
            attend(query, key, value)
            study.streams.current().record().wait()
            first_s = time.perf_counter() - began_s
            warm_s = ceilings.device_seconds(study.streams, lambda: attend(query, key, value))  # noqa: B023 -- called now
            yield f"attention {name}, {chunk} tokens at {offset}", {"first_s": first_s, "warm_s": warm_s}


def measure_loop(study: GpuStudy) -> bool:
    """Part 3: what the I/O loop moves by size of cell and reads in flight, alone and beside a thread that launches."""
    ground = study.main()
    for layers_per_block in (1, 2, 4, 8):
        if layers_per_block > ground.model.shape.num_layers:
            break
        for reads in (3, READS):
            ground.regrain(layers_per_block, executor=ExecutorOptions(max_reads_in_flight=reads))
            alone = _loaded_bytes_per_s(ground)
            with _launching(study):
                beside = _loaded_bytes_per_s(ground)
            study.put(
                3,
                f"{ground.options.chunk_tokens} tokens x {layers_per_block} layers, {reads} reads",
                {"alone_bytes_per_s": alone, "beside_bytes_per_s": beside},
            )
    ground.regrain(2, executor=ExecutorOptions(max_reads_in_flight=READS))
    return True


def _loaded_bytes_per_s(ground: Study) -> float:
    run = ground.run(make_policy("load"), with_suffix=False, bytes_per_s=float("inf"))
    return run.restored.report.loaded_bytes / run.restored.report.restore_s


@contextmanager
def _launching(study: GpuStudy) -> Iterator[None]:
    """Another thread launches small kernels meanwhile, as recomputing does."""
    stop, small = threading.Event(), torch.zeros(64, device=study.device)

    def launch() -> None:
        while not stop.is_set():
            for _ in range(64):
                small.add_(1.0)
            study.streams.current().record().wait()

    thread = threading.Thread(target=launch, name="cacheflow-launching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def main_table(study: GpuStudy) -> bool:
    """Part 4: the usual prefix under every policy over every link."""
    ground, flags = study.main(), study.flags
    ground.run(make_policy("cacheflow"), with_suffix=True, bytes_per_s=float("inf"))  # first uses are not timed
    return study.rounds(ground, gbps=flags.gbps, policies=tuple(RESTORE_POLICIES), repeats=flags.repeats)


def other_cells(study: GpuStudy) -> bool:
    """Part 5: smaller and larger chunks and cells over the links that are fast for them."""
    flags, policies = study.flags, ("recompute", "load", "cacheflow")
    study.free()
    for chunk_tokens, blocks in ((flags.chunk_tokens // 2, (1, 4)), (2 * flags.chunk_tokens, (1,))):
        ground = study.study(flags.tokens, chunk_tokens=max(1, chunk_tokens), layers_per_block=blocks[0])
        for layers_per_block in blocks:
            ground.regrain(min(layers_per_block, ground.model.shape.num_layers))
            if not study.rounds(ground, gbps=(40.0, 80.0), policies=policies, repeats=1):
                return False
        ground.close()
        del ground
        study.collect()
    return True


def short_and_stored(study: GpuStudy) -> bool:
    """Part 6: a short prefix, from pinned memory and from a real store."""
    flags, policies = study.flags, ("recompute", "load", "cake", "cacheflow")
    study.free()
    namespace = setup.namespace_of(setup.open_model(flags), flags.chunk_tokens)
    for link in (PinnedStudyLink(), StoreStudyLink(namespace)):
        ground = study.study(flags.short_tokens, chunk_tokens=flags.chunk_tokens, layers_per_block=2, link=link)
        complete = study.rounds(ground, gbps=(10.0, 40.0), policies=policies, repeats=1)
        ground.close()
        del ground
        study.collect()
        if not complete:
            return False
    return True


def longest(study: GpuStudy) -> bool:
    """Part 8: the longest prefix once."""
    flags = study.flags
    study.free()
    ground = study.study(flags.long_tokens, chunk_tokens=flags.chunk_tokens, layers_per_block=2, cost_repeats=1)
    complete = study.rounds(ground, gbps=(40.0,), policies=LAST_POLICIES, repeats=1)
    ground.close()
    return complete


PARTS = (
    Part(0, 30.0, measure_ceilings),
    Part(EXACTNESS, 42.0, check_exactness),
    Part(2, 60.0, measure_layers),
    Part(3, 30.0, measure_loop),
    Part(4, 60.0, main_table),
    Part(5, 60.0, other_cells),
    Part(6, 42.0, short_and_stored),
    Part(8, 100.0, longest),
)
"""Least times are of a useful part: rounds watch the clock too."""
