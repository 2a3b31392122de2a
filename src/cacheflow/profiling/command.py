"""``cacheflow calibrate``: measures a model and a store's link on this machine and writes a profile."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cacheflow.errors import ConfigError

if TYPE_CHECKING:
    from cacheflow.plan.problem import LinkCost
    from cacheflow.profiling.profile import Profile


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
    parser.add_argument("--store", type=Path, metavar="DIR", help="folder of the file store whose link is measured "
                        "(default: a temporary folder)")  # fmt: skip
    parser.add_argument("--bandwidth-gbps", type=float, metavar="G",
                        help="throttle the store to this link, in gigabits per second")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="profile to write (default: in the cache folder)")


def run(args: argparse.Namespace) -> int:
    """Measure with a progress bar, write the profile, print what it says."""
    import torch

    from cacheflow.engine.model import load_model
    from cacheflow.profiling.calibrate import Calibration, CalibrationOptions
    from cacheflow.profiling.profile import profile_path, require_place, save_profile
    from cacheflow.tensors.device import device_name

    options = CalibrationOptions(chunk_tokens=args.chunk, max_tokens=args.max_tokens, repeats=args.repeats)
    if args.bandwidth_gbps is not None and not args.bandwidth_gbps > 0:
        raise ConfigError(f"--bandwidth-gbps is {args.bandwidth_gbps}, must be above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device that torch can use")
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

        calibration = Calibration(model, options, on_step)
        on_step("link", 0, 1)
        link = _measure_store(args, args.chunk * model.shape.kv_bytes_per_token_layer)
        on_step("link", 1, 1)
        profile = calibration.run(link)
    save_profile(profile, path)
    _print(profile, console)
    console.print(f"wrote {path}", markup=False)
    return 0


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
