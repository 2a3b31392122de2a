"""``cacheflow bench vllm``: restore policies, vLLM's own prefill and other connectors side by side in stock vLLM."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cacheflow.bench.environment import environment
from cacheflow.bench.options import DEFAULT_MODEL, ServedFlags, option
from cacheflow.bench.records.vllm import LoadRecord, VllmRecord
from cacheflow.bench.suite import Suite, SuiteRun, new_progress
from cacheflow.bench.vllm.costs import PrefixSize, measure_costs, prefix_bytes
from cacheflow.bench.vllm.fleet import Fleet, FleetOptions, open_fleet, open_one_server
from cacheflow.bench.vllm.links import LinkRounds
from cacheflow.bench.vllm.load import LoadOptions, run_load
from cacheflow.bench.vllm.policies import (
    CPU_BYTES,
    MODES,
    QUICK_POLICIES,
    STOCK,
    RivalMissingError,
    rivals,
    vllm_policies,
)
from cacheflow.bench.vllm.probe import probe
from cacheflow.bench.vllm.random_weights import LOAD_FORMAT
from cacheflow.bench.vllm.report import draw_vllm, load_table, vllm_tables
from cacheflow.bench.vllm.server import ServerOptions, threads_bind
from cacheflow.bench.vllm.study import VllmStudy, VllmStudyOptions, longest_sequence, tokens_needed
from cacheflow.bench.vllm.workload import (
    HYBRID_NAME,
    RANDOM_MODELS,
    TINY_NAME,
    BenchModel,
    open_model,
    open_shape,
    prompt_tokens,
)
from cacheflow.errors import ConfigError

DTYPE = "bfloat16"
POOL_PREFIXES = 6
"""Prefixes that fit in the KV cache: evicted blocks are used again only after several others, so that the blocks
into which a prefix is restored never hold it already."""
STATES_OF_PREFIX = 4
"""Running states in the KV cache for each of them: those at its end, and those of a request under way."""


@dataclass(frozen=True, kw_only=True)
class VllmFlags(ServedFlags):
    """The options of ``bench vllm``."""

    model: str = option(DEFAULT_MODEL, f"{DEFAULT_MODEL}, {TINY_NAME}, {HYBRID_NAME} or a model folder", shown="")
    shape: str | None = option(None, "instead: random weights of this shape (see cacheflow plan)")
    ratios: tuple[float, ...] = option(
        (0.25, 1.0, 4.0), "load time over vLLM's own prefill time", metavar="R,R,...", above=0, finite=True
    )
    gbps: tuple[float, ...] | None = option(
        None,
        f"instead of ratios: links in Gbit/s, in this sequence, each one server, asked for {','.join(MODES)}",
        metavar="G,G,...",
        above=0,
        finite=True,
    )
    in_memory: bool = option(False, "with --gbps: prefixes are kept in the server's memory, not in files (GPU)")
    time_limit_s: float | None = option(
        None, "with --gbps: what would end later is left out; the same command goes on with it", metavar="S", above=0
    )
    repeats: int | None = option(None, "rounds per ratio or link (default: 3; --quick: 1)", metavar="N", at_least=1)
    quick: bool = option(False, f"policies {','.join(QUICK_POLICIES)}, one repeat: 10 minutes on 2 cores")
    policies: tuple[str, ...] | None = option(
        None, f"default: {','.join(vllm_policies())}", metavar="P,P,...", known=("policy", vllm_policies())
    )
    neighbour: bool = option(False, "one other request decodes meanwhile; records its ITL")
    itl_slo_ms: float | None = option(
        None, "with --neighbour: ask our connector to keep the ITL within this", metavar="MS", above=0, finite=True
    )
    load: float | None = option(
        None, "instead: sessions, RATE requests per second, by vLLM's own client", metavar="RATE", above=0, finite=True
    )
    sessions: int = option(16, "with --load: sessions of 3 turns each", metavar="N", at_least=1)
    lmcache_python: Path | None = option(
        None, "interpreter that has LMCache and vLLM (default: made in the cache folder)", metavar="PATH"
    )

    def __post_init__(self) -> None:
        """Check each value, and what says nothing without another.

        Raises:
            ConfigError: Names the options.
        """
        super().__post_init__()
        if self.shape is not None and self.model != DEFAULT_MODEL:
            raise ConfigError("--model and --shape both say what is restored: drop one of them")
        if self.gbps is None and (self.in_memory or self.time_limit_s is not None):
            raise ConfigError("--in-memory and --time-limit-s are of --gbps: give it, or drop them")
        self._check_policies_of_links()
        if self.itl_slo_ms is not None and not self.neighbour:
            raise ConfigError("--itl-slo-ms needs --neighbour: alone there is no inter-token latency to keep")
        if self.load is not None and self.neighbour:
            raise ConfigError("--load and --neighbour exclude each other: under load every request has neighbours")
        if self.load is not None and (self.shape is not None or self.model in RANDOM_MODELS):
            name = self.shape or self.model
            raise ConfigError(f"--load needs a model that reads text; {name} has a tokenizer of made-up words")

    def _check_policies_of_links(self) -> None:
        if self.gbps is None:
            return
        if self.load is not None:
            raise ConfigError("--load and --gbps exclude each other: under load each policy has a server")
        others = [each for each in self.policies or () if each not in MODES]
        if others or STOCK not in (self.policies or MODES):
            raise ConfigError(
                f"--policies {','.join(self.policies or ())}: with --gbps {STOCK}, the reference, and of the others "
                f"those that a request can ask for: {', '.join(MODES)}"
            )

    @property
    def rounds(self) -> int:
        """Rounds of each ratio."""
        return self.repeats or (1 if self.quick else 3)

    @property
    def asked_policies(self) -> tuple[str, ...]:
        """The policies asked for."""
        usual = tuple(MODES) if self.gbps is not None else QUICK_POLICIES if self.quick else vllm_policies()
        return self.policies or usual

    @property
    def size(self) -> PrefixSize:
        """The prefix and how it is cut."""
        return PrefixSize(num_tokens=self.tokens, suffix_tokens=self.suffix, chunk_tokens=self.chunk)


add_arguments = VllmFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Run the study; prints the table and draws the figure."""
    flags = VllmFlags.of(args)
    where = probe(flags.vllm_python)
    with tempfile.TemporaryDirectory(prefix="cacheflow-vllm-") as folder:
        model = open_model(flags.model) if flags.shape is None else open_shape(flags.shape, Path(folder) / "model")
        if flags.tokens + flags.suffix + 64 > model.max_tokens:
            raise ConfigError(
                f"--tokens {flags.tokens} is too long: {model.shape.name} allows {model.max_tokens} tokens in all"
            )
        model.require_block_size(flags.chunk)
        ground = Ground(flags=flags, model=model, where=where, stores=Path(folder))
        if flags.load is not None:
            loads = Suite(out=flags.out, kind=LoadRecord, show=load_table, file="load.jsonl", only_added=True)
            return loads.run(partial(_load, ground))
        study = Suite(
            out=flags.out,
            kind=VllmRecord,
            show=vllm_tables,
            draw=lambda records: draw_vllm(records, flags.out),
            resumes=flags.gbps is not None,
            time_limit_s=flags.time_limit_s,
        )
        return study.run(partial(_over_ratios if flags.gbps is None else _over_links, ground))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a run stands on.

    Attributes:
        where: Versions, and the accelerator; see ``probe``.
        stores: Folder for stores, profiles and a made-up model, which goes with the run.
    """

    flags: VllmFlags
    model: BenchModel
    where: Mapping[str, str | None]
    stores: Path

    def fleet_options(self, suite: SuiteRun[VllmRecord] | SuiteRun[LoadRecord]) -> tuple[FleetOptions, tuple[str, ...]]:
        """How servers start, and the policies that can run here; a rival is left out where it cannot be installed."""
        flags, pythons, policies = self.flags, {}, []
        for policy in flags.asked_policies:
            find_python = rivals()[policy].find_python if policy in rivals() else None
            try:
                if find_python is not None:
                    pythons[policy] = find_python(flags.lmcache_python, flags.vllm_python)
                policies.append(policy)
            except RivalMissingError as error:
                suite.say(f"policy {policy} is left out: {error}")
        saved_bytes = (flags.rounds + 2) * prefix_bytes(self.model.shape, flags.size)
        options = FleetOptions(
            server=self._server_options(),
            store_root=self.stores,
            store_bytes=max(CPU_BYTES, saved_bytes),
            in_memory=flags.in_memory,
            pythons=pythons,
            itl_slo_ms=flags.itl_slo_ms,
        )
        return options, tuple(policies)

    def _server_options(self) -> ServerOptions:
        flags, model, shape = self.flags, self.model, self.model.shape
        longest = longest_sequence(flags.size)
        pool_bytes = POOL_PREFIXES * (longest * shape.kv_bytes_per_token + STATES_OF_PREFIX * shape.checkpoint_bytes)
        return ServerOptions(
            python=flags.vllm_python,
            model_dir=model.folder,
            dtype=DTYPE,
            chunk_tokens=flags.chunk,
            max_tokens=min(model.max_tokens, longest),
            kv_cache_gib=math.ceil(pool_bytes / 2**30),
            kv_cache_bytes=pool_bytes if self.where["accelerator"] else None,
            load_format=None if model.has_weights else LOAD_FORMAT,
            hybrid=model.is_hybrid,
            compiled=flags.compiled,
            log_dir=flags.out / "logs",
        )

    def study(self) -> VllmStudy:
        """The study, of which nothing is measured yet."""
        flags = self.flags
        options = VllmStudyOptions(
            size=flags.size,
            repeats=flags.rounds,
            neighbour=flags.neighbour,
            itl_slo_ms=flags.itl_slo_ms,
            dtype=DTYPE,
            device=self.where["accelerator"] or "cpu",
            store="memory" if flags.in_memory else "file",
            environment={
                **environment(accelerator=self.where["accelerator"]),
                **self.where,
                "eager": int(not flags.compiled),
                "omp_bind": threads_bind(),
            },
        )
        return VllmStudy(self.model, prompt_tokens(self.model, tokens_needed(flags.size, flags.rounds)), options)


def _over_ratios(ground: Ground, suite: SuiteRun[VllmRecord]) -> bool:
    """A server for each policy, on the machine together: links follow from what stock vLLM's own prefill takes."""
    flags = ground.flags
    fleet_options, policies = ground.fleet_options(suite)
    rivals_of_stock = tuple(name for name in policies if name != STOCK)
    with (
        open_fleet((STOCK,), fleet_options, bytes_per_s=1.0) as stock,
        new_progress(suite.console) as progress,
    ):
        study = ground.study()
        task = progress.add_task("measuring stock vLLM", total=flags.rounds + 2)
        with stock.turn(STOCK) as server:
            study.prepare(server.client, on_step=lambda: progress.advance(task))
        total = len(flags.ratios) * flags.rounds * (len(rivals_of_stock) + 1)
        task = progress.add_task("restoring", total=total)

        def step(what: str, ratio: float, advance: int) -> None:
            progress.update(task, description=f"ratio {ratio:g}, {what}", advance=advance)

        for ratio in sorted(flags.ratios):
            step("starting servers", ratio, 0)
            link = study.link_at(ratio)
            with open_fleet(rivals_of_stock, fleet_options, bytes_per_s=link.bytes_per_s) as others:
                fleet = Fleet(servers={**stock.servers, **others.servers}, sides=others.sides)
                study.warm_up(fleet)
                study.save(fleet, on_step=lambda name, ratio=ratio: step(f"{name} saves", ratio, 0))  # type: ignore[misc]
                study.note_idle_cores(fleet)
                for record in study.rounds(fleet, link=link, on_step=partial(step, ratio=ratio, advance=1)):
                    suite.add(record)
    return True


