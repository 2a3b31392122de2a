"""The options of ``cacheflow simulate``, and what they must not say together."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from cacheflow.bench.options import name_list
from cacheflow.errors import ConfigError
from cacheflow.policies.objective import BatchObjective
from cacheflow.shapes.hardware import GPUS, MODEL_FILES, MODEL_SHAPES
from cacheflow.sim.granularity import MAX_CELLS
from cacheflow.sim.policies import DEFAULT_SYSTEMS, EMBEDDED, PLUGIN, SYSTEMS
from cacheflow.workloads.sessions import PROFILES
from cacheflow.workloads.traces import FORMAT_NAMES

RESULTS = "results.jsonl"
PICTURE = "ttft-cdf.png"
OBJECTIVES = tuple(each.value for each in BatchObjective)
OURS = (PLUGIN, EMBEDDED)
"""The systems that have an objective."""
DEFAULT_SESSION_RATE = 0.5
DEFAULT_SESSIONS = 200
GREATEST_FACTOR = 1e6
"""Rates and loads may be this many times more, or less, than one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cacheflow simulate``."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", type=Path, metavar="FILE", help="requests to replay (.jsonl, .csv, .parquet; .gz)")
    what.add_argument("--workload", metavar="NAME", help=f"sessions to generate: {', '.join(PROFILES)}")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"gets {RESULTS} and {PICTURE}")
    _add_cluster_arguments(parser)
    _add_workload_arguments(parser)
    parser.add_argument(
        "--costs", default="roofline", metavar="SOURCE",
        help="roofline (peaks), published (see --measured), or the file of a cacheflow calibrate profile",
    )  # fmt: skip
    parser.add_argument("--measured", type=Path, metavar="DIR", help="folder of LLMServingSim's CSV files")
    parser.add_argument(
        "--extrapolate", action="store_true", help="continue published attention beyond what was measured; is recorded"
    )
    parser.add_argument(
        "--policies", type=name_list, default=DEFAULT_SYSTEMS, metavar="A,B",
        help=f"of {', '.join(SYSTEMS)} (default: all but {EMBEDDED}, whose order of new prompts no server has)",
    )  # fmt: skip
    parser.add_argument(
        "--objective",
        metavar="NAME",
        help=f"of {' and '.join(OURS)}: {', '.join(OBJECTIVES)} (default: {OBJECTIVES[0]})",
    )
    parser.add_argument("--slo-ttft-s", type=float, default=2.0, metavar="S", help="a first token in time (default: 2)")
    parser.add_argument(
        "--max-cells", type=int, default=MAX_CELLS, metavar="N",
        help=f"cells of one restoration (default: {MAX_CELLS}); 0 for every layer and chunk: exact, and slow",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")


def _add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", type=Path, metavar="FILE", help=".json or .toml; options override it")
    parser.add_argument("--replicas", type=int, metavar="N", help="engines, a GPU and a link each (default: 8)")
    parser.add_argument("--model", metavar="SHAPE", help=f"{', '.join(MODEL_SHAPES)}, or {MODEL_FILES}")
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}, or a .json file of peaks")
    parser.add_argument("--bandwidth-gbps", type=float, metavar="G", help="of each link to the store (default: 10)")
    parser.add_argument("--kv-tokens", type=int, metavar="N", help="tokens in GPU memory (default: what it leaves)")


def _add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", metavar="NAME", help=f"of the trace: auto (default), {', '.join(FORMAT_NAMES)}")
    parser.add_argument("--limit", type=int, metavar="N", help="requests at most")
    parser.add_argument("--duration-s", type=float, metavar="S", help="seconds of arrivals at most")
    parser.add_argument("--rate-scale", type=float, default=1.0, metavar="X", help="X times the load (default: 1)")
    parser.add_argument("--repeat", type=int, metavar="N", help="the trace N times over, with fresh prefixes")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="leave out longer prompts")
    parser.add_argument("--sessions", type=int, metavar="N", help=f"of --workload (default: {DEFAULT_SESSIONS})")
    parser.add_argument(
        "--session-rate", type=float, metavar="X",
        help=f"sessions that start a second, at random (--workload: {DEFAULT_SESSION_RATE}; --trace: as it says)",
    )  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what no simulation can have, and options that contradict each other.

    Raises:
        ConfigError: Names the option and what is allowed, or which to drop.
    """
    _check_names(args)
    _check_numbers(args)
    for given, option, without in (
        (args.trace is not None and args.sessions is not None, "--sessions", "--workload; a trace has its own"),
        (args.workload is not None and args.format is not None, "--format", "--trace"),
        (args.workload is not None and args.repeat is not None, "--repeat", "--trace; more sessions are --sessions"),
        (args.costs != "published" and args.measured is not None, "--measured", "--costs published"),
        (args.costs != "published" and args.extrapolate, "--extrapolate", "--costs published"),
        (
            not set(OURS) & set(args.policies) and args.objective is not None,
            "--objective",
            f"{' or '.join(OURS)} among the --policies",
        ),
    ):
        if given:
            raise ConfigError(f"{option} says nothing without {without}: drop {option}")


def _check_names(args: argparse.Namespace) -> None:
    if not args.policies:
        raise ConfigError(f"--policies names none; known are {', '.join(SYSTEMS)}")
    formats = ("auto", *FORMAT_NAMES)
    for option, what, names, known in (
        ("--policies", "policy", args.policies, tuple(SYSTEMS)),
        ("--objective", "objective", (args.objective,), OBJECTIVES),
        ("--format", "trace format", (args.format,), formats),
        ("--workload", "workload", (args.workload,), tuple(PROFILES)),
    ):
        for name in names:
            if name is not None and name not in known:
                raise ConfigError(f"{option}: {what} {name!r} is not known; known are {', '.join(known)}")


def _check_numbers(args: argparse.Namespace) -> None:
    for option, count in (
        ("--limit", args.limit),
        ("--repeat", args.repeat),
        ("--max-tokens", args.max_tokens),
        ("--sessions", args.sessions),
    ):
        if count is not None and count < 1:
            raise ConfigError(f"{option} is {count}, must be at least 1")
    for option, value in (("--duration-s", args.duration_s), ("--slo-ttft-s", args.slo_ttft_s)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option} is {value}, must be above 0 and finite")
    for option, value in (("--rate-scale", args.rate_scale), ("--session-rate", args.session_rate)):
        if value is not None and not 1 / GREATEST_FACTOR <= value <= GREATEST_FACTOR:
            raise ConfigError(f"{option} is {value}, must be between {1 / GREATEST_FACTOR:g} and {GREATEST_FACTOR:g}")
    if args.seed < 0:
        raise ConfigError(f"--seed is {args.seed}, must be 0 or more")
    if args.max_cells < 0 or args.max_cells == 1:
        raise ConfigError(f"--max-cells is {args.max_cells}, must be 2 or more, or 0 for exact grids")
    _check_common_tokens(args)


def _check_common_tokens(args: argparse.Namespace) -> None:
    if args.workload is not None and args.max_tokens is not None:
        common_tokens = PROFILES[args.workload].common_tokens
        if args.max_tokens <= common_tokens:
            raise ConfigError(
                f"--max-tokens is {args.max_tokens}, must be above the {common_tokens} tokens that all prompts of "
                f"--workload {args.workload} begin with"
            )
