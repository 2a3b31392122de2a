"""Types of command-line options that several benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from cacheflow.errors import ConfigError


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
        ConfigError: It cannot be created; names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {folder} cannot be used: {error}") from error


def name_list(text: str) -> tuple[str, ...]:
    """``a,b`` as names, without repeats."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
