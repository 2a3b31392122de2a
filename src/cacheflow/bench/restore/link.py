"""The links a study restores over: a throttled store, or paced copies from pinned memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cacheflow.bench.setup import room_bytes, save_prefix
from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.pinned_link import PinnedLinkPort, PinnedPrefix
from cacheflow.engine.transfer_port import StoreTransferPort, cell_key
from cacheflow.errors import StoreError
from cacheflow.plan.grid import Cell
from cacheflow.profiling.ceilings import upload_bytes_per_s
from cacheflow.restore.ports import TransferPort
from cacheflow.stores.base import Store
from cacheflow.stores.keys import Namespace, chain_hashes
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.stores.shared import UNBOUNDED
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.tensors.pinned_memory import PinnedMemory

DRAIN_S = 60.0
"""Longest wait until a prefix is in every tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDrop:
    """The link falls to ``factor`` of its bandwidth once ``after_bytes`` have passed."""

    factor: float
    after_bytes: int


class PinnedStudyLink:
    """A prefix in host memory (pinned for CUDA), copied at a paced rate; needs no store.

    ``store`` and ``stored_share`` are as in ``StoreStudyLink``.
    """

    store = "pinned"
    stored_share = 1.0

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._prefix: PinnedPrefix | None = None

    def save(self, kv: KVBuffer, geometry: CellGeometry, tokens: Sequence[int]) -> None:
        """Keep every cell of the prefix."""
        del tokens
        self._prefix = PinnedPrefix.save(kv, geometry)

    def open(self, kv: KVBuffer, *, bytes_per_s: float, drop: LinkDrop | None) -> TransferPort[Any]:
        """A port into ``kv`` over an idle link of ``bytes_per_s`` (``inf``: as fast as it goes); cannot drop."""
        if self._prefix is None or drop is not None:
            raise StoreError("a pinned link needs a saved prefix and keeps its bandwidth")
        return PinnedLinkPort(self._prefix, kv=kv, bytes_per_s=bytes_per_s)

    def copy_bytes_per_s(self, kv: KVBuffer) -> float | None:
        """The most that the way into ``kv`` carries, from one large copy; None on the CPU, which has no such way."""
        return None if kv.lane is None else upload_bytes_per_s(kv.lane.streams, kv.device)

    def close(self) -> None:
        """Free the host memory."""
        self._prefix = None


class StoreStudyLink:
    """A store over a throttled link: bytes are really read, verified and copied, then held to the link's schedule.

    Attributes:
        store: For records: its schemes, fastest tier first, and their codecs.
        stored_share: Bytes of the saved prefix as they are stored, over its own; below 1 with a codec.
    """

    def __init__(self, namespace: Namespace, *, urls: Sequence[str] = ("memory",)) -> None:
        """Save into the store that ``urls`` name by tier (see ``stores.url``)."""
        self._namespace, self._urls = namespace, urls
        parsed = check_store_url(urls)
        self.store = " over ".join(f"{each.scheme}+{each.codec.name}" if each.codec else each.scheme for each in parsed)
        self._is_memory = [each.scheme for each in parsed] == ["memory"]
        self._geometry: CellGeometry | None = None
        self._chain: tuple[bytes, ...] = ()
        self._inner: Store | None = None
        self.stored_share = 1.0

    def save(self, kv: KVBuffer, geometry: CellGeometry, tokens: Sequence[int]) -> None:
        """Keep every cell of the prefix.

        Raises:
            StoreError: The store cannot be reached, or not every cell could be written.
        """
        self.close()
        grid = geometry.grid
        room = room_bytes(geometry.shape, grid.num_tokens, grid.num_chunks * grid.num_blocks)
        # A store that others see has no bound of the study's own, so that the prefix pushes out nothing of theirs.
        self._inner = open_store(self._urls, capacity_bytes=room if self._is_memory else UNBOUNDED)
        if kv.lane is not None:
            self._inner.lend_to(PinnedMemory(kv.lane.streams))
        self._geometry, self._chain = geometry, chain_hashes(tokens, grid.chunk_ends)
        save_prefix(self._inner, kv, geometry, self._namespace.digest, self._chain)
        if isinstance(self._inner, TieredStore) and not self._inner.drain(DRAIN_S):
            raise StoreError(f"the prefix was not written to all tiers within {DRAIN_S:g} s")
        cells = [
            (cell_key(self._namespace.digest, self._chain[cell.chunk].hex(), geometry, cell), geometry.kv_bytes(cell))
            for cell in (Cell(chunk, block) for chunk in range(grid.num_chunks) for block in range(grid.num_blocks))
        ]
        self.stored_share = sum(self._inner.stored_bytes(cells)) / sum(num_bytes for _, num_bytes in cells)

    def open(self, kv: KVBuffer, *, bytes_per_s: float, drop: LinkDrop | None) -> TransferPort[Any]:
        """A port into ``kv`` over an idle link of ``bytes_per_s`` (``inf``: as fast as it goes)."""
        if self._geometry is None or self._inner is None:
            raise StoreError("nothing was saved yet")
        # A link of its own: a drop that the run before did not reach must not strike this one.
        link = ThrottledStore(self._inner, min(bytes_per_s, 1e12))
        if drop is not None:
            link.set_bandwidth(bytes_per_s * drop.factor, after_bytes=drop.after_bytes)
        return StoreTransferPort(
            link,
            geometry=self._geometry,
            namespace=self._namespace.digest,
            chain_hashes=self._chain,
            kv=kv,
        )

    @property
    def num_lent(self) -> int:
        """Reads so far that were lent the store's own record."""
        return 0 if self._inner is None else self._inner.stats().num_lent

    def copy_bytes_per_s(self, kv: KVBuffer) -> float | None:
        """None: what a store gives at most is not known but by loading from it."""
        del kv
        return None

    def close(self) -> None:
        """Close the store."""
        if self._inner is not None:
            self._inner.close()
            self._inner = None


StudyLink = PinnedStudyLink | StoreStudyLink
"""Keeps one saved prefix and opens a fresh transfer port for every run."""
