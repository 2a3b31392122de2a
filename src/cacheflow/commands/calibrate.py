"""``cacheflow calibrate``: measures a model and a store's link on this machine and writes a profile."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import TaskID

from cacheflow.bench.options import DTYPES, Flags, option
from cacheflow.bench.suite import new_progress
from cacheflow.bench.table import Row, text_table
from cacheflow.errors import ConfigError, ProfileError
from cacheflow.plan.cell_sizes import chunk_tokens_of
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.stores.shared import UNBOUNDED
from cacheflow.stores.url import file_url
from cacheflow.types import Clock

if TYPE_CHECKING:
    from cacheflow.plan.problem import LinkCost
    from cacheflow.profiling.calibrate import CalibrationOptions
    from cacheflow.profiling.profile import Profile


ROUNDS = {"cpu": 2, "cuda": 3}
"""Of measurement, unless others are asked for."""


@dataclass(frozen=True, kw_only=True)
class CalibrateFlags(Flags):
    """The options of ``calibrate``."""

    model: str = option(help="model folder, or smollm2-135m", words="positional", metavar="MODEL")
    device: str = option("cpu", choices=("cpu", "cuda"))
    dtype: str = option("bfloat16", choices=DTYPES)
    flash3: bool = option(False, "compute attention by FlashAttention-3 (CUDA, package fa3-fwd)")
    chunk: int | None = option(None, "chunk tokens (default: 512; 1024 with --device cuda)", metavar="N")
    max_tokens: int | None = option(None, "longest sequence (default: the model's, up to 8192)", metavar="N")
    repeats: int | None = option(
        None, "rounds of measurement (default: 2; with --device cuda 3, after one that is not kept)", metavar="N"
    )
    time_limit_s: float = option(
        180.0, "seconds of measuring; far offsets, then repeats, then big passes are left out and named",
        metavar="S", above=0, finite=True,
    )  # fmt: skip
    accept_noise: bool = option(
        False, "write the profile although the machine was busy; it is marked, and said again when it is loaded"
    )
    store: tuple[str, ...] | None = option(
        None, "store whose link is measured, such as file:///mnt/kv; given several times, the fastest store first, the "
        "tiers of one (default: a temporary folder)", words="repeated", metavar="URL",
    )  # fmt: skip
    bandwidth_gbps: float | None = option(
        None, "throttle the store to this link, in gigabits per second", metavar="G", above=0
    )
    out: Path | None = option(None, "profile to write (default: in the cache folder)", metavar="FILE")

    def __post_init__(self) -> None:
        """Check the URL.

        Raises:
            ConfigError: It names no store.
        """
        super().__post_init__()
        if self.store is not None:
            check_store_url(self.store)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the longest chunk."""
        return chunk_tokens_of(self.device, self.chunk)

    @property
    def rounds(self) -> int:
        """How often each chunk is timed."""
        return ROUNDS[self.device] if self.repeats is None else self.repeats


add_arguments = CalibrateFlags.add_flags


def run(args: argparse.Namespace, *, clock: Clock = time.perf_counter, cpu_clock: Clock = time.process_time) -> int:
    """Measure with a progress bar, print what was found, write the profile.

    Raises:
        ConfigError: An option is wrong, or the time limit is too short for any profile.
        ProfileError: The machine was busy, and nothing was written.
    """
    from cacheflow.engine.model import load_model
    from cacheflow.profiling.calibrate import Calibration
    from cacheflow.profiling.profile import profile_path, require_place, save_profile
    from cacheflow.tensors.device import device_name

    flags = CalibrateFlags.of(args)
    options = _options(flags)
    console = Console()
    model = load_model(flags.model, device=flags.device, dtype=flags.dtype, flash3=flags.flash3)
    path = flags.out or profile_path(device=device_name(model.device), model=model.name, dtype=flags.dtype)
    require_place(path)
    with new_progress(console) as progress:
        tasks: dict[str, TaskID] = {}

        def on_step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        began_s = clock()
        on_step("link", 0, 1)
        link, tiers = _measure_store(flags, flags.chunk_tokens * model.shape.kv_bytes_per_token_layer)
        on_step("link", 1, 1)
        options = replace(options, time_limit_s=_left_s(flags.time_limit_s, clock() - began_s))
        calibration = Calibration(model, options, on_step, clock, cpu_clock)
        profile = calibration.run(link)
    _print(profile, console)
    for name, bytes_per_s in tiers.items():
        console.print(f"tier {name}: {bytes_per_s / 1e9:.3g} GB/s", soft_wrap=True)
    for each in calibration.left_out:
        console.print(f"left out, within {flags.time_limit_s:g} s: {each}", soft_wrap=True)
    if flags.rounds == 1:
        console.print("every chunk was timed once: --repeats 2 would tell whether the machine was busy")
    if profile.busy and not flags.accept_noise:
        raise ProfileError(
            f"{profile.busy}. No profile was written, {path} is as before: calibrate again when the machine is quiet, "
            "or write what was measured with --accept-noise"
        )
    save_profile(profile, path)
    if profile.busy:
        console.print(f"{profile.busy}. The profile says so, and so will what loads it", soft_wrap=True)
    console.print(f"wrote {path}", markup=False)
    return 0


