"""``cacheflow bench vllm``: restore policies, vLLM's own prefill and other connectors side by side in stock vLLM."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cacheflow.bench.options import check_prefix_arguments, exit_on_sigterm, float_list, make_folder, name_list
from cacheflow.bench.record import append_record, environment
from cacheflow.bench.results_file import append_line, only_run, read_lines, take_up
from cacheflow.bench.vllm.costs import PrefixSize, measure_costs, prefix_bytes
from cacheflow.bench.vllm.fleet import Fleet, FleetOptions, open_fleet
from cacheflow.bench.vllm.load import LoadOptions, run_load, show_load
from cacheflow.bench.vllm.plot import draw_vllm
from cacheflow.bench.vllm.policies import LMCACHE, QUICK_POLICIES, STOCK, VLLM_POLICIES, check_policies
from cacheflow.bench.vllm.probe import probe
from cacheflow.bench.vllm.record import read_vllm_records
from cacheflow.bench.vllm.rivals.lmcache import LMCacheMissingError, lmcache_python
from cacheflow.bench.vllm.server import ServerOptions, threads_bind
from cacheflow.bench.vllm.study import StudyOptions, VllmStudy, longest_sequence, tokens_needed
from cacheflow.bench.vllm.table import vllm_tables
from cacheflow.bench.vllm.workload import TINY_NAME, BenchModel, open_model, prompt_tokens
from cacheflow.engine.smollm2 import SMOLLM2_NAME
from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json

RATIOS = (0.25, 1.0, 4.0)
DTYPE = "bfloat16"
POOL_PREFIXES = 6
"""Prefixes that fit in the KV cache: evicted blocks are used again only after several others, so that the blocks
into which a prefix is restored never hold it already."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench vllm``."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for results.jsonl, figures, logs"
    )
    parser.add_argument("--model", default=SMOLLM2_NAME, help=f"{SMOLLM2_NAME}, {TINY_NAME} or a model folder")
    parser.add_argument("--quick", action="store_true",
                        help=f"policies {','.join(QUICK_POLICIES)}, one repeat: 10 minutes on 2 cores")  # fmt: skip
    parser.add_argument("--ratios", type=float_list, default=RATIOS, metavar="R,R,...",
                        help="load time over vLLM's own prefill time (default: 0.25,1,4)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="prefix (default: %(default)s)")
    parser.add_argument("--suffix", type=int, default=37, metavar="N", help="new tokens (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens of a step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds per ratio (default: 3; --quick: 1)")
    parser.add_argument("--policies", type=name_list, metavar="P,P,...", help=f"default: {','.join(VLLM_POLICIES)}")
    parser.add_argument("--neighbour", action="store_true", help="one other request decodes meanwhile; records its ITL")
    parser.add_argument("--itl-slo-ms", type=float, metavar="MS",
                        help="with --neighbour: ask our connector to keep the ITL within this")  # fmt: skip
    parser.add_argument("--load", type=float, metavar="RATE",
                        help="instead: sessions, RATE requests per second, by vLLM's own client")  # fmt: skip
    parser.add_argument("--sessions", type=int, default=16, metavar="N",
                        help="with --load: sessions of 3 turns each (default: %(default)s)")  # fmt: skip
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model (default: eager)")
    parser.add_argument("--vllm-python", type=Path, default=Path(sys.executable), metavar="PATH",
                        help="interpreter that has vLLM (default: this one)")  # fmt: skip
    parser.add_argument("--lmcache-python", type=Path, metavar="PATH",
                        help="interpreter that has LMCache and vLLM (default: made in the cache folder)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the study; prints the table and draws the figure."""
    _check(args)
    exit_on_sigterm()
    console = Console()
    make_folder("--out", args.out)
    where = probe(args.vllm_python)
    model = open_model(args.model)
    if args.tokens + args.suffix + 64 > model.max_tokens:
        raise ConfigError(f"--tokens {args.tokens} is too long: {args.model} allows {model.max_tokens} tokens in all")
    with only_run(args.out), tempfile.TemporaryDirectory(prefix="cacheflow-vllm-") as stores:
        _take_up(args.out, console)
        options, policies = _fleet_options(args, model, Path(stores), console)
        if args.load is not None:
            return _load(args, model, options, policies, console)
        _study(args, model, options, policies, where, console)
    return _show(args.out, console)


def _take_up(out: Path, console: Console) -> None:
    """Find what an earlier run left half written before servers start, not when everything is measured."""
    readers = {"results.jsonl": read_vllm_records, "load.jsonl": lambda path: read_lines(path, parse_json)}
    for name, read in readers.items():
        take_up(out / name, read, tell=lambda text: console.print(text, markup=False, soft_wrap=True))


def _check(args: argparse.Namespace) -> None:
    """Check the options and fill in the defaults that depend on others."""
    args.policies = args.policies or (QUICK_POLICIES if args.quick else VLLM_POLICIES)
    args.repeats = (1 if args.quick else 3) if args.repeats is None else args.repeats
    check_policies(args.policies)
    check_prefix_arguments(args, "tokens", "suffix", "chunk", "repeats", "sessions")
    if args.itl_slo_ms is not None and not (args.itl_slo_ms > 0 and math.isfinite(args.itl_slo_ms)):
        raise ConfigError(f"--itl-slo-ms is {args.itl_slo_ms}, must be above 0 and finite")
    if args.itl_slo_ms is not None and not args.neighbour:
        raise ConfigError("--itl-slo-ms needs --neighbour: alone there is no inter-token latency to keep")
    if args.load is not None and args.neighbour:
        raise ConfigError("--load and --neighbour exclude each other: under load every request has neighbours")
    if args.load is not None and not (args.load > 0 and math.isfinite(args.load)):
        raise ConfigError(f"--load is {args.load}, must be above 0 and finite")


def _fleet_options(
    args: argparse.Namespace, model: BenchModel, stores: Path, console: Console
) -> tuple[FleetOptions, tuple[str, ...]]:
    """How servers start, and the policies that can run here; LMCache is left out where it cannot be installed."""
    policies, python = tuple(args.policies), None
    if LMCACHE in policies:
        try:
            python = lmcache_python(args.lmcache_python, args.vllm_python)
        except LMCacheMissingError as error:
            console.print(f"policy {LMCACHE} is left out: {error}", markup=False)
            policies = tuple(name for name in policies if name != LMCACHE)
    size = _size(args)
    longest = longest_sequence(size)
    gib = math.ceil(POOL_PREFIXES * longest * model.shape.kv_bytes_per_token / 2**30)
    server = ServerOptions(
        python=args.vllm_python,
        model_dir=model.folder,
        dtype=DTYPE,
        chunk_tokens=args.chunk,
        max_tokens=min(model.max_tokens, longest),
        kv_cache_gib=gib,
        compiled=args.compiled,
        log_dir=args.out / "logs",
    )
    fleet = FleetOptions(server=server, store_root=stores, lmcache_python=python, itl_slo_ms=args.itl_slo_ms)
    return fleet, policies


def _study(
    args: argparse.Namespace,
    model: BenchModel,
    fleet_options: FleetOptions,
    policies: tuple[str, ...],
    where: Mapping[str, str | None],
    console: Console,
) -> None:
    size, results = _size(args), args.out / "results.jsonl"
    rivals = tuple(name for name in policies if name != STOCK)
    with open_fleet((STOCK,), fleet_options, bytes_per_s=1.0) as stock, _progress(console) as progress:
        options = StudyOptions(
            size=size,
            repeats=args.repeats,
            neighbour=args.neighbour,
            itl_slo_ms=args.itl_slo_ms,
            dtype=DTYPE,
            device=where["accelerator"] or "cpu",
            environment={
                **environment(accelerator=where["accelerator"]),
                **where,
                "eager": int(not args.compiled),
                "omp_bind": threads_bind(),
            },
        )
        study = VllmStudy(model, prompt_tokens(model, tokens_needed(size, args.repeats)), options)
        task = progress.add_task("measuring stock vLLM", total=args.repeats + 2)
        with stock.turn(STOCK) as server:
            study.prepare(server.client, on_step=lambda: progress.advance(task))
        total = len(args.ratios) * args.repeats * (len(rivals) + 1)
        task = progress.add_task("restoring", total=total)
        for ratio in sorted(args.ratios):
            progress.update(task, description=f"ratio {ratio:g}, starting servers")
            with open_fleet(rivals, fleet_options, bytes_per_s=study.bytes_per_s(ratio)) as others:
                fleet = Fleet(servers={**stock.servers, **others.servers}, lmcache=others.lmcache)

                def saving(name: str, ratio: float = ratio) -> None:
                    progress.update(task, description=f"ratio {ratio:g}, {name} saves")

                def restoring(name: str, ratio: float = ratio) -> None:
                    progress.update(task, description=f"ratio {ratio:g}, {name}", advance=1)

                study.warm_up(fleet)
                study.save(fleet, on_step=saving)
                study.note_idle_cores(fleet)
                for record in study.rounds(fleet, ratio=ratio, on_step=restoring):
                    append_record(results, record)


def _load(
    args: argparse.Namespace,
    model: BenchModel,
    fleet_options: FleetOptions,
    policies: tuple[str, ...],
    console: Console,
) -> int:
    """Measure the link for the middle ratio, then drive every policy; appends to ``load.jsonl``.

    Raises:
        ConfigError: The model has no tokenizer for the sessions' text.
    """
    if args.model == TINY_NAME:
        raise ConfigError(f"--load needs a model that reads text; {TINY_NAME} has a tokenizer of made-up words")
    size, ratio = _size(args), sorted(args.ratios)[len(args.ratios) // 2]
    console.print(f"measuring stock vLLM, for a link of ratio {ratio:g}")
    with open_fleet((STOCK,), fleet_options, bytes_per_s=1.0) as stock, stock.turn(STOCK) as server:
        tokens = prompt_tokens(model, size.num_tokens + size.suffix_tokens)
        costs = measure_costs(server.client, tokens, size, repeats=1, on_step=lambda: None)
    options = LoadOptions(
        rate=args.load,
        bytes_per_s=prefix_bytes(model.shape, size) / (ratio * costs.recompute_s),
        kv_bytes_per_token=model.shape.kv_bytes_per_token,
        num_sessions=args.sessions,
    )
    longer = replace(fleet_options.server, max_tokens=min(model.max_tokens, options.max_tokens))
    fleet_options = replace(fleet_options, server=longer)
    records = []

    def starting(policy: str) -> None:
        console.print(f"{policy}: {options.num_requests} requests, {args.load:g} per second")

    for record in run_load(policies, fleet_options, options, model=model.shape.name, out=args.out, on_policy=starting):
        append_line(args.out / "load.jsonl", record.to_json())
        records.append(record)
    show_load(records, console)
    console.print(f"records in {args.out / 'load.jsonl'}", markup=False)
    return 1 if any(record.num_failed for record in records) else 0


def _show(out: Path, console: Console) -> int:
    results = out / "results.jsonl"
    records = read_vllm_records(results)
    console.print(vllm_tables(records))
    try:
        for path in draw_vllm(records, out):
            console.print(f"drew {path}", markup=False)
    except ConfigError as error:
        console.print(f"no figure: {error}", markup=False)
    console.print(f"records in {results}", markup=False)
    return 0 if all(record.correct for record in records) else 1


def _size(args: argparse.Namespace) -> PrefixSize:
    return PrefixSize(num_tokens=args.tokens, suffix_tokens=args.suffix, chunk_tokens=args.chunk)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
