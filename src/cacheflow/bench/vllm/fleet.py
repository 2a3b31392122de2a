"""The servers of one link: one a policy, all started, of which only the one in turn may use the processor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cacheflow.bench.vllm.client import ServerError
from cacheflow.bench.vllm.policies import CPU_BYTES, LMCACHE, LinkSetup, transfer_config
from cacheflow.bench.vllm.rivals.lmcache import LMCacheServer
from cacheflow.bench.vllm.server import ServerOptions, VllmServer, start_server

NEVER_FROZEN = (LMCACHE,)
"""LMCache and vLLM watch each other's heartbeats and forget a partner that is silent."""
REST_WINDOW_S = 0.3
REST_SHARE = 0.25
REST_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """How a fleet is started.

    Attributes:
        server: Options that all servers share.
        store_root: Folder under which each policy's file store lives.
        lmcache_python: Interpreter with LMCache and vLLM; None when the policy does not run.
        itl_slo_ms: The inter-token latency that our connector is asked to keep; None for no bound.
    """

    server: ServerOptions
    store_root: Path
    lmcache_python: Path | None = None
    itl_slo_ms: float | None = None


@dataclass(slots=True)
class Fleet:
    """Running servers by policy; a context manager that ends those it started.

    Attributes:
        servers: By policy, in the order of the run.
        lmcache: LMCache's server, if that policy runs.
    """

    servers: dict[str, VllmServer] = field(default_factory=dict)
    lmcache: LMCacheServer | None = None

    @contextmanager
    def turn(self, policy: str) -> Iterator[VllmServer]:
        """Let one server run and all others stand still.

        Raises:
            ServerError: It failed; the message says where its log is.
        """
        server = self.servers[policy]
        server.thaw()
        try:
            yield server
        except ServerError as error:
            raise ServerError(f"{error}; the log of {server.name!r} is {server.log}") from error
        finally:
            if policy not in NEVER_FROZEN:
                server.freeze()

    def idle_cores(self, window_s: float = 2.0) -> float:
        """Processor cores that all servers use together while nobody asks anything."""
        before = self._cpu_s()
        time.sleep(window_s)
        return (self._cpu_s() - before) / window_s

    def relayed_bytes(self, policy: str) -> int:
        """Bytes that came through the relay so far; 0 for policies without one."""
        return self.lmcache.relay.answered_bytes if policy == LMCACHE and self.lmcache is not None else 0

    def _cpu_s(self) -> float:
        lmcache_s = 0.0 if self.lmcache is None else self.lmcache.cpu_s()
        return lmcache_s + sum(server.cpu_s() for server in self.servers.values())


@contextmanager
def open_fleet(policies: Sequence[str], options: FleetOptions, *, bytes_per_s: float) -> Iterator[Fleet]:
    """Start a server for each policy behind a link of ``bytes_per_s``, one after the other; end them afterwards.

    Raises:
        ServerError: A server does not start; the message holds the end of its log.
    """
    with ExitStack() as stack:
        fleet = Fleet()
        for policy in policies:
            if policy == LMCACHE:
                assert options.lmcache_python is not None
                fleet.lmcache = stack.enter_context(_lmcache(options, options.lmcache_python, bytes_per_s))
            server = stack.enter_context(_start(policy, fleet, options, bytes_per_s))
            server.wait_ready()
            fleet.servers[policy] = server
            if policy not in NEVER_FROZEN:
                server.freeze()
        yield fleet


def wait_until_at_rest(server: VllmServer) -> None:
    """Wait until a server that nobody asks anything has ended its own work, such as a save.

    Raises:
        ServerError: It still works after half a minute.
    """
    deadline_s = time.monotonic() + REST_TIMEOUT_S
    used_s = float("inf")
    while used_s > REST_SHARE * REST_WINDOW_S:
        if time.monotonic() > deadline_s:
            raise ServerError(f"vLLM server {server.name!r} still works {REST_TIMEOUT_S:.0f} s after its last request")
        before_s = server.cpu_s()
        time.sleep(REST_WINDOW_S)
        used_s = server.cpu_s() - before_s


def _lmcache(options: FleetOptions, python: Path, bytes_per_s: float) -> LMCacheServer:
    memory_gb = max(1, CPU_BYTES // 10**9)
    return LMCacheServer(python, bytes_per_s=bytes_per_s, memory_gb=memory_gb, log_dir=options.server.log_dir)


def _start(policy: str, fleet: Fleet, options: FleetOptions, bytes_per_s: float) -> VllmServer:
    setup = LinkSetup(
        bytes_per_s=bytes_per_s,
        chunk_tokens=options.server.chunk_tokens,
        store_dir=options.store_root / policy,
        profile_dir=options.store_root / "profiles",
        lmcache_port=None if fleet.lmcache is None else fleet.lmcache.port,
        itl_slo_ms=options.itl_slo_ms,
    )
    server = options.server
    if policy == LMCACHE:
        assert options.lmcache_python is not None
        server = server.with_python(options.lmcache_python)
    return start_server(policy, server, transfer=transfer_config(policy, setup))
