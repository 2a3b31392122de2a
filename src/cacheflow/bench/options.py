"""Types of command-line options that several benchmarks share."""

from __future__ import annotations

import argparse


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


def name_list(text: str) -> tuple[str, ...]:
    """``a,b`` as names, without repeats."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
