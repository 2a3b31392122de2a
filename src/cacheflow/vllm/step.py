"""What the scheduler side sends to the workers in one engine step, and what comes back. Plain data; pickles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cacheflow.restore.work import RestoreTarget, StageWork
from cacheflow.stores.keys import RankObjects
from cacheflow.vllm.adapters import AdapterLoad, AdapterVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureWork:
    """Keep the boundary states of a request's tokens ``[start, end)``, which this step's forward computes."""

    request_id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveWork:
    """Write one chunk after this step's forward.

    Attributes:
        request_id: Whose tokens they are; with ``chunk`` it names captured boundary states.
        chunk: Number of the chunk in the request.
        namespace: ``Namespace.digest``.
        chain_hash: Chain hash (hex) at the end of the chunk.
        block_ids: KV blocks of the chunk, in order.
        adapter: The adapter that the namespace stands for; None without.
        state_blocks: In a model with recurrent layers the KV blocks, one of each group of states, that hold the running
            states at the end of the chunk after this forward; empty where they are not saved.
        keep: Write the states when the request ends or is preempted, unless those of a later chunk come first.
    """

    namespace: str
    chain_hash: str
    block_ids: tuple[int, ...]
    request_id: str = ""
    chunk: int = 0
    adapter: AdapterVersion | None = None
    state_blocks: tuple[int, ...] = ()
    keep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepWork:
    """Pin a prefix in the store, or end that.

    Every rank does it for the objects of all ranks: each evicts what it knows of.

    Attributes:
        namespace: ``Namespace.digest``.
        chain_hashes: Chain hash (hex) at the end of each chunk, the prefix's first chunk first.
        objects: Names the objects of all ranks.
        keep_s: Seconds from now; 0 to end it.
    """

    namespace: str
    chain_hashes: tuple[str, ...]
    objects: tuple[RankObjects, ...]
    keep_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchWork:
    """Bring a prefix into the fastest tier of the store; every rank its own objects.

    Attributes:
        namespace: ``Namespace.digest``.
        chain_hashes: Chain hash (hex) at the end of each chunk, at least one, the prefix's first chunk first.
        tenant: Whose it is: the root of its chain (hex).
        within_s: What was not begun by then is dropped.
        keep_s: Seconds for which it stays pinned there; 0 for not.
    """

    namespace: str
    chain_hashes: tuple[str, ...]
    tenant: str
    within_s: float
    keep_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """One engine step's work beside the forward.

    Attributes:
        targets: Restorations that start with this step.
        by_stage: What each pipeline stage does for them and for earlier ones, bottom stage first; empty when nothing is
            under way.
        failed_blocks: For restorations that are cancelled because they cannot be completed: the KV blocks whose content
            is undefined, which vLLM must recompute.
        captures: Tokens of this forward whose boundary states later stages keep.
        saves: Chunks to write after the forward.
        wait_s: With nothing to compute, wait up to this long for a read to end before the step ends.
        weights_versions: How often each rank's weights had changed when it was last heard of; left out where never.
        adapters: The adapter of each restoration that starts with this step and has one, by ``restore_id``.
        preempted: Requests that vLLM preempted in this step.
        keeps: Prefixes of requests that have ended, to be pinned once what was computed of them is written, and
            announced ones.
        prefetches: Prefixes that come next, to be brought into the fastest tier of the store.
        claims: Chunks (chain hashes, hex) that are saved and read from this step on, by tenant; empty without a quota.
        generation: The engine's (``KvIdentity``): counts its resets and the changes of weights it has heard of.
    """

    targets: tuple[RestoreTarget, ...] = ()
    by_stage: tuple[tuple[StageWork, ...], ...] = ()
    failed_blocks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    captures: tuple[CaptureWork, ...] = ()
    saves: tuple[SaveWork, ...] = ()
    wait_s: float = 0.0
    weights_versions: Mapping[int, int] = field(default_factory=dict)
    adapters: Mapping[int, AdapterVersion] = field(default_factory=dict)
    preempted: tuple[str, ...] = ()
    keeps: tuple[KeepWork, ...] = ()
    prefetches: tuple[PrefetchWork, ...] = ()
    claims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    generation: int = 0

    @property
    def idle_after_forward(self) -> bool:
        """Whether there is nothing to do once the forward has run; what is captured in it counts for nothing."""
        return not (self.targets or any(self.by_stage) or self.saves or self.wait_s)

    def of_stage(self, stage: int) -> tuple[StageWork, ...]:
        """What a pipeline stage does for restorations."""
        return self.by_stage[stage] if self.by_stage else ()


NOTHING = StepWork()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsChange:
    """That a worker's weights changed.

    Attributes:
        version: How often they have, by now.
        how: By what, for people.
        announced: By a method that vLLM offers; otherwise a sample differed, and when it happened is not known.
        before_forward: It was announced before the forward of the step that reports it: that computed nothing with the
            weights before.
    """

    version: int
    how: str
    announced: bool
    before_forward: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNews:
    """What one rank reports of its weights and adapters, besides what it did.

    Attributes:
        weights: Their last change, where the scheduler side has not heard of it.
        adapter_loads: Adapters that were loaded since the last report.
        refused: Restorations whose KV belongs to other weights or another adapter than are loaded now, and why; their
            blocks are reported as failed.
    """

    weights: WeightsChange | None = None
    adapter_loads: tuple[AdapterLoad, ...] = ()
    refused: Mapping[int, str] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.weights or self.adapter_loads or self.refused)
