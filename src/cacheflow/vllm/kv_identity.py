"""Under which name this engine saves and restores KV now, and what must not be saved: the scheduler's side of changes.

An engine starts in the generation that it shares with every engine of the same weights. A reset, or a change of the
weights that a worker reports, begins a generation of its own: nothing saved before is found any more, and no other
process finds what is saved from now on. What others share in the store stays.

vLLM's own prefix cache is another matter: it may go on holding KV of the weights or the adapter before. Until it is
reset too, a request that has tokens from it is not saved, or the old KV would get the new name.
"""

from __future__ import annotations

import secrets

from cacheflow.vllm.adapters import Adapter, AdapterClaim, AdapterFiles
from cacheflow.vllm.identity import adapter_namespace, generation_namespace


class KvIdentity:
    """Scheduler's thread alone.

    Attributes:
        generation: Counts the generations; a request of an earlier one holds KV that must not be saved.
        stopped: Why nothing is saved or restored until the next reset; empty while all is well.
    """

    def __init__(self, namespace: str) -> None:
        """Start with what the workers found out; ``namespace`` is from ``shared_namespace``."""
        self._shared, self._token = namespace, ""
        self.generation = 0
        self.stopped = ""
        self._files = AdapterFiles()
        self._digests: dict[tuple[str, str], str] = {}
        self._stale_adapters: set[tuple[str, str]] = set()
        self._all_stale = False

    def replace_shared(self, namespace: str) -> None:
        """Take the workers' names anew, after a repeated handshake; the generation goes on."""
        if namespace != self._shared:
            self._shared = namespace
            self.generation += 1
            self._all_stale = True

    def begin_generation(self) -> None:
        """From now on nothing that was saved so far is found; what was stopped goes on."""
        self._token = secrets.token_hex(16)
        self.generation += 1
        self.stopped = ""

    def weights_changed(self, *, stop: str = "") -> None:
        """Begin a generation because a worker's weights are other ones.

        Args:
            stop: Why to save and restore nothing until a reset; empty: go on.
        """
        self.begin_generation()
        self.stopped = stop
        self._all_stale = True

    def local_cache_was_reset(self) -> None:
        """VLLM's own prefix cache is empty: what is found in it from now on is new."""
        self._all_stale = False
        self._stale_adapters.clear()

    def claim(self, adapter: Adapter) -> AdapterClaim | None:
        """The adapter by the files that its path holds now; None where they cannot be read."""
        claim = self._files.claim(adapter)
        if claim is not None:
            key = adapter.name, adapter.path
            if self._digests.setdefault(key, claim.digest) != claim.digest:
                self._digests[key] = claim.digest
                self._stale_adapters.add(key)
        return claim

    def namespace(self, claim: AdapterClaim | None) -> str:
        """Digest for keys, of the base model or of an adapter."""
        own = generation_namespace(self._shared, token=self._token)
        return own if claim is None else adapter_namespace(own, digest=claim.digest)

    def is_stale_locally(self, adapter: Adapter | None) -> bool:
        """Whether vLLM's own prefix cache may hold KV of other weights, or of the adapter's files before."""
        return self._all_stale or (adapter is not None and (adapter.name, adapter.path) in self._stale_adapters)
