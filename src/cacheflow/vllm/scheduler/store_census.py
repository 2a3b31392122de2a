"""Says at start how many of the store's objects are this engine's, and why the others are not.

Each engine writes beside its objects what their namespace stands for (``stores.identity_record``). So a miss that
surprises, of a prefix that another server saved, has its reason in the log: another number of threads, other weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from queue import SimpleQueue
from threading import Thread

from cacheflow.stores.base import Store
from cacheflow.stores.identity_record import differing_parts, read_identities, write_identity
from cacheflow.threads import start_thread
from cacheflow.vllm.scheduler.kv_identity import WEIGHTS_BY_LAYER, differing_layers

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""For each question to the store; nobody waits for it."""
MAX_NAMED = 5
"""Other namespaces that are named, those with most objects first."""
MAX_VALUE = 40
"""Characters of a value that is shown; of longer ones, such as digests, only the name."""


class StoreCensus:
    """Asks and writes on a thread of its own: a store that hangs holds up nothing. Scheduler's thread alone."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._described: set[str] = set()
        self._namespaces: SimpleQueue[tuple[str, dict[str, str]] | None] = SimpleQueue()
        self._thread: Thread | None = None

    def describe(self, namespace: str, parts: Mapping[str, str]) -> None:
        """Write what a namespace stands for, once in this process; of the first one also say what the store holds."""
        if namespace in self._described:
            return
        self._described.add(namespace)
        self._namespaces.put((namespace, dict(parts)))
        if self._thread is None:
            self._thread = start_thread(self._work, name="cacheflow-census")

    def close(self) -> None:
        """End the thread; without waiting for a store that hangs."""
        self._namespaces.put(None)

    def _work(self) -> None:
        first = True
        while (described := self._namespaces.get()) is not None:
            namespace, parts = described
            try:
                if first:
                    logger.info("%s", census_line(self._store, namespace, parts))
                write_identity(self._store, namespace, parts, timeout_s=TIMEOUT_S)
            except Exception:  # a bug in a store must cost a line in the log, not the engine
                logger.exception("the store could not be asked what it holds")
            first = False


def census_line(store: Store, namespace: str, parts: Mapping[str, str]) -> str:
    """What a store holds beside this engine's ``namespace``, in a sentence; asks for ``TIMEOUT_S`` at most."""
    census = dict(store.census())
    own = census.pop(namespace, 0)
    if not census:
        return f"the store holds {own} objects, all of them this engine's" if own else "the store holds no objects"
    line = f"the store holds {own + sum(census.values())} objects: {own} are this engine's"
    most = sorted(census, key=lambda each: (-census[each], each))[:MAX_NAMED]
    identities = read_identities(store, most, timeout_s=TIMEOUT_S)
    for other in most:
        line += f"; {census[other]} are another's: {_difference(parts, identities.get(other))}"
    left = sum(census.values()) - sum(census[other] for other in most)
    return line + (f"; {left} are of {len(census) - len(most)} more" if left else "")


def _difference(own: Mapping[str, str], other: Mapping[str, str] | None) -> str:
    if other is None:
        return "what it is was not written down (an earlier version, or evicted)"
    if "generation" in other:
        return "an engine saved them after a reset or a change of its weights; once it has ended nobody uses them"
    names = [name for name in differing_parts(own, other) if name != WEIGHTS_BY_LAYER]
    if not names:
        return "it differs in nothing that was written down"
    shown = []
    for name in names:
        here, there = own.get(name, "none"), other.get(name, "none")
        short = len(here) <= MAX_VALUE and len(there) <= MAX_VALUE
        shown.append(f"{name} ({here} here, {there} there)" if short else name)
    layers = differing_layers(own.get(WEIGHTS_BY_LAYER, ""), other.get(WEIGHTS_BY_LAYER, ""))
    return f"{', '.join(shown)} differ{'s' if len(shown) == 1 else ''}{layers and f', the weights {layers}'}"
