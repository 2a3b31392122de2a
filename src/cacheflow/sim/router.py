"""Which replica a request goes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cacheflow.errors import UnknownPolicyError
from cacheflow.sim.kv_cache import held_run
from cacheflow.workloads.request import TraceRequest


class Router(Protocol):
    """Chooses a replica, and is informed of what replicas hold and have to do."""

    def choose(self, request: TraceRequest) -> int:
        """Index of the replica that gets a request; counts the request as its work."""
        ...

    def first_token(self, request: TraceRequest) -> None:
        """Note that a request has its first token."""
        ...

    def changed(self, replica: int, block_id: int, held: bool) -> None:
        """Note that a prefix block came to a replica's GPU memory, or left it."""
        ...


class RoundRobin:
    """One after the other, whatever they hold."""

    def __init__(self, num_replicas: int) -> None:
        """Start with the first."""
        self._num_replicas = num_replicas
        self._next = 0

    def choose(self, request: TraceRequest) -> int:
        """See ``Router``."""
        chosen = self._next
        self._next = (chosen + 1) % self._num_replicas
        return chosen

    def first_token(self, request: TraceRequest) -> None:
        """Nothing to note."""

    def changed(self, replica: int, block_id: int, held: bool) -> None:
        """Nothing to note."""


class Affinity:
    """To the replica with the least to prefill before the request's first token.

    That is what it has to prefill for others and what it does not hold of this prompt, both in tokens. With equal work
    the longest prefix in GPU memory wins; a replica that holds what everybody asks for does not get everybody. Compared
    are those that hold the longest prefix anyone holds, and the one with the least work.
    """

    def __init__(self, num_replicas: int) -> None:
        """Start without work, and without blocks."""
        self._work_tokens = [0] * num_replicas
        self._holders: dict[int, set[int]] = {}
        self._placed: dict[int, tuple[int, int]] = {}

    def choose(self, request: TraceRequest) -> int:
        """See ``Router``."""
        depth = held_run(self._holders, request.block_ids, len(request.block_ids))
        held_tokens = min(depth * request.block_tokens, request.input_tokens - 1)
        holders = self._holders[request.block_ids[depth - 1]] if depth else frozenset()
        work = self._work_tokens
        idlest = work.index(min(work))
        chosen, left_tokens = idlest, request.input_tokens
        if holders:
            # By work, then by index, so that the order of a set decides nothing.
            best = min(holders, key=lambda replica: (work[replica], replica))
            if work[best] - held_tokens <= work[idlest]:
                chosen, left_tokens = best, request.input_tokens - held_tokens
        work[chosen] += left_tokens
        self._placed[request.request_id] = (chosen, left_tokens)
        return chosen

    def first_token(self, request: TraceRequest) -> None:
        """See ``Router``."""
        replica, tokens = self._placed.pop(request.request_id)
        self._work_tokens[replica] -= tokens

    def changed(self, replica: int, block_id: int, held: bool) -> None:
        """See ``Router``."""
        if held:
            self._holders.setdefault(block_id, set()).add(replica)
            return
        holders = self._holders[block_id]
        holders.discard(replica)
        if not holders:
            del self._holders[block_id]


ROUTERS: dict[str, Callable[[int], Router]] = {"affinity": Affinity, "round_robin": RoundRobin}
"""By name."""


def make_router(name: str, num_replicas: int) -> Router:
    """A router by name.

    Raises:
        UnknownPolicyError: No such router; lists the known ones.
    """
    if name not in ROUTERS:
        raise UnknownPolicyError(f"router {name!r} is not known; known are {', '.join(ROUTERS)}")
    return ROUTERS[name](num_replicas)
