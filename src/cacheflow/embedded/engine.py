"""The embedded engine: one model, one store, one policy, any number of sessions, one at a time or concurrently."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from cacheflow.embedded.batch_options import BatchOptions
from cacheflow.embedded.concurrent import ConcurrentBatch
from cacheflow.embedded.host import Chunking
from cacheflow.embedded.lookup import StoreLookup
from cacheflow.embedded.restorer import Restorer
from cacheflow.embedded.session import Session
from cacheflow.engine.arguments import flag, number, require_instance, whole
from cacheflow.engine.families import require_chunk_tokens
from cacheflow.engine.identity import asks_flash3, bits_identity, model_identity, state_identity
from cacheflow.engine.model import LoadedModel, load_model
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.selftest import self_test
from cacheflow.errors import ConfigError, ProfileError
from cacheflow.plan.batch import STARVATION_S
from cacheflow.plan.cell_sizes import READS_IN_FLIGHT, chunk_tokens_of, layers_of_cell
from cacheflow.plan.costs import CostTable, build_problem
from cacheflow.plan.grid import Grid, num_layer_blocks
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.registry import make_policy
from cacheflow.restore.options import ExecutorOptions
from cacheflow.stores.base import Store
from cacheflow.stores.keys import Namespace
from cacheflow.stores.opening import open_store
from cacheflow.stores.retention import DEFAULT_RETENTION, Retention
from cacheflow.tensors.pinned_memory import PinnedMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine saves and restores.

    Attributes:
        policy: A restore policy by name.
        chunk_tokens: Tokens of a chunk; part of the store's key, because it decides the rounding. None for 512 on the
            CPU and 1,024 on CUDA.
        layers_per_block: Layers of one block, which is one store object per chunk; None for one, or for a hybrid model
            as many as from one attention layer to the next, and on CUDA for as many as keep the link busy
            (``cell_sizes``).
        crossover_tokens: Length from which ``cacheflow_v1`` restores token-wise, measured by calibration.
        lookup_deadline_s: Longest time to ask the store what it holds; one that hangs costs a turn no more than that.
        save_deadline_s: Longest time that a write to the store may take, beside a second for each 10 MB of its save so
            far. What takes longer counts as failed, and no reply waits for it.
        executor: Depth and deadlines of reads; None for what suits the device.
        self_test: Check the model against its own forward pass at load.
    """

    policy: str = "cacheflow"
    chunk_tokens: int | None = None
    layers_per_block: int | None = None
    crossover_tokens: int | None = None
    lookup_deadline_s: float = 1.0
    save_deadline_s: float = 10.0
    executor: ExecutorOptions | None = None
    self_test: bool = True

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is out of range, or the policy is unknown.
        """
        if self.chunk_tokens is not None:
            object.__setattr__(self, "chunk_tokens", whole("chunk_tokens", self.chunk_tokens, least=1))
        if self.layers_per_block is not None:
            object.__setattr__(self, "layers_per_block", whole("layers_per_block", self.layers_per_block, least=1))
        if self.crossover_tokens is not None:
            object.__setattr__(self, "crossover_tokens", whole("crossover_tokens", self.crossover_tokens))
        for key in ("lookup_deadline_s", "save_deadline_s"):
            object.__setattr__(self, key, number(key, getattr(self, key), above=0))
        if self.executor is not None:
            require_instance("executor", self.executor, ExecutorOptions)
        flag("self_test", self.self_test)
        require_instance("policy", self.policy, str)
        make_policy(self.policy)


class Engine:
    """Serves sessions of one model; prefixes thrown out of memory come back from a store and from compute at once.

    Not thread-safe: one generation at a time, or one ``concurrent`` batch of them.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        store: Store,
        costs: CostTable,
        link: LinkCost,
        options: EngineOptions | None = None,
        closes_store: bool = False,
    ) -> None:
        """Take a loaded model.

        Args:
            model: See ``load_model``.
            store: Where KV goes and comes from, such as ``stores.opening.open_store(url, ...)``.
            costs: Measured on this machine for this model (``cacheflow calibrate``).
            link: What the profile says of the store's link.
            options: Policy, chunking, deadlines.
            closes_store: ``close`` closes the store; otherwise it stays the caller's to close.

        Raises:
            ProfileError: ``costs`` was measured for another model, device or dtype.
            CostRangeError: ``costs`` was measured for shorter chunks.
            ConfigError: An argument is of the wrong type, or the options do not fit a hybrid model.
            SelfTestError: The engine cannot reproduce the model's own forward pass.
        """
        if options is not None:
            require_instance("options", options, EngineOptions)
        self.options = EngineOptions() if options is None else options
        require_instance("model", model, LoadedModel, hint="Engine.open takes a folder or a name")
        _check_parts(store, costs, link)
        self.model, self.store, self.costs, self.link = model, store, costs, link
        self._closes_store = flag("closes_store", closes_store)
        self.lookup = StoreLookup(store)
        weakref.finalize(self, self.lookup.close)  # its threads end with an engine that nobody closes too
        costs.identity.require(model_identity(model))
        device_type = model.device.type
        chunk_tokens = chunk_tokens_of(device_type, self.options.chunk_tokens)
        for kind in costs.kinds.values():
            kind.full_s(chunk_tokens, 0)  # refuse a chunk nobody measured now, not at the first eviction
        require_chunk_tokens(model.shape, chunk_tokens)
        layers_per_block = layers_of_cell(
            model.shape,
            device_type=device_type,
            chunk_tokens=chunk_tokens,
            bytes_per_s=link.bytes_per_s,
            asked=self.options.layers_per_block,
        )
        self.runner = LayerRunner(model)
        if self.options.self_test:
            self_test(model)
        self.namespace = Namespace(
            weights_fingerprint=model.fingerprint,
            dtype=model.shape.dtype,
            chunk_tokens=chunk_tokens,
            extra=(
                *bits_identity(model),
                ("layers_per_block", str(layers_per_block)),
                *state_identity(model.shape),
                *store.codec_identity(),
            ),
        )
        self._in_batch, self.noting = threading.Lock(), threading.Lock()
        self.chunking = Chunking(
            chunk_tokens=chunk_tokens,
            layers_per_block=layers_per_block,
            lookup_deadline_s=self.options.lookup_deadline_s,
            save_deadline_s=self.options.save_deadline_s,
        )
        self.num_blocks = num_layer_blocks(model.shape.num_layers, layers_per_block)
        if self.runner.lane is not None:
            # Pinned now, not at the first restoration.
            self.runner.lane.staging(chunk_tokens * layers_per_block * model.shape.kv_bytes_per_token_layer)
            store.lend_to(PinnedMemory(self.runner.lane.streams))
        self.restorer = Restorer(
            runner=self.runner,
            policy=make_policy(self.options.policy, crossover_tokens=self.options.crossover_tokens),
            rates=LiveRates(bytes_per_s=link.bytes_per_s),
            options=self.options.executor or ExecutorOptions(least_reads_in_flight=READS_IN_FLIGHT[device_type]),
        )

    @classmethod
    def open(  # noqa: PLR0913 -- keyword-only but for the model
        cls,
        model: str | Path,
        *,
        store: Store | str | Sequence[str],
        costs: CostTable,
        link: LinkCost,
        options: EngineOptions | None = None,
        capacity_bytes: int | None = None,
        retention: Retention | None = None,
    ) -> Engine:
        """Load a model by folder or name, with the device and dtype its costs were measured on.

        Args:
            model: Folder or name.
            store: Where KV goes and comes from: a store, which stays the caller's to close, or the URL of one (see
                docs/stores.md), which ``close`` closes; several URLs, the fastest store first, are tiers.
            costs: See the constructor.
            link: See the constructor.
            options: See the constructor.
            capacity_bytes: Bound on the records of each store that a URL names, headers (4,096 bytes each) included,
                where the URL has no ``capacity``; there is no default, since a low one would throw out what others keep
                there.
            retention: What goes first from such a store, and what goes by itself; None for ``DEFAULT_RETENTION``.

        Raises:
            ConfigError: The model cannot be loaded, the URL names no store, ``capacity_bytes`` is missing beside a URL,
                or that or ``retention`` is given beside a store.
            StoreError: The store cannot be reached or used.
            ProfileError: The costs' device is not there, or see the constructor.
        """
        if not isinstance(model, str | Path):
            raise ConfigError(f"model is {model!r}, must be a folder or a name")
        urls = _urls(store)
        if (urls is None) != (capacity_bytes is None):
            raise ConfigError(
                f"capacity_bytes is {capacity_bytes}: it is the bound on the store that a URL names, and must be given "
                "with a URL; a store that is open has its own"
            )
        if retention is not None:
            require_instance("retention", retention, Retention)
            if urls is None:
                raise ConfigError("retention is for the store that a URL names; a store that is open has its own")
        if urls is not None:
            capacity = whole("capacity_bytes", capacity_bytes, least=1)
            _check_profile(costs, link)
            opened = open_store(urls, capacity_bytes=capacity, retention=retention or DEFAULT_RETENTION)
            try:
                return cls(cls._load(model, costs), store=opened, costs=costs, link=link, options=options,
                           closes_store=True)  # fmt: skip
            except BaseException:
                opened.close()
                raise
        _check_parts(store, costs, link)
        assert isinstance(store, Store), "checked"
        return cls(cls._load(model, costs), store=store, costs=costs, link=link, options=options)

    @staticmethod
    def _load(model: str | Path, costs: CostTable) -> LoadedModel:
        identity = costs.identity
        if identity.device_type == "cuda" and not torch.cuda.is_available():
            raise ProfileError(f"costs were measured on {identity.device}; this machine has no CUDA device: calibrate")
        flash3 = asks_flash3(identity)
        return load_model(model, device=identity.device_type, dtype=identity.dtype, flash3=flash3)

    def close(self) -> None:
        """End what the engine opened: the store, where ``open`` was given its URL. Closing again does nothing.

        A closed engine finds nothing in a store that other processes share.
        """
        self.lookup.close()
        if self._closes_store:
            self.store.close()

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""
        self.close()

    def session(self, *, salt: str = "", history: Sequence[int] = ()) -> Session:
        """Start a conversation, or go on with one whose tokens are ``history``.

        Args:
            salt: Tenants with different salts never read each other's KV.
            history: Tokens of earlier turns; what the store has of them is restored with the next turn.

        Raises:
            ConfigError: ``salt`` is no string.
            PromptError: ``history`` holds no token ids.
        """
        if not isinstance(salt, str):
            raise ConfigError(f"salt is {salt!r}, must be a string")
        return Session(self, salt=salt, history=history)

    def concurrent(
        self,
        *,
        objective: str = "mean_ttft",
        starvation_s: float = STARVATION_S,
        recompute_budget_ms: float = 50.0,
        itl_slo_ms: float | None = None,
        kv_capacity_tokens: int | None = None,
    ) -> ConcurrentBatch:
        """Serve many sessions at once; nothing else may use the engine until the batch is closed.

        >>> with engine.concurrent(objective="mean_ttft") as batch:      # doctest: +SKIP
        ...     pending = [batch.submit(session, tokens, max_new_tokens=64) for session, tokens in asked]
        ...     replies = [each.result() for each in pending]

        For the arguments see ``BatchOptions``.

        Raises:
            ConfigError: An option is out of range, or a batch is open already.
        """
        options = BatchOptions(
            objective=objective,
            starvation_s=starvation_s,
            recompute_budget_ms=recompute_budget_ms,
            itl_slo_ms=itl_slo_ms,
            kv_capacity_tokens=kv_capacity_tokens,
        )
        if not self._in_batch.acquire(blocking=False):
            raise ConfigError("this engine has an open batch; close it first")
        try:
            return ConcurrentBatch(self, options, on_close=self._in_batch.release)
        except BaseException:
            self._in_batch.release()
            raise

    @property
    def in_batch(self) -> bool:
        """Whether a batch is open, which has the engine to itself."""
        return self._in_batch.locked()

    def problem(self, grid: Grid) -> RestoreProblem:
        """What restoring a grid costs by the engine's profile.

        Raises:
            CostRangeError: A chunk lies outside the measured range.
        """
        return build_problem(
            self.costs, grid, self.model.shape, link=self.link, layers_per_block=self.chunking.layers_per_block
        )


def _urls(store: object) -> tuple[str, ...] | None:
    """The URLs of a store's tiers, where it is given by URLs."""
    if isinstance(store, str):
        return (store,)
    if isinstance(store, Sequence) and all(isinstance(each, str) for each in store):
        return tuple(store)
    return None


def _check_parts(store: object, costs: object, link: object) -> None:
    require_instance("store", store, Store, hint="open_store(url, capacity_bytes=...), see docs/stores.md")
    _check_profile(costs, link)


def _check_profile(costs: object, link: object) -> None:
    require_instance("costs", costs, CostTable, hint="load_profile(path).costs")
    require_instance("link", link, LinkCost, hint="load_profile(path).link")
