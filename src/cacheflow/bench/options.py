"""Types of command-line options that several benchmarks share."""

from __future__ import annotations

import argparse
import math
import signal
import tempfile
from pathlib import Path

from cacheflow.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"
"""What is restored unless ``--model`` or ``--shape`` says otherwise."""


def float_list(text: str) -> tuple[float, ...]:
    """``0.5,1,inf`` as floats.

    Raises:
        argparse.ArgumentTypeError: Not a comma-separated list of numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers") from error


def int_list(text: str) -> tuple[int, ...]:
    """``512,4096`` as integers.

    Raises:
        argparse.ArgumentTypeError: Not a comma-separated list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of whole numbers") from error


def make_folder(option: str, folder: Path) -> None:
    """Create the folder that an option names, parents included; one that is there is taken as it is.

    Raises:
        ConfigError: It cannot be created, or nothing can be written into it; names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # now, not after the work
            probe.write(b"-")
    except OSError as error:
        raise ConfigError(f"{option} {folder} cannot be used: {error}") from error


def add_study_arguments(parser: argparse.ArgumentParser, *, suffix: int, repeats: int) -> None:
    """Add what every benchmark of restorations on this machine is told; ``suffix`` and ``repeats`` are defaults."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results.jsonl and figures")
    parser.add_argument("--model", metavar="NAME", help=f"model folder or name (default: {DEFAULT_MODEL})")
    parser.add_argument("--shape", help="random weights of this shape instead of a model (see cacheflow plan)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--suffix", type=int, default=suffix, metavar="N", help="new tokens (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="chunk tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help="alternations (default: %(default)s)")
    parser.add_argument("--time-limit-s", type=float, metavar="S",
                        help="stop after this long; the same command goes on where it stopped")  # fmt: skip


def check_study_arguments(args: argparse.Namespace) -> None:
    """Check what ``add_study_arguments`` added.

    Raises:
        ConfigError: A number is out of range, or two options contradict each other; names them.
    """
    if args.model is not None and args.shape is not None:
        raise ConfigError("--model and --shape both say what is restored: drop one of them")
    for key in ("suffix", "chunk", "repeats"):
        if getattr(args, key) < 1:
            raise ConfigError(f"--{key} is {getattr(args, key)}, must be at least 1")
    if args.time_limit_s is not None and not args.time_limit_s > 0:
        raise ConfigError(f"--time-limit-s is {args.time_limit_s}, must be above 0")


def check_prefix_arguments(args: argparse.Namespace, *counts: str) -> None:
    """Check what benchmarks of a prefix inside vLLM share: counts, whole chunks, ratios.

    Args:
        args: With ``tokens``, ``chunk`` and ``ratios``.
        counts: Options that must be at least 1, as argparse names them.

    Raises:
        ConfigError: One is out of range; names it.
    """
    for key in counts:
        if getattr(args, key) < 1:
            raise ConfigError(f"--{key} is {getattr(args, key)}, must be at least 1")
    if args.tokens % args.chunk:
        raise ConfigError(
            f"--tokens {args.tokens} must be a multiple of --chunk {args.chunk}: only whole chunks are saved"
        )
    if not args.ratios or not all(ratio > 0 and math.isfinite(ratio) for ratio in args.ratios):
        raise ConfigError(f"--ratios {args.ratios} must be above 0 and finite")


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does, so that servers are ended by what started them."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def name_list(text: str) -> tuple[str, ...]:
    """``a,b`` as names, without repeats."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