def _options(flags: CalibrateFlags) -> CalibrationOptions:
    """What is to be measured, checked before a model is loaded."""
    import torch

    from cacheflow.profiling.calibrate import CalibrationOptions

    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device that torch can use")
    return CalibrationOptions(
        chunk_tokens=flags.chunk_tokens,
        max_tokens=flags.max_tokens,
        repeats=flags.rounds,
        time_limit_s=flags.time_limit_s,
    )


def _left_s(limit_s: float, spent_s: float) -> float:
    """What the link left of the time limit."""
    if spent_s >= limit_s:
        raise ConfigError(
            f"--time-limit-s is {limit_s:g}, measuring the store's link alone took {spent_s:.0f} s: give more time"
        )
    return limit_s - spent_s


def _measure_store(flags: CalibrateFlags, object_bytes: int) -> tuple[LinkCost, dict[str, float]]:
    """The link of the store, of several tiers the fastest, and what each tier delivers, by name."""
    from cacheflow.stores.probe import measure_link
    from cacheflow.stores.throttled import ThrottledStore

    num_objects = 64 if flags.bandwidth_gbps is None else 16
    with tempfile.TemporaryDirectory(prefix="cacheflow-") as scratch:
        # Without a bound of its own, so that the probes push out nothing of the user's.
        store = open_store(flags.store or (file_url(Path(scratch)),), capacity_bytes=UNBOUNDED, only_look=True)
        if flags.bandwidth_gbps is not None:
            store = ThrottledStore(store, flags.bandwidth_gbps * 1e9 / 8)
        with store:
            link = measure_link(store, object_bytes=object_bytes, num_objects=num_objects, dtype=flags.dtype)
            tiers = store.stats().tiers
            return link, {tier.name: tier.bytes_per_s for tier in tiers if tier.bytes_per_s is not None}


def _print(profile: Profile, console: Console) -> None:
    costs, chunk = profile.costs, profile.chunk_tokens
    rows: list[Row] = []
    for offset in next(iter(costs.kinds.values())).offsets:
        full_s = sum(costs.kinds[kind].full_s(chunk, offset) for kind in costs.layer_kinds)
        kv_only_s = sum(costs.kinds[kind].kv_only_s(chunk, offset) for kind in costs.layer_kinds)
        rows.append(((str(offset), f"{full_s * 1e3:.1f}", f"{kv_only_s * 1e3:.1f}"), None))
    title = f"{costs.identity.model}, {costs.identity.dtype}, {costs.identity.device}"
    heads = ("tokens before the chunk", f"{chunk} tokens, ms", "keys and values only, ms")
    console.print(text_table(title, heads, rows, padding=1))
    for length, seconds in profile.big_pass_s.items():
        console.print(f"one big pass of {length} tokens: {seconds:.3f} s")
    gigabytes = profile.link.bytes_per_s / 1e9
    console.print(f"call overhead {costs.call_overhead_s * 1e3:.2f} ms a layer, head {costs.head_s * 1e3:.2f} ms")
    console.print(f"link: {gigabytes:.3g} GB/s, latency {profile.link.latency_s * 1e3:.2f} ms")
    console.print(
        f"crossover length L_delta: {profile.crossover_tokens} tokens (layer-wise up to here, then token-wise)"
    )
    even = profile.break_even_tokens
    console.print(
        f"break-even prefix: {'none in range' if even is None else f'{even} tokens'} (restoring pays from here)"
    )