def _over_links(ground: Ground, suite: SuiteRun[VllmRecord]) -> bool:
    """A server for each link, which requests ask for the policies."""
    flags = ground.flags
    assert flags.gbps is not None, "asked for"
    options, policies = ground.fleet_options(suite)

    def open_server(bytes_per_s: float) -> AbstractContextManager[Fleet]:
        name = f"{bytes_per_s * 8e-9:g}-gbps"
        return open_one_server(name, policies, options, bytes_per_s=bytes_per_s)

    rounds = LinkRounds(ground.study(), policies, suite, time_limit_s=flags.time_limit_s)
    return rounds.run([each * 1e9 / 8 for each in flags.gbps], open_server)


def _load(ground: Ground, suite: SuiteRun[LoadRecord]) -> bool:
    """Measure the link for the middle ratio, then drive every policy."""
    flags, model = ground.flags, ground.model
    assert flags.load is not None, "asked for"
    fleet_options, policies = ground.fleet_options(suite)
    size, ratio = flags.size, sorted(flags.ratios)[len(flags.ratios) // 2]
    suite.say(f"measuring stock vLLM, for a link of ratio {ratio:g}")
    with open_fleet((STOCK,), fleet_options, bytes_per_s=1.0) as stock, stock.turn(STOCK) as server:
        tokens = prompt_tokens(model, size.num_tokens + size.suffix_tokens)
        costs = measure_costs(server.client, tokens, size, repeats=1, on_step=lambda: None)
    options = LoadOptions(
        rate=flags.load,
        bytes_per_s=prefix_bytes(model.shape, size) / (ratio * costs.recompute_s),
        kv_bytes_per_token=model.shape.kv_bytes_per_token,
        num_sessions=flags.sessions,
    )
    longer = replace(fleet_options.server, max_tokens=min(model.max_tokens, options.max_tokens))
    driven = run_load(
        policies,
        replace(fleet_options, server=longer),
        options,
        model=model.shape.name,
        out=flags.out,
        on_policy=lambda name: suite.say(f"{name}: {options.num_requests} requests, {options.rate:g} per second"),
    )
    for record in driven:
        suite.add(record)
    return True
