"""The rivals by policy."""

from __future__ import annotations

from cacheflow.bench.vllm.policies import CPU_BYTES, LinkSetup, Rival, connector_config
from cacheflow.bench.vllm.rivals import lmcache
from cacheflow.errors import ConfigError


def _offloading(setup: LinkSetup) -> dict[str, object]:
    return connector_config("OffloadingConnector", None, {
        "spec_name": "PacedHostOffloadingSpec",
        "spec_module_path": "cacheflow.bench.vllm.rivals.offloading_spec",
        "cpu_bytes_to_use": CPU_BYTES,
        "throttle_bytes_per_s": setup.bytes_per_s,
    })  # fmt: skip


def _lmcache(setup: LinkSetup) -> dict[str, object]:
    if setup.side_port is None:
        raise ConfigError("policy lmcache needs the port of LMCache's server")
    extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": setup.side_port}
    return connector_config("LMCacheMPConnector", "lmcache.integration.vllm.lmcache_mp_connector", extra)


RIVALS = {
    "vllm_offloading": Rival(
        link_note="bytes are copied host to host in pieces, each due on the schedule of the link",
        transfer=_offloading,
    ),
    "lmcache": Rival(
        link_note="LMCache has no bandwidth option for its memory tier: without shared memory its bytes come over TCP, "
        "and a relay between its server and vLLM paces them",
        transfer=_lmcache,
        find_python=lmcache.lmcache_python,
        open_side=lmcache.LMCacheServer,
        may_freeze=False,  # LMCache and vLLM watch each other's heartbeats and forget a partner that is silent
    ),
}
"""In the order of tables."""
