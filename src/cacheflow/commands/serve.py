"""``cacheflow serve``: finds the model, hands over to ``vllm.serve``; here because the plugin knows no demo model."""

from __future__ import annotations

import argparse
import os
import sys

from cacheflow.engine.smollm2 import SMOLLM2_NAME, smollm2_folder
from cacheflow.errors import ConfigError
from cacheflow.vllm.serve import add_option_flags, check, config_line, options_from, serve, unknown_hint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and the connector's options; vLLM's own arrive as ``args.passed_on``."""
    parser.usage = "cacheflow serve MODEL [options of the connector] [-- options of vLLM's server]"
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help=f"name or folder, as vLLM takes it, or {SMOLLM2_NAME}, the demo's"
    )
    parser.add_argument("--print-config", action="store_true", help="print the --kv-transfer-config line and stop")
    add_option_flags(parser)
    parser.set_defaults(unknown_hint=unknown_hint())


def run(args: argparse.Namespace) -> int:
    """Print the configuration; become vLLM's server.

    Raises:
        ConfigError: See ``serve``; or there is no MODEL.
    """
    options = options_from(args)
    model, passed_on = args.model, list(args.passed_on)
    if model is None and not args.print_config:
        raise ConfigError("which model? cacheflow serve MODEL [options] [-- options of vLLM's server]")
    if args.print_config:
        _, kind = check(model, options, passed_on, environment=os.environ)
        sys.stdout.write(config_line(options, kind) + "\n")
        return 0
    if model == SMOLLM2_NAME:
        model = str(smollm2_folder())
        if not any(word.replace("_", "-").startswith("--served-model-name") for word in passed_on):
            passed_on += ["--served-model-name", SMOLLM2_NAME]
    return serve(model, options, passed_on, environment=os.environ)
