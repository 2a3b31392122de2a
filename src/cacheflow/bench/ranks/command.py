"""``cacheflow bench ranks``: one model split over pipeline stages and tensor-parallel ranks of vLLM, side by side."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cacheflow.bench.environment import available_memory, environment
from cacheflow.bench.options import ServedFlags, option
from cacheflow.bench.ranks.report import draw_ranks, ranks_tables
from cacheflow.bench.ranks.study import ANSWER_TOKENS, RanksOptions, RankSplit, RanksStudy, splits_of
from cacheflow.bench.records.ranks import RanksRecord
from cacheflow.bench.suite import Suite, SuiteRun, new_progress
from cacheflow.bench.vllm.costs import PrefixSize
from cacheflow.bench.vllm.probe import probe
from cacheflow.bench.vllm.server import ServerOptions
from cacheflow.bench.vllm.workload import PROMPT_STRIDE, RANKS_NAME, BenchModel, open_model, prompt_tokens
from cacheflow.errors import ConfigError
from cacheflow.plan.stages import RankLayout

POOL_PREFIXES = 5
"""Prefixes that fit in the KV cache: the blocks into which a prefix is restored never hold it already."""


@dataclass(frozen=True, kw_only=True)
class RanksFlags(ServedFlags):
    """The options of ``bench ranks``."""

    model: str = option(RANKS_NAME, f"{RANKS_NAME} (random weights) or a model folder", shown="")
    repeats: int = option(3, "rounds per ratio", metavar="N", at_least=1)
    pipeline_parallel_sizes: tuple[int, ...] = option(
        (1, 2), "pipeline stages; each beyond 1 with and without the GPU axis", metavar="N,N,...", at_least=1
    )
    tensor_parallel_sizes: tuple[int, ...] = option((1, 2), "ranks of one stage", metavar="N,N,...", at_least=1)


add_arguments = RanksFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Run the study; prints the table and draws the figure."""
    flags = RanksFlags.of(args)
    where = probe(flags.vllm_python)
    if where["accelerator"]:
        raise ConfigError(
            f"bench ranks gives each rank a core of the processor, here vLLM runs on {where['accelerator']}"
        )
    model = open_model(flags.model)
    longest = flags.tokens + flags.suffix + ANSWER_TOKENS + 1
    if longest > model.max_tokens:
        raise ConfigError(f"--tokens {flags.tokens} is too long: {flags.model} allows {model.max_tokens} tokens in all")
    splits = splits_of(flags.pipeline_parallel_sizes, flags.tensor_parallel_sizes)
    for split in splits:
        RankLayout(pipeline_parallel_size=split.pipeline, tensor_parallel_size=split.tensor).kv_parts(model.shape)
    suite = Suite(
        out=flags.out, kind=RanksRecord, show=ranks_tables, draw=lambda records: draw_ranks(records, flags.out)
    )
    return suite.run(partial(_work, flags, model, splits, where))


def _work(
    flags: RanksFlags,
    model: BenchModel,
    splits: Sequence[RankSplit],
    where: Mapping[str, str | None],
    suite: SuiteRun[RanksRecord],
) -> bool:
    most, num_cores = max(split.num_ranks for split in splits), len(os.sched_getaffinity(0))
    if most > num_cores:
        suite.say(f"{most} ranks share {num_cores} cores: their times say nothing about ranks with a core each")
    longest = flags.tokens + flags.suffix + ANSWER_TOKENS + 1
    with tempfile.TemporaryDirectory(prefix="cacheflow-ranks-") as stores:
        options = RanksOptions(
            server=ServerOptions(
                python=flags.vllm_python,
                model_dir=model.folder,
                dtype="bfloat16",
                chunk_tokens=flags.chunk,
                max_tokens=longest,
                kv_cache_gib=max(1, math.ceil(POOL_PREFIXES * longest * model.shape.kv_bytes_per_token / 2**30)),
                compiled=flags.compiled,
                log_dir=flags.out / "logs",
            ),
            store_root=Path(stores),
            size=PrefixSize(num_tokens=flags.tokens, suffix_tokens=flags.suffix, chunk_tokens=flags.chunk),
            repeats=flags.repeats,
            environment={**environment(num_threads=1), **where, "eager": int(not flags.compiled)},
        )
        num_tokens = flags.repeats * PROMPT_STRIDE + flags.tokens + flags.suffix
        _study(flags, splits, RanksStudy(model, prompt_tokens(model, num_tokens), options), suite)
    return True


def _study(flags: RanksFlags, splits: Sequence[RankSplit], study: RanksStudy, suite: SuiteRun[RanksRecord]) -> None:
    with new_progress(suite.console) as progress:
        task = progress.add_task("one rank prefills", total=None)
        study.prepare()
        needed, free = study.needed_bytes(splits), available_memory()
        together = needed <= free
        if not together:
            suite.say(
                f"all servers together take {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free: "
                "each is started for its turn, which takes longer"
            )
        saves = 1 if together else flags.repeats
        progress.update(task, total=len(flags.ratios) * (flags.repeats + saves) * len(splits))
        for ratio in sorted(flags.ratios):
            progress.update(task, description=f"ratio {ratio:g}, starting servers")

            def step(what: str, ratio: float = ratio) -> None:
                progress.update(task, description=f"ratio {ratio:g}, {what}", advance=1)

            for record in study.rounds(splits, ratio=ratio, together=together, on_step=step):
                suite.add(record)
