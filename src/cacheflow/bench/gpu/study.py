"""What the parts share: the model, what they put on record, and how a prefix is restored round by round."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import torch

from cacheflow.bench import setup
from cacheflow.bench.environment import accelerator_name, environment
from cacheflow.bench.gpu.flags import GpuFlags
from cacheflow.bench.gpu.host_streams import HostStreams
from cacheflow.bench.records.base import BenchRecord
from cacheflow.bench.records.gpu import GpuRecord
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.restore.link import PinnedStudyLink, StudyLink
from cacheflow.bench.restore.rounds import Round, is_done, ratio_on_record, run_round
from cacheflow.bench.restore.study import Study, StudyOptions
from cacheflow.bench.suite import SuiteRun
from cacheflow.engine.runner import LayerRunner
from cacheflow.restore.options import ExecutorOptions
from cacheflow.tensors.streams import DeviceStreams, streams_of

SUITE = "restore"
READS = 8

Values = Mapping[str, str | int | float | None]


class GpuStudy:
    """A run of ``cacheflow bench gpu``.

    Attributes:
        flags: The command line's.
        suite: Watches the clock, and has what is on record.
    """

    def __init__(self, flags: GpuFlags, suite: SuiteRun[BenchRecord]) -> None:
        """Find the device."""
        self.flags, self.suite = flags, suite
        self.device = torch.device(flags.device)
        self.streams: DeviceStreams = streams_of(self.device) or HostStreams()
        self.on_gpu = flags.device == "cuda"
        self._main: Study | None = None
        self._environment = environment(accelerator=accelerator_name(flags.device))

    def put(self, part: int, name: str, values: Values, *, correct: bool | None = None) -> None:
        """Put a finding on record."""
        self.suite.add(
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

    def has(self, part: int, name: str) -> bool:
        """Whether a finding is on record."""
        records = [each for each in self.suite.records if isinstance(each, GpuRecord)]
        return any((each.part, each.name, each.device) == (part, name, self.flags.device) for each in records)

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
                records = [record for record in self.suite.records if isinstance(record, RestoreRecord)]
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
                left_s = self.suite.left_s
                if expected_s > left_s:
                    self.suite.say(f"left out from {each:g} Gbit/s on: {expected_s:.0f} s needed, {left_s:.0f} s left")
                    return False
                named = {**self._environment, **study.device_notes}
                for run in run_round(study, round_, suite=SUITE, environment=named, on_run=lambda name: None):
                    self.suite.add(run.record)
        return True
