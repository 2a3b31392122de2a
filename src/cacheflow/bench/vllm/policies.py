"""What runs inside stock vLLM: the policies by name, and the connector configuration each of them is.

Pure: nothing here imports vLLM. Every configuration goes to the server as ``--kv-transfer-config``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheflow.errors import ConfigError

STOCK = "vllm"
"""vLLM's own chunked prefill: the baseline, the reference for tokens, and where costs are measured."""
OFFLOADING = "vllm_offloading"
LMCACHE = "lmcache"
OWN_POLICIES = ("load", "cake", "cacheflow")
"""Restore policies of our connector."""
VLLM_POLICIES = (STOCK, *OWN_POLICIES, OFFLOADING, LMCACHE)
QUICK_POLICIES = (STOCK, *OWN_POLICIES)

LINK_NOTES: Mapping[str, str] = {
    STOCK: "no link: nothing is loaded",
    **dict.fromkeys(OWN_POLICIES, "the store's reads are delivered on the schedule of the link"),
    OFFLOADING: "bytes are copied host to host in pieces, each due on the schedule of the link",
    LMCACHE: (
        "LMCache has no bandwidth option for its memory tier: without shared memory its bytes come over TCP, "
        "and a relay between its server and vLLM paces them"
    ),
}
"""How the link of a policy is slowed down, for the record."""

CPU_BYTES = 2 * 1024**3
"""Host memory a store may use; the bench keeps a few prefixes of at most some hundred MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSetup:
    """Where a policy's server keeps prefixes, and how fast it may read them.

    Attributes:
        bytes_per_s: Bandwidth of the link, payload bytes.
        chunk_tokens: Chunk of vLLM's prefill, and of our store.
        store_dir: Folder of a store that writes files.
        profile_dir: Folder in which our connector keeps the costs it measured, for all its policies alike.
        lmcache_port: Port at which vLLM reaches LMCache's server (through the relay); None without one.
        itl_slo_ms: The inter-token latency that our connector is asked to keep; others know no such thing.
    """

    bytes_per_s: float
    chunk_tokens: int
    store_dir: Path
    profile_dir: Path
    lmcache_port: int | None = None
    itl_slo_ms: float | None = None


def check_policies(names: Sequence[str]) -> None:
    """Pass if every name is known.

    Raises:
        ConfigError: A name is unknown, or there is none.
    """
    unknown = [name for name in names if name not in VLLM_POLICIES]
    if unknown or not names:
        raise ConfigError(f"--policies {','.join(unknown) or '(none)'} unknown; known: {', '.join(VLLM_POLICIES)}")


def transfer_config(policy: str, setup: LinkSetup) -> dict[str, Any] | None:
    """The value of ``--kv-transfer-config``; None for stock vLLM, which gets no connector.

    Raises:
        ConfigError: The policy is unknown, or needs a port it was not given.
    """
    check_policies((policy,))
    if policy == STOCK:
        return None
    if policy == OFFLOADING:
        return _config("OffloadingConnector", None, _offloading(setup))
    if policy == LMCACHE:
        return _config("LMCacheMPConnector", "lmcache.integration.vllm.lmcache_mp_connector", _lmcache(setup))
    return _config("CacheFlowConnector", "cacheflow.vllm.connector", _own(policy, setup))


def _config(connector: str, module: str | None, extra: Mapping[str, Any]) -> dict[str, Any]:
    config = {
        "kv_connector": connector,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",  # vLLM's default fails the request
        "kv_connector_extra_config": dict(extra),
    }
    return config if module is None else {**config, "kv_connector_module_path": module}


def _own(policy: str, setup: LinkSetup) -> dict[str, Any]:
    return {
        "store": "file",
        "store_path": str(setup.store_dir),
        "cpu_bytes_to_use": CPU_BYTES,
        "chunk_tokens": setup.chunk_tokens,
        "policy": policy,
        "profile_dir": str(setup.profile_dir),
        "throttle_bytes_per_s": setup.bytes_per_s,
        **({} if setup.itl_slo_ms is None else {"itl_slo_ms": setup.itl_slo_ms}),
    }


def _offloading(setup: LinkSetup) -> dict[str, Any]:
    return {
        "spec_name": "PacedHostOffloadingSpec",
        "spec_module_path": "cacheflow.bench.vllm.rivals.offloading_spec",
        "cpu_bytes_to_use": CPU_BYTES,
        "throttle_bytes_per_s": setup.bytes_per_s,
    }


def _lmcache(setup: LinkSetup) -> dict[str, Any]:
    if setup.lmcache_port is None:
        raise ConfigError("policy lmcache needs the port of LMCache's server")
    return {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": setup.lmcache_port}
