"""What a store has of one conversation: finds it, opens reads of it, adds to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from cacheflow.embedded.host import SessionHost
from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.saver import PrefixSaver, SaveReport
from cacheflow.engine.transfer_port import StoreTransferPort, cell_key, state_key
from cacheflow.plan.grid import Cell, Grid
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.tiers import over_tiers
from cacheflow.stores.base import PinOutcome, PrefetchRequest
from cacheflow.stores.keys import ObjectKey, chain_hashes, chain_root, next_key
from cacheflow.stores.prefix_index import Contains, PrefixMatch, find_prefix, note_partial_chunk

NOTE_TIMEOUT_S = 1.0
"""For reading and for writing the notes of a save's partial chunks, each; of what is not noted in time the first chunks
are, without which the others are of no use."""
PREFETCH_S = 300.0
"""What is to be prefetched without being kept is brought within so many seconds, or not at all."""


class PendingSave:
    """A save under way; ``wait`` may be called on any thread, once."""

    def __init__(self, saver: PrefixSaver, engine: SessionHost, partial: list[tuple[bytes, int]]) -> None:
        """Made by ``PrefixArchive.save``."""
        self._saver, self._engine, self._partial = saver, engine, partial

    def wait(self, timeout_s: float | None) -> SaveReport:
        """Wait for the writes, then note the partial chunks for later lookups.

        Args:
            timeout_s: Longest wait for the writes; what is still pending counts as failed and goes on. None: until
                their deadlines.
        """
        report = self._saver.wait(timeout_s)
        note_s = NOTE_TIMEOUT_S if timeout_s is None else min(timeout_s, NOTE_TIMEOUT_S)
        until_s = time.monotonic() + 2 * note_s
        for parent, length in self._partial:
            left_s = max(0.0, until_s - time.monotonic())
            if not self._note(parent, length, min(note_s, left_s)):
                break
        return report

    def _note(self, parent: bytes, length: int, note_s: float) -> bool:
        """Note one partial chunk; False where the store hangs, and would in the next note too."""
        engine, until_s = self._engine, time.monotonic() + note_s
        if not engine.noting.acquire(timeout=note_s):
            return False
        try:
            noted = note_partial_chunk(engine.store, engine.namespace, parent, length, timeout_s=note_s)
        finally:
            engine.noting.release()
        return noted or time.monotonic() < until_s


class PrefixArchive:
    """One tenant's view of an engine's store. Not thread-safe; ``find`` blocks."""

    def __init__(self, engine: SessionHost, *, salt: str) -> None:
        """Look at the engine's store under a salt."""
        self._engine, self._salt = engine, salt

    def find(self, prompt: list[int], *, cancel: threading.Event | None = None) -> PrefixMatch:
        """The longest saved prefix of a prompt, its last token left out; within the engine's lookup deadline.

        Of a hybrid model it ends where a checkpoint was saved.

        Raises:
            RestoreCancelled: ``cancel`` was set while the store was waited for.
        """
        engine, deadline_s = self._engine, self._engine.chunking.lookup_deadline_s
        contains = partial(engine.lookup.contains, until_s=time.perf_counter() + deadline_s, cancel=cancel)
        match = find_prefix(
            engine.store,
            engine.namespace,
            prompt,
            chunk_tokens=engine.chunking.chunk_tokens,
            salt=self._salt,
            max_tokens=len(prompt) - 1,
            required_keys=self._chunk_keys,
            deadline_s=deadline_s,
            contains=contains,
        )
        found = match if engine.model.shape.row_layers == 1 else self._to_checkpoint(match, contains)
        self._claim(found.chain_hashes)
        return found

    def keep(self, tokens: Sequence[int], ends: tuple[int, ...], *, keep_s: float) -> int:
        """Pin what the store has of these chunks, from the first on; asks the medium.

        Returns:
            Tokens of the leading chunks that are pinned whole.
        """
        kept, geometry, engine = 0, self._one_chunk(), self._engine
        namespace, parent = engine.namespace.digest, chain_root(self._salt)
        for end, chain in zip(ends, chain_hashes(tokens, ends, salt=self._salt), strict=True):
            cells, note, parent = self._chunk_keys(chain), next_key(namespace, parent), chain
            states = [state_key(namespace, chain.hex(), geometry, block) for block in range(engine.num_blocks)]
            outcomes = engine.store.pin([*cells, *states, note], ttl_s=keep_s)
            if set(outcomes[: len(cells)]) != {PinOutcome.PINNED}:
                break
            kept = end
        return kept

    def prefetch(self, match: PrefixMatch, *, keep_s: float) -> None:
        """Have a match brought into the fastest tier of the store, its last chunk first: compute takes the first ones.

        Pins it there for ``keep_s`` seconds, unless that is 0.
        """
        if not match.chunk_ends:
            return
        grid = Grid(chunk_ends=match.chunk_ends, num_blocks=self._engine.num_blocks)
        geometry, namespace = self._geometry(grid), self._engine.namespace.digest
        requests = []
        for chunk in reversed(range(grid.num_chunks)):
            name = match.chain_hashes[chunk].hex()
            for cell in (Cell(chunk, block) for block in range(grid.num_blocks)):
                requests.append(PrefetchRequest(cell_key(namespace, name, geometry, cell), geometry.kv_bytes(cell)))
                if num_bytes := geometry.state_bytes(cell):
                    requests.append(PrefetchRequest(state_key(namespace, name, geometry, cell.block), num_bytes))
        self._engine.store.prefetch(requests, within_s=keep_s or PREFETCH_S, keep_s=keep_s)

    def _claim(self, chunks: Sequence[bytes]) -> None:
        """Count chunks for the tenant."""
        if chunks:
            self._engine.store.claim([each.hex() for each in chunks], tenant=chain_root(self._salt).hex())

    def _to_checkpoint(self, match: PrefixMatch, contains: Contains) -> PrefixMatch:
        """As much of a match as ends in a checkpoint whose every object is there."""
        engine, geometry = self._engine, self._one_chunk()
        for length in range(len(match.chain_hashes), 0, -1):
            name = match.chain_hashes[length - 1].hex()
            keys = [state_key(engine.namespace.digest, name, geometry, block) for block in range(engine.num_blocks)]
            found = contains(keys)
            if found is None:
                return PrefixMatch(chunk_ends=(), chain_hashes=(), timed_out=True)
            if all(found):
                return replace(match, chunk_ends=match.chunk_ends[:length], chain_hashes=match.chain_hashes[:length])
        return PrefixMatch(chunk_ends=(), chain_hashes=(), timed_out=match.timed_out)

    def over_tiers(self, problem: RestoreProblem, match: PrefixMatch) -> RestoreProblem:
        """What restoring a match, or its last chunks, costs, by where its chunks lie in a store of several tiers."""
        engine = self._engine
        rates = engine.store.tier_rates()
        hashes = match.chain_hashes[len(match.chain_hashes) - problem.grid.num_chunks :]
        if not rates or not problem.grid.num_chunks:
            return problem
        # The objects of a chunk were written and used together: the bottom one stands for all.
        keys = [self._chunk_keys(each)[0] for each in hashes]
        return over_tiers(problem, engine.store.locate(keys), rates)

    def open(self, grid: Grid, match: PrefixMatch, kv: KVBuffer) -> StoreTransferPort:
        """Reads of what ``find`` found, or of its last chunks, into a buffer."""
        num_before = len(match.chain_hashes) - grid.num_chunks
        return StoreTransferPort(
            self._engine.store,
            geometry=self._geometry(grid),
            namespace=self._engine.namespace.digest,
            chain_hashes=match.chain_hashes[num_before:],
            kv=kv,
        )

    def save(
        self,
        kv: KVBuffer,
        prompt: list[int],
        ends: tuple[int, ...],
        *,
        first_chunk: int,
    ) -> PendingSave:
        """Start writing chunks to the store, those it already has left out.

        They are copied out of the buffer before this returns; with them the checkpoint at the last one's end.

        Args:
            kv: Holds the chunks, and of a hybrid model the checkpoint at the last one's end.
            prompt: Tokens up to the last chunk's end, at least.
            ends: Where each chunk ends.
            first_chunk: Skip the chunks before this one.
        """
        engine = self._engine
        hashes = chain_hashes(prompt, ends, salt=self._salt)
        self._claim(hashes)
        geometry = self._geometry(Grid(chunk_ends=ends, num_blocks=engine.num_blocks))
        saver = PrefixSaver(
            engine.store,
            geometry=geometry,
            namespace=engine.namespace.digest,
            chain_hashes=hashes,
            deadline_s=engine.chunking.save_deadline_s,
        )
        saver.save_prefix(kv, first_chunk=first_chunk)
        parents, starts = (chain_root(self._salt), *hashes), (0, *ends)
        lengths = [(parents[chunk], ends[chunk] - starts[chunk]) for chunk in range(first_chunk, len(ends))]
        partial = [(parent, length) for parent, length in lengths if length != engine.chunking.chunk_tokens]
        return PendingSave(saver, engine, partial)

    def _chunk_keys(self, chunk_hash: bytes) -> list[ObjectKey]:
        """Every object of one chunk."""
        geometry, name, namespace = self._one_chunk(), chunk_hash.hex(), self._engine.namespace.digest
        return [cell_key(namespace, name, geometry, Cell(0, b)) for b in range(self._engine.num_blocks)]

    def _one_chunk(self) -> CellGeometry:
        """A grid of one chunk, whichever: keys do not depend on where it lies."""
        return self._geometry(Grid(chunk_ends=(1,), num_blocks=self._engine.num_blocks))

    def _geometry(self, grid: Grid) -> CellGeometry:
        chunking = self._engine.chunking
        return CellGeometry(grid=grid, shape=self._engine.model.shape, layers_per_block=chunking.layers_per_block)
