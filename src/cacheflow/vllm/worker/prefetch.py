"""Has the store bring this rank's objects of a prefix into its fastest tier before it is restored."""

from __future__ import annotations

from functools import partial

from cacheflow.plan.grid import layers_of_blocks
from cacheflow.stores.asker import Asker
from cacheflow.stores.base import PrefetchRequest, Store
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.step import PrefetchWork
from cacheflow.vllm.worker.layout import BlockLayout
from cacheflow.vllm.worker.state_blocks import StateBlocks


class PrefixPrefetch:
    """Carries ``PrefetchWork`` out, on a thread of its own: naming a long prefix's objects takes a while.

    Of what several ranks have alike the first one's do it.
    """

    def __init__(
        self,
        store: Store,
        facts: EngineFacts,
        layout: BlockLayout,
        states: StateBlocks | None,
        *,
        chunk_tokens: int,
    ) -> None:
        """Ask ``store`` for the objects of the rank with these facts; ``states`` are None without recurrent layers."""
        self._store, self._keys = store, facts.keys
        num_blocks, step = chunk_tokens // layout.block_size, facts.layers_per_block
        rows = layers_of_blocks(step, layout.num_layers) if facts.keys.writes else []
        self._kv = [(each, layout.num_bytes(*each, num_blocks)) for each in rows]
        state_rows = [] if states is None or not facts.keys.writes else layers_of_blocks(step, states.num_rows)
        sizes = [(each, states.num_bytes(*each)) for each in state_rows if states is not None]
        self._states = [(each, num_bytes) for each, num_bytes in sizes if num_bytes]
        self._boundary_bytes = 0 if facts.shard.tp_rank else facts.boundary_token_bytes * chunk_tokens
        self._asker = Asker("cacheflow-prefetch", num_threads=1)

    def carry_out(self, work: PrefetchWork) -> None:
        """Ask the store for a prefix; returns at once."""
        self._asker.ask(partial(self._prefetch, work), None)

    def _prefetch(self, work: PrefetchWork) -> None:
        self._store.claim(work.chain_hashes, tenant=work.tenant)
        requests = self._of_states(work)
        for each in reversed(work.chain_hashes):  # compute takes the first chunks, should the time not do for all
            requests += self._of_chunk(work.namespace, each)
        self._store.prefetch(requests, within_s=work.within_s, keep_s=work.keep_s)

    def _of_states(self, work: PrefetchWork) -> list[PrefetchRequest]:
        end = work.chain_hashes[-1]
        return [PrefetchRequest(self._keys.states(work.namespace, end, rows), size) for rows, size in self._states]

    def _of_chunk(self, namespace: str, chain_hash: str) -> list[PrefetchRequest]:
        found = [PrefetchRequest(self._keys.kv(namespace, chain_hash, rows), size) for rows, size in self._kv]
        if self._boundary_bytes:
            found.append(PrefetchRequest(self._keys.boundary(namespace, chain_hash), self._boundary_bytes))
        return found

    def close(self) -> None:
        """End the thread."""
        self._asker.close()
