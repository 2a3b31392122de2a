"""``cacheflow calibrate``: measures a model and a store's link on this machine and writes a profile."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cacheflow.errors import ConfigError, ProfileError
from cacheflow.types import Clock

if TYPE_CHECKING:
    from cacheflow.plan.problem import LinkCost
    from cacheflow.profiling.calibrate import CalibrationOptions
    from cacheflow.profiling.profile import Profile

TIME_LIMIT_S = 180.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``calibrate``."""
    parser.add_argument("model", metavar="MODEL", help="model folder, or smollm2-135m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="chunk tokens (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest sequence (default: the model's, up to 8192)"
    )
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="rounds of measurement (default: 2)")
    parser.add_argument(
        "--time-limit-s", type=float, default=TIME_LIMIT_S, metavar="S",
        help="seconds of measuring; far offsets, then repeats, then big passes are left out and named "
        "(default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--accept-noise", action="store_true",
        help="write the profile although the machine was busy; it is marked, and whoever loads it is told",
    )  # fmt: skip
    parser.add_argument("--store", type=Path, metavar="DIR", help="folder of the file store whose link is measured "
                        "(default: a temporary folder)")  # fmt: skip
    parser.add_argument("--bandwidth-gbps", type=float, metavar="G",
                        help="throttle the store to this link, in gigabits per second")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="profile to write (default: in the cache folder)")


def run(args: argparse.Namespace, *, clock: Clock = time.perf_counter, cpu_clock: Clock = time.process_time) -> int:
    """Measure with a progress bar, print what was found, write the profile.

    Args:
        args: The options.
        clock: Times everything.
        cpu_clock: Processor seconds of this process.

    Raises:
        ConfigError: An option is wrong, or the time limit is too short for any profile.
        ProfileError: The machine was busy, and nothing was written.
    """
    from cacheflow.engine.model import load_model
    from cacheflow.profiling.calibrate import Calibration
    from cacheflow.profiling.profile import profile_path, require_place, save_profile
    from cacheflow.tensors.device import device_name

    options = _options(args)
    console = Console()
    model = load_model(args.model, device=args.device, dtype=args.dtype)
    path = args.out or profile_path(device=device_name(model.device), model=model.name, dtype=args.dtype)
    require_place(path)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def on_step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        began_s = clock()
        on_step("link", 0, 1)
        link = _measure_store(args, args.chunk * model.shape.kv_bytes_per_token_layer)
        on_step("link", 1, 1)
        options = replace(options, time_limit_s=_left_s(args.time_limit_s, clock() - began_s))
        calibration = Calibration(model, options, on_step, clock, cpu_clock)
        profile = calibration.run(link)
    _print(profile, console)
    for each in calibration.left_out:
        console.print(f"left out, within {args.time_limit_s:g} s: {each}", soft_wrap=True)
    if args.repeats == 1:
        console.print("every chunk was timed once: --repeats 2 would tell whether the machine was busy")
    if profile.busy and not args.accept_noise:
        raise ProfileError(
            f"{profile.busy}. No profile was written, {path} is as before: calibrate again when the machine is quiet, "
            "or write what was measured with --accept-noise"
        )
    save_profile(profile, path)
    if profile.busy:
        console.print(f"{profile.busy}. The profile says so, and so will whoever loads it", soft_wrap=True)
    console.print(f"wrote {path}", markup=False)
    return 0


def _options(args: argparse.Namespace) -> CalibrationOptions:
    """What is to be measured, checked before a model is loaded.

    Raises:
        ConfigError: An option is wrong; names it.
    """
    import torch

    from cacheflow.profiling.calibrate import CalibrationOptions

    if not 0 < args.time_limit_s < math.inf:
        raise ConfigError(f"--time-limit-s is {args.time_limit_s}, must be above 0 and finite")
    if args.bandwidth_gbps is not None and not args.bandwidth_gbps > 0:
        raise ConfigError(f"--bandwidth-gbps is {args.bandwidth_gbps}, must be above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device that torch can use")
    return CalibrationOptions(
        chunk_tokens=args.chunk, max_tokens=args.max_tokens, repeats=args.repeats, time_limit_s=args.time_limit_s
    )


def _left_s(limit_s: float, spent_s: float) -> float:
    """What the link left of the time limit.

    Raises:
        ConfigError: That is nothing.
    """
    if spent_s >= limit_s:
        raise ConfigError(
            f"--time-limit-s is {limit_s:g}, measuring the store's link alone took {spent_s:.0f} s: give more time"
        )
    return limit_s - spent_s


def _measure_store(args: argparse.Namespace, object_bytes: int) -> LinkCost:
    from cacheflow.stores.base import Store
    from cacheflow.stores.file import FileStore
    from cacheflow.stores.probe import measure_link
    from cacheflow.stores.throttled import ThrottledStore

    num_objects = 64 if args.bandwidth_gbps is None else 16
    with tempfile.TemporaryDirectory(prefix="cacheflow-") as scratch:
        # Without a bound of its own, so that the probes push out nothing of the user's.
        store: Store = FileStore(args.store or Path(scratch), capacity_bytes=1 << 62)
        if args.bandwidth_gbps is not None:
            store = ThrottledStore(store, args.bandwidth_gbps * 1e9 / 8)
        with store:
            return measure_link(store, object_bytes=object_bytes, num_objects=num_objects)


def _print(profile: Profile, console: Console) -> None:
    costs, chunk = profile.costs, profile.chunk_tokens
    table = Table(title=f"{costs.identity.model}, {costs.identity.dtype}, {costs.identity.device}")
    table.add_column("tokens before the chunk", justify="right")
    table.add_column(f"{chunk} tokens, ms", justify="right")
    table.add_column("keys and values only, ms", justify="right")
    for offset in next(iter(costs.kinds.values())).offsets:
        full_s = sum(costs.kinds[kind].full_s(chunk, offset) for kind in costs.layer_kinds)
        kv_only_s = sum(costs.kinds[kind].kv_only_s(chunk, offset) for kind in costs.layer_kinds)
        table.add_row(str(offset), f"{full_s * 1e3:.1f}", f"{kv_only_s * 1e3:.1f}")
    console.print(table)
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
