"""What runs inside stock vLLM: the policies by name, and the connector configuration each of them is.

Pure: nothing here imports vLLM. Every configuration goes to the server as ``--kv-transfer-config``. Rivals' connectors
are in a folder of their own, which only the repository has; without it they are no policies.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cacheflow.errors import CacheFlowError, ConfigError
from cacheflow.vllm.plugin import CONNECTOR, CONNECTORS

STOCK = "vllm"
"""vLLM's own chunked prefill: the baseline, the reference for tokens, and where costs are measured."""
OWN_POLICIES = ("load", "cake", "cacheflow")
"""Restore policies of our connector."""
QUICK_POLICIES = (STOCK, *OWN_POLICIES)
RIVALS = "cacheflow.bench.vllm.rivals"
"""Imported by name, so that the product does not need it."""
CPU_BYTES = 2 * 1024**3
"""Host memory a store may use; the bench keeps a few prefixes of at most some hundred MB."""
LOOKUP_TIMEOUT_S = 1.0
"""A busy machine may be late with an answer: by default the request would then be prefilled, and its time be that."""
MODES = {STOCK: "off", "load": "load", "cacheflow": "auto"}
"""What asks a server with our connector for a policy, request by request (``kv_transfer_params``)."""


class RivalMissingError(CacheFlowError, RuntimeError):
    """A rival cannot be installed or imported here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSetup:
    """Where a policy's server keeps prefixes, and how fast it may read them.

    Attributes:
        bytes_per_s: Bandwidth of the link, payload bytes.
        store_dir: Folder of our connector's file store; None: the memory of the server's only worker.
        store_bytes: Most that our connector's store may hold.
        profile_dir: Folder in which our connector keeps the costs it measured, for all its policies alike.
        connector: Of ours, the one that takes the model.
        side_port: Port at which vLLM reaches a rival's own server (through its paced link); None without one.
    """

    bytes_per_s: float
    chunk_tokens: int
    store_dir: Path | None
    profile_dir: Path
    side_port: int | None = None
    itl_slo_ms: float | None = None
    boundary_states: bool | None = None
    connector: str = CONNECTOR
    store_bytes: int = CPU_BYTES


class SideServer(Protocol):
    """A rival's own server beside vLLM, with a paced link in front of it."""

    @property
    def port(self) -> int:
        """Where vLLM reaches it."""
        ...

    @property
    def loaded_bytes(self) -> int:
        """Bytes that came over its link so far."""
        ...

    def cpu_s(self) -> float:
        """Processor seconds it used so far."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class OpenSide(Protocol):
    """Starts a side server, which its caller closes."""

    def __call__(self, python: Path, *, bytes_per_s: float, log_dir: Path) -> SideServer:
        """Start it with an interpreter; raises ``ServerError`` when it does not come up."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another connector.

    Attributes:
        link_note: How its link is slowed down, for the record.
        find_python: Its interpreter, which has vLLM too, from the one asked for and vLLM's; raises
            ``RivalMissingError``. None: vLLM's own does.
        may_freeze: Whether its vLLM server may be stopped while it is not in turn.
    """

    link_note: str
    transfer: Callable[[LinkSetup], dict[str, Any]]
    find_python: Callable[[Path | None, Path], Path] | None = None
    open_side: OpenSide | None = None
    may_freeze: bool = True


@cache
def rivals() -> Mapping[str, Rival]:
    """The rivals by policy; empty where this package has none."""
    if find_spec(RIVALS) is None:
        return {}
    found: Mapping[str, Rival] = importlib.import_module(f"{RIVALS}.registry").RIVALS
    return found


def vllm_policies() -> tuple[str, ...]:
    """Every policy that can be asked for here, in the order of tables."""
    return (STOCK, *OWN_POLICIES, *rivals())


def link_note(policy: str) -> str:
    """How the link of a policy is slowed down, for the record."""
    if policy == STOCK:
        return "no link: nothing is loaded"
    if policy in OWN_POLICIES:
        return "the store's reads are delivered on the schedule of the link"
    return rivals()[policy].link_note


def transfer_config(policy: str, setup: LinkSetup) -> dict[str, Any] | None:
    """The value of ``--kv-transfer-config``; None for stock vLLM, which gets no connector.

    Raises:
        ConfigError: The policy is unknown, or needs a port it was not given.
    """
    if policy == STOCK:
        return None
    if policy in OWN_POLICIES:
        return connector_config(setup.connector, CONNECTORS[setup.connector], _own(policy, setup))
    if policy not in rivals():
        raise ConfigError(f"policy {policy!r} is not known; known are {', '.join(vllm_policies())}")
    return rivals()[policy].transfer(setup)


def connector_config(connector: str, module: str | None, extra: Mapping[str, Any]) -> dict[str, Any]:
    """A connector's configuration; ``module`` is where vLLM finds one that is not its own."""
    config = {
        "kv_connector": connector,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",  # vLLM's default fails the request
        "kv_connector_extra_config": dict(extra),
    }
    return config if module is None else {**config, "kv_connector_module_path": module}


def _own(policy: str, setup: LinkSetup) -> dict[str, Any]:
    asked = {"itl_slo_ms": setup.itl_slo_ms, "boundary_states": setup.boundary_states}
    store = {"store": "memory"} if setup.store_dir is None else {"store": "file", "store_path": str(setup.store_dir)}
    return {
        **store,
        "cpu_bytes_to_use": setup.store_bytes,
        "lookup_timeout_s": LOOKUP_TIMEOUT_S,
        "chunk_tokens": setup.chunk_tokens,
        "policy": policy,
        "profile_dir": str(setup.profile_dir),
        "throttle_bytes_per_s": setup.bytes_per_s,
        **{key: value for key, value in asked.items() if value is not None},
    }
