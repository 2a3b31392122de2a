"""The servers of one link: one a policy, all started, of which only the one in turn may use the processor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cacheflow.bench.vllm.client import ServerError, VllmClient
from cacheflow.bench.vllm.policies import CPU_BYTES, MODES, STOCK, LinkSetup, SideServer, rivals, transfer_config
from cacheflow.bench.vllm.server import ServerOptions, VllmServer, start_server
from cacheflow.vllm.plugin import CONNECTOR, HYBRID_CONNECTOR

REST_WINDOW_S = 0.3
REST_SHARE = 0.25
REST_TIMEOUT_S = 30.0
ASKED = "cacheflow"
"""The policy of a server whose requests may ask for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """How a fleet is started.

    Attributes:
        store_root: Folder under which each policy's file store lives.
        store_bytes: Most that a store of ours may hold.
        in_memory: A server of ours keeps prefixes in its own memory instead: lost with it.
        pythons: Interpreters of policies that need one of their own.
    """

    server: ServerOptions
    store_root: Path
    store_bytes: int = CPU_BYTES
    in_memory: bool = False
    pythons: Mapping[str, Path] = field(default_factory=dict)
    itl_slo_ms: float | None = None


@dataclass(slots=True)
class Fleet:
    """Running servers by policy.

    Attributes:
        modes: What requests ask for by policy, where one server has several; see ``MODES``.
    """

    servers: dict[str, VllmServer] = field(default_factory=dict)
    sides: dict[str, SideServer] = field(default_factory=dict)
    modes: Mapping[str, str] = field(default_factory=dict)

    def start(self, stack: ExitStack, name: str, options: ServerOptions, transfer: Mapping[str, Any] | None) -> None:
        """Start a server that ends with ``stack``, wait until it is ready, and let it stand still.

        Raises:
            ServerError: It does not start; the message holds the end of its log.
        """
        server = stack.enter_context(closing(start_server(name, options, transfer=transfer)))
        server.wait_ready()
        self.servers[name] = server
        if self._freezes(name):
            server.freeze()

    def client(self, policy: str) -> VllmClient:
        """What asks a policy's server, as the policy's requests do."""
        client = self.servers[policy].client
        return client.asking({"cacheflow": self.modes[policy]}) if policy in self.modes else client

    def savers(self) -> list[str]:
        """A policy of each server that saves: all but stock vLLM's."""
        by_server = {server: policy for policy, server in self.servers.items() if policy != STOCK}
        return list(by_server.values())

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
            if self._freezes(policy):
                server.freeze()

    def idle_cores(self, window_s: float = 2.0) -> float:
        """Processor cores that all servers use together while nobody asks anything."""
        before = self._cpu_s()
        time.sleep(window_s)
        return (self._cpu_s() - before) / window_s

    def side_bytes(self, policy: str) -> int | None:
        """Bytes that came from a rival's own server so far; None for policies without one."""
        return self.sides[policy].loaded_bytes if policy in self.sides else None

    def _freezes(self, policy: str) -> bool:
        """Whether a policy's server stands still out of turn: an only one disturbs nobody."""
        return not self.modes and may_freeze(policy)

    def _cpu_s(self) -> float:
        sides_s = sum(side.cpu_s() for side in self.sides.values())
        return sides_s + sum(server.cpu_s() for server in dict.fromkeys(self.servers.values()))


def may_freeze(policy: str) -> bool:
    """Whether a policy's server may be stopped while it is not in turn."""
    return policy not in rivals() or rivals()[policy].may_freeze


@contextmanager
def open_fleet(policies: Sequence[str], options: FleetOptions, *, bytes_per_s: float) -> Iterator[Fleet]:
    """Start a server for each policy with a link of ``bytes_per_s``, one after the other; end them afterwards.

    Raises:
        ServerError: A server does not start; the message holds the end of its log.
    """
    with ExitStack() as stack:
        fleet = Fleet()
        for policy in policies:
            rival = rivals().get(policy)
            if rival is not None and rival.open_side is not None:
                side = rival.open_side(options.pythons[policy], bytes_per_s=bytes_per_s, log_dir=options.server.log_dir)
                fleet.sides[policy] = stack.enter_context(closing(side))
            side_port = fleet.sides[policy].port if policy in fleet.sides else None
            setup = _setup(policy, options, bytes_per_s=bytes_per_s, side_port=side_port)
            server = replace(options.server, python=options.pythons.get(policy, options.server.python))
            fleet.start(stack, policy, server, transfer_config(policy, setup))
        yield fleet


@contextmanager
def open_one_server(
    name: str, policies: Sequence[str], options: FleetOptions, *, bytes_per_s: float
) -> Iterator[Fleet]:
    """Start one server with our connector for all policies, which requests ask for; end it afterwards.

    Args:
        name: Of the server, for its log.
        policies: Some of ``MODES``.
        options: How it is started.
        bytes_per_s: The link.

    Raises:
        ServerError: It does not start; the message holds the end of its log.
    """
    with ExitStack() as stack:
        fleet = Fleet(modes={policy: MODES[policy] for policy in policies})
        setup = _setup(ASKED, options, bytes_per_s=bytes_per_s)
        fleet.start(stack, name, options.server, transfer_config(ASKED, setup))
        server = fleet.servers.pop(name)
        fleet.servers.update(dict.fromkeys(policies, server))
        yield fleet


def _setup(policy: str, options: FleetOptions, *, bytes_per_s: float, side_port: int | None = None) -> LinkSetup:
    return LinkSetup(
        bytes_per_s=bytes_per_s,
        chunk_tokens=options.server.chunk_tokens,
        store_dir=None if options.in_memory else options.store_root / policy,
        store_bytes=options.store_bytes,
        profile_dir=options.store_root / "profiles",
        side_port=side_port,
        itl_slo_ms=options.itl_slo_ms,
        connector=HYBRID_CONNECTOR if options.server.hybrid else CONNECTOR,
    )


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
