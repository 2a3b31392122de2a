"""``cacheflow bench ranks``: one model split over pipeline stages and tensor-parallel ranks of vLLM, side by side."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cacheflow.bench.options import check_prefix_arguments, exit_on_sigterm, float_list, int_list, make_folder
from cacheflow.bench.ranks.record import read_ranks_records
from cacheflow.bench.ranks.report import draw_ranks, ranks_tables
from cacheflow.bench.ranks.study import ANSWER_TOKENS, RanksOptions, RanksStudy, Split, splits_of
from cacheflow.bench.record import append_record, environment
from cacheflow.bench.results_file import only_run, take_up
from cacheflow.bench.vllm.costs import PrefixSize
from cacheflow.bench.vllm.probe import probe
from cacheflow.bench.vllm.process_group import available_memory
from cacheflow.bench.vllm.server import ServerOptions
from cacheflow.bench.vllm.workload import PROMPT_STRIDE, RANKS_NAME, open_model, prompt_tokens
from cacheflow.errors import ConfigError
from cacheflow.plan.stages import RankLayout

RATIOS = (0.5, 1.0, 2.0)
SIZES = (1, 2)
POOL_PREFIXES = 5
"""Prefixes that fit in the KV cache: the blocks into which a prefix is restored never hold it already."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench ranks``."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for results.jsonl, figures, logs"
    )
    parser.add_argument("--model", default=RANKS_NAME, help=f"{RANKS_NAME} (random weights) or a model folder")
    parser.add_argument("--pipeline-parallel-sizes", type=int_list, default=SIZES, metavar="N,N,...",
                        help="pipeline stages; each beyond 1 with and without the GPU axis (default: 1,2)")  # fmt: skip
    parser.add_argument("--tensor-parallel-sizes", type=int_list, default=SIZES, metavar="N,N,...",
                        help="ranks of one stage (default: 1,2)")  # fmt: skip
    parser.add_argument("--ratios", type=float_list, default=RATIOS, metavar="R,R,...",
                        help="load time over prefill time of one rank (default: 0.5,1,2)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="prefix (default: %(default)s)")
    parser.add_argument("--suffix", type=int, default=37, metavar="N", help="new tokens (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens of a step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds per ratio (default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model (default: eager)")
    parser.add_argument("--vllm-python", type=Path, default=Path(sys.executable), metavar="PATH",
                        help="interpreter that has vLLM (default: this one)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the study; prints the table and draws the figure."""
    _check(args)
    exit_on_sigterm()
    console = Console()
    make_folder("--out", args.out)
    where = probe(args.vllm_python)
    if where["accelerator"]:
        raise ConfigError(
            f"bench ranks gives each rank a core of the processor, here vLLM runs on {where['accelerator']}"
        )
    model = open_model(args.model)
    size = PrefixSize(num_tokens=args.tokens, suffix_tokens=args.suffix, chunk_tokens=args.chunk)
    longest = args.tokens + args.suffix + ANSWER_TOKENS + 1
    if longest > model.max_tokens:
        raise ConfigError(f"--tokens {args.tokens} is too long: {args.model} allows {model.max_tokens} tokens in all")
    splits = splits_of(args.pipeline_parallel_sizes, args.tensor_parallel_sizes)
    for split in splits:
        RankLayout(pipeline_parallel_size=split.pipeline, tensor_parallel_size=split.tensor).kv_parts(model.shape)
    with only_run(args.out), tempfile.TemporaryDirectory(prefix="cacheflow-ranks-") as stores:
        # Before servers start: what an earlier run left half written is cut off, what it cannot read is refused.
        tell = partial(console.print, markup=False, soft_wrap=True)
        take_up(args.out / "results.jsonl", read_ranks_records, tell=tell)
        most, num_cores = max(split.num_ranks for split in splits), len(os.sched_getaffinity(0))
        if most > num_cores:
            tell(f"{most} ranks share {num_cores} cores: their times say nothing about ranks with a core each")
        options = RanksOptions(
            server=ServerOptions(
                python=args.vllm_python,
                model_dir=model.folder,
                dtype="bfloat16",
                chunk_tokens=args.chunk,
                max_tokens=longest,
                kv_cache_gib=max(1, math.ceil(POOL_PREFIXES * longest * model.shape.kv_bytes_per_token / 2**30)),
                compiled=args.compiled,
                log_dir=args.out / "logs",
            ),
            store_root=Path(stores),
            size=size,
            repeats=args.repeats,
            environment={**environment(num_threads=1), **where, "eager": int(not args.compiled)},
        )
        num_tokens = args.repeats * PROMPT_STRIDE + args.tokens + args.suffix
        _study(args, splits, RanksStudy(model, prompt_tokens(model, num_tokens), options), console)
    return _show(args.out, console)


def _check(args: argparse.Namespace) -> None:
    check_prefix_arguments(args, "tokens", "suffix", "chunk", "repeats")
    for key in ("pipeline_parallel_sizes", "tensor_parallel_sizes"):
        sizes = getattr(args, key)
        if not sizes or min(sizes) < 1:
            raise ConfigError(f"--{key.replace('_', '-')} {sizes} must be at least 1 each")


def _study(args: argparse.Namespace, splits: Sequence[Split], study: RanksStudy, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("one rank prefills", total=None)
        study.prepare()
        needed, free = study.needed_bytes(splits), available_memory()
        together = needed <= free
        if not together:
            console.print(
                f"all servers together take {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free: "
                "each is started for its turn, which takes longer"
            )
        saves = 1 if together else args.repeats
        progress.update(task, total=len(args.ratios) * (args.repeats + saves) * len(splits))
        for ratio in sorted(args.ratios):
            progress.update(task, description=f"ratio {ratio:g}, starting servers")

            def step(what: str, ratio: float = ratio) -> None:
                progress.update(task, description=f"ratio {ratio:g}, {what}", advance=1)

            for record in study.rounds(splits, ratio=ratio, together=together, on_step=step):
                append_record(args.out / "results.jsonl", record)


def _show(out: Path, console: Console) -> int:
    records = read_ranks_records(out / "results.jsonl")
    console.print(ranks_tables(records))
    try:
        for path in draw_ranks(records, out):
            console.print(f"drew {path}", markup=False)
    except ConfigError as error:
        console.print(f"no figure: {error}", markup=False)
    console.print(f"records in {out / 'results.jsonl'}", markup=False)
    return 0 if all(record.correct for record in records) else 1
