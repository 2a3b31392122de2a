"""Options of the connector: ``kv_connector_extra_config`` in, a checked value out.

Named as vLLM and its ecosystem name them (``cpu_bytes_to_use``, ``max_load_tokens``). Everything is checked at start:
an unknown key, a value out of range or a contradiction is refused with what is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cacheflow.cache_root import cache_root
from cacheflow.errors import ConfigError
from cacheflow.plan.batch import STARVATION_S
from cacheflow.policies.batch_registry import BATCH_POLICY_NAMES
from cacheflow.policies.registry import RESTORE_POLICIES
from cacheflow.stores.opening import check_store_url
from cacheflow.stores.retention import DEFAULT_RETENTION, Retention
from cacheflow.stores.url import StoreUrl, file_url, shown_url

CHOICES: Mapping[str, tuple[str, ...]] = {
    "policy": tuple(RESTORE_POLICIES),
    "objective": BATCH_POLICY_NAMES,
    "unsupported_models": ("refuse", "load_only"),
}
"""The values of options that have few."""
DEFAULT_CHUNK_TOKENS = 512
"""Of models whose KV blocks are short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorOptions:
    """How CacheFlow behaves inside vLLM.

    Attributes:
        store: Where saved KV lives: ``memory`` (this process's, lost with it), ``file`` (survives, shared by replicas
            that see the directory), or the URL of a store, see docs/stores.md. Several URLs, the fastest store first,
            are tiers: give the flag several times, or a list.
        store_path: Directory of the file store; required for it, refused otherwise.
        cpu_bytes_to_use: Capacity of the store in bytes, on this node; of several, of each whose URL has no capacity.
        ttl_s: Seconds after its last use at which a stored object goes by itself; None: only to make room.
        tenant_quota: Share of the capacity beyond which the objects of a tenant (``cache_salt``) make room before any
            other's; None: the least recently used goes first, whose ever it is.
        pinned_share: Share of the capacity, and of a tenant's quota, that prefixes may hold which requests ask to keep.
        keep_tool_s: How long ``keep: "tool"`` of a request keeps its prefix at most, in seconds.
        max_keep_s: Longest time for which a request may ask to keep its prefix, in seconds.
        prefetch_queued: Of a store with several tiers, so many requests at the head of vLLM's queue have their prefixes
            brought into the fastest one while others run; 0: none.
        chunk_tokens: Tokens of one stored and one recomputed chunk; a multiple of vLLM's KV block size. None: 512, or
            one block where the model has recurrent layers, whose blocks are long.
        layers_per_block: Layers in one stored object; None: all in a compiled engine, in an eager one 1 or, on CUDA, as
            many as make 8 MiB, a power of two, an eighth of the layers at most.
        policy: How a prefix is restored; only ``cacheflow`` has the never-slower guard.
        objective: Which of several restorations comes first; ``slo``: as many first tokens within ``ttft_slo_ms`` as
            can be.
        starvation_s: A restoration that has waited this long goes before all that came after it.
        ttft_slo_ms: Time from the start of a restoration in which it should end; for the objective ``slo`` alone.
        throttle_bytes_per_s: Read the store through a link of this bandwidth (bytes are really read and copied, only
            slower); for measurements. None: as fast as it is.
        throttle_latency_s: Read the store through a link of this latency; for measurements.
        recompute_budget_ms: Recomputation per engine step while other requests run, in milliseconds, at least one
            layer of one chunk. None: a tenth of what a chunk takes (vLLM's chunked
            prefill would put a whole one into a step).
        itl_slo_ms: Keep the inter-token latency of running requests below this by shrinking the budget, down to loading
            alone where not even one layer of one chunk fits; None: no bound.
        max_load_tokens: Never restore more than this many tokens of a request; None: no limit.
        lookup_timeout_s: A request waits at most this long for the store to say what it holds, then it is computed.
        restore_timeout_s: After this long a restoration stops loading and recomputes what is missing.
        profile_dir: Directory of cost profiles measured on this machine; None: ``profiles`` in ``cache_root``.
        calibrate: Measure costs at start where no profile fits (seconds); off: a profile is required.
        calibrate_budget_s: Roughly how long measuring costs may take.
        save: Save computed KV.
        boundary_states: On pipeline stages above the first, save what the stage below handed over too: from it a
            stage restores its layers without waiting for the others.
        save_decode_kv: Save chunks that contain tokens made by decode steps too.
        checkpoint_every_chunks: In models with recurrent layers, save their running states also wherever a step of the
            engine ends at a multiple of so many chunks. None: where a prompt's last chunk ends, where the prompts of
            two requests part, and of a reply at its last chunk.
        unsupported_models: What to do with a model CacheFlow cannot recompute: ``refuse`` or ``load_only``.
        self_test: Check at start that restored KV equals the engine's own, bit for bit.
        explain: Attach the explain record to every request's ``kv_transfer_params``; one request can ask for it alone.
    """

    store: str | tuple[str, ...] = "memory"
    store_path: str | None = None
    cpu_bytes_to_use: int = 4 << 30
    ttl_s: float | None = None
    tenant_quota: float | None = None
    pinned_share: float = DEFAULT_RETENTION.pinned_share
    keep_tool_s: float = 300.0
    max_keep_s: float = 3600.0
    prefetch_queued: int = 4
    chunk_tokens: int | None = None
    layers_per_block: int | None = None
    policy: str = "cacheflow"
    objective: str = "mean_ttft"
    starvation_s: float = STARVATION_S
    ttft_slo_ms: float | None = None
    throttle_bytes_per_s: float | None = None
    throttle_latency_s: float = 0.0
    recompute_budget_ms: float | None = None
    itl_slo_ms: float | None = None
    max_load_tokens: int | None = None
    lookup_timeout_s: float = 0.05
    restore_timeout_s: float = 60.0
    profile_dir: str | None = None
    calibrate: bool = True
    calibrate_budget_s: float = 8.0
    save: bool = True
    boundary_states: bool = True
    save_decode_kv: bool = True
    checkpoint_every_chunks: int | None = None
    unsupported_models: str = "load_only"
    self_test: bool = True
    explain: bool = False

    def __post_init__(self) -> None:
        """Check ranges and contradictions.

        Raises:
            ConfigError: Names the key, the value and what is allowed.
        """
        for key, allowed in CHOICES.items():
            _one_of(key, getattr(self, key), allowed)
        self._check_store()
        if (self.objective == "slo") != (self.ttft_slo_ms is not None):
            raise ConfigError(
                f"objective is {self.objective!r} and ttft_slo_ms is {self.ttft_slo_ms}: the objective slo needs a "
                "ttft_slo_ms, the others take none"
            )
        for key in _POSITIVE:
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{key} is {value}, must be above 0 and finite")
        if self.prefetch_queued < 0:
            raise ConfigError(f"prefetch_queued is {self.prefetch_queued}, must be 0 or more")
        if self.keep_tool_s > self.max_keep_s:
            raise ConfigError(
                f"keep_tool_s is {self.keep_tool_s:g} and max_keep_s {self.max_keep_s:g}: no request may ask for so "
                "long; raise max_keep_s"
            )
        if not 0 <= self.throttle_latency_s < float("inf"):
            raise ConfigError(f"throttle_latency_s is {self.throttle_latency_s}, must be 0 or more and finite")

    def _check_store(self) -> None:
        if isinstance(self.store, tuple) and len(self.store) == 1:
            object.__setattr__(self, "store", self.store[0])
        if (self.store == "file") != (self.store_path is not None):
            raise ConfigError(
                f"store is {self._shown_store!r} and store_path is {self.store_path!r}: the file store needs a "
                "store_path, the memory store takes none, and a URL says where the store is"
            )
        for key in ("store_path", "profile_dir"):
            if getattr(self, key) == "":
                raise ConfigError(f"{key} is empty, must be a folder; leave it out for the default")
        check_store_url(self.store_urls)
        _ = self.retention, self.profile_path  # check their values

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> ConnectorOptions:
        """Check and take over ``kv_connector_extra_config``.

        Raises:
            ConfigError: An unknown key (the message lists the known ones), a value of the wrong type or out of range.
        """
        hints = get_type_hints(cls)
        unknown = sorted(set(extra_config) - set(hints))
        if unknown:
            raise ConfigError(
                f"kv_connector_extra_config: unknown {', '.join(map(repr, unknown))}; known are {', '.join(hints)}"
            )
        return cls(**{key: _typed(key, value, hints[key]) for key, value in extra_config.items()})

    def for_engine(self, default_chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> ServingOptions:
        """The options as they are for an engine whose chunks have so many tokens unless others were asked for."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return ServingOptions(**given | {"chunk_tokens": self.chunk_tokens or default_chunk_tokens})

    def require_reachable_store(self, executor: str) -> None:
        """Pass if the scheduler can see what workers save, under vLLM's ``distributed_executor_backend``.

        Raises:
            ConfigError: The store is this process's memory, and workers are other processes, as in all but ``uni``.
        """
        if self.uses_memory and executor != "uni":
            raise ConfigError(
                f"store is {self._shown_store!r}, but vLLM's executor {executor!r} runs workers in other processes, "
                "into whose memory the scheduler cannot look: set store to 'file' and a store_path (in /dev/shm it "
                "stays in memory), or take shm://name instead of memory"
            )

    @property
    def store_urls(self) -> tuple[str, ...]:
        """The URL of each tier, the fastest first; of the store, whichever way it was given, where it is one."""
        if self.store_path is not None:
            return (file_url(_folder("store_path", self.store_path)),)
        return self.store if isinstance(self.store, tuple) else (self.store,)

    @property
    def uses_memory(self) -> bool:
        """Whether the store, or a tier of it, is the memory of one process."""
        return any(StoreUrl.parse(url).scheme == "memory" for url in self.store_urls)

    @property
    def has_codec(self) -> bool:
        """Whether the store, or a tier of it, encodes what it is given."""
        return any(StoreUrl.parse(url).codec is not None for url in self.store_urls)

    @property
    def _shown_store(self) -> str:
        """The store for messages."""
        return ", ".join(map(shown_url, [self.store] if isinstance(self.store, str) else self.store))

    @property
    def retention(self) -> Retention:
        """What goes first from the store, and what goes by itself.

        Raises:
            ConfigError: A value is out of range.
        """
        return Retention(ttl_s=self.ttl_s, pinned_share=self.pinned_share, tenant_quota=self.tenant_quota)

    @property
    def profile_path(self) -> Path:
        """Directory of cost profiles: the option, or ``profiles`` in ``cache_root``."""
        if self.profile_dir is not None:
            return _folder("profile_dir", self.profile_dir)
        return cache_root() / "profiles"

    def as_extra_config(self) -> dict[str, Any]:
        """The options that differ from their defaults, as ``kv_connector_extra_config`` would give them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions(ConnectorOptions):
    """The options as they are for one engine, whose model is known: see ``ConnectorOptions``.

    Attributes:
        chunk_tokens: Tokens of one stored and one recomputed chunk.
    """

    chunk_tokens: int = DEFAULT_CHUNK_TOKENS

    def require_block_size(self, block_size: int) -> None:
        """Pass if chunks end where KV blocks end.

        Raises:
            ConfigError: ``chunk_tokens`` is not a multiple: loads and recomputation would write the same block.
        """
        if self.chunk_tokens % block_size:
            lower = self.chunk_tokens // block_size * block_size or block_size
            raise ConfigError(
                f"chunk_tokens is {self.chunk_tokens}, must be a multiple of vLLM's KV block size of "
                f"{block_size} tokens, such as {lower} or {lower + block_size}"
            )

    def require_chunk_in_prompt(self, max_tokens: int) -> None:
        """Pass if a prompt of vLLM's ``max_model_len`` can have a whole chunk.

        Raises:
            ConfigError: It cannot: nothing would ever be saved or restored.
        """
        if self.chunk_tokens >= max_tokens:
            raise ConfigError(
                f"chunk_tokens is {self.chunk_tokens}, must be below vLLM's max_model_len of {max_tokens}: only whole "
                "chunks are saved, and no prompt would have one"
            )

    def require_room_for_chunk(self, chunk_bytes: int) -> None:
        """Pass if the store can hold a chunk, of each tenant.

        Raises:
            ConfigError: It cannot: nothing would ever be restored.
        """
        tiers = [StoreUrl.parse(url) for url in self.store_urls]
        capacity = min(tier.capacity_bytes(self.cpu_bytes_to_use) for tier in tiers)
        room_bytes = int(capacity * (self.tenant_quota or 1.0))
        if chunk_bytes > room_bytes:
            which = "cpu_bytes_to_use" if capacity == self.cpu_bytes_to_use else "the capacity of a store"
            share = "" if self.tenant_quota is None else f", of which a tenant may have {room_bytes}"
            raise ConfigError(
                f"{which} is {capacity}{share}, but one chunk of {self.chunk_tokens} tokens takes "
                f"{chunk_bytes} bytes: allow for many"
            )


_POSITIVE = (
    "cpu_bytes_to_use",
    "keep_tool_s",
    "max_keep_s",
    "chunk_tokens",
    "layers_per_block",
    "checkpoint_every_chunks",
    "throttle_bytes_per_s",
    "starvation_s",
    "ttft_slo_ms",
    "recompute_budget_ms",
    "itl_slo_ms",
    "max_load_tokens",
    "lookup_timeout_s",
    "restore_timeout_s",
    "calibrate_budget_s",
)


def _folder(key: str, text: str) -> Path:
    try:
        folder = Path(text).expanduser()
        os.fsencode(folder)
    except (RuntimeError, UnicodeEncodeError) as error:  # no such user; half a character
        raise ConfigError(f"{key} is {text!r}, which names no folder: {error}") from None
    if "\0" in text:
        raise ConfigError(f"{key} is {text!r}, which names no folder: it has a zero byte")
    return folder


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}, must be one of {', '.join(allowed)}")


def _typed(key: str, value: Any, hint: Any) -> Any:  # noqa: ANN401 -- JSON in, a field's type out
    """A JSON value as the type of its field; no value is reinterpreted silently."""
    kinds = tuple(get_origin(kind) or kind for kind in get_args(hint) or (hint,))
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, bool) == (bool in kinds) and isinstance(value, kinds):
        return value
    if tuple in kinds and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    words = {type(None): "null", tuple: "list of str"}
    names = " or ".join(words.get(kind, kind.__name__) for kind in kinds)
    raise ConfigError(f"{key} is {value!r}, must be {names}")
