"""What a session needs of the engine that serves it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from cacheflow.embedded.lookup import StoreLookup
from cacheflow.embedded.restorer import Restorer
from cacheflow.engine.model import LoadedModel
from cacheflow.engine.runner import LayerRunner
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import RestoreProblem
from cacheflow.stores.base import Store
from cacheflow.stores.keys import Namespace


class SessionHost(Protocol):
    """What a session needs of its engine."""

    @property
    def model(self) -> LoadedModel:
        """The model."""
        ...

    @property
    def runner(self) -> LayerRunner:
        """Its layers."""
        ...

    @property
    def store(self) -> Store:
        """Where KV is saved."""
        ...

    @property
    def lookup(self) -> StoreLookup:
        """Asks the store what it holds."""
        ...

    @property
    def namespace(self) -> Namespace:
        """What KV of this engine is interchangeable with."""
        ...

    @property
    def num_blocks(self) -> int:
        """Rows of a grid."""
        ...

    @property
    def restorer(self) -> Restorer:
        """Brings prefixes back."""
        ...

    @property
    def chunking(self) -> Chunking:
        """How prompts are cut."""
        ...

    @property
    def noting(self) -> threading.Lock:
        """Held while a note of a partial chunk is changed: of two changes at once one would be lost."""
        ...

    @property
    def in_batch(self) -> bool:
        """Whether a batch has the engine to itself."""
        ...

    def problem(self, grid: Grid) -> RestoreProblem:
        """What restoring a grid costs."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """How prompts are cut into objects, and how long a lookup of them and a write may take."""

    chunk_tokens: int
    layers_per_block: int
    lookup_deadline_s: float
    save_deadline_s: float
