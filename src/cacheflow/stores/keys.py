"""What a stored piece of a prefix is called: namespace, chain hash, kind, layers, shard.

Two keys are equal only if the bytes they name are interchangeable. The *namespace* stands for everything that
changes the numbers (weights, dtype, layout, chunk size), the *chain hash* for the tokens up to the end of a chunk and
for the tenant, the rest for which part of the model's cache it is.

Chain hashes are 32 raw ``bytes``; inside a key they are 64 hex digits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from cacheflow.errors import ConfigError, PromptError

TokenIds = Sequence[int] | npt.NDArray[Any]
"""Token ids of a prompt or a part of it: one dimension, integers of 0 or more."""

CHAIN_HASH_BYTES = 32

_CHAIN_TAG = b"cacheflow chain 1"
_ROOT_TAG = b"cacheflow root 1"
_HEX = re.compile(r"[0-9a-f]+\Z")
_NAME = re.compile(
    r"([0-9a-f]{32,})_([0-9a-f]{64})_([a-z]+)_(N)-(N)_tp(N)of(N)\.pp(N)of(N)".replace("N", "0|[1-9][0-9]{0,8}")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """Everything besides the tokens that decides the bytes of a KV cache.

    Attributes:
        weights_fingerprint: Digest of the weights themselves, not of a model name or path.
        dtype: Dtype of the KV cache.
        chunk_tokens: Chunk size of the save; restoration is bit-exact only in the chunks of the save.
        layout_version: Version of the order of keys and values inside an object.
        rope: Canonical description of the rotary embedding, scaling included.
        quantization: Quantisation of weights and cache, ``"none"`` without.
        lora: Fingerprint of the adapter; empty without.
        extra: More ``(name, value)`` pairs that decide the bytes, such as the attention kernel; order does not matter.
        digest: 128 bits of SHA-256 over the canonical JSON of all of the above, as 32 hex digits.
    """

    weights_fingerprint: str
    dtype: str
    chunk_tokens: int
    layout_version: int = 1
    rope: str = ""
    quantization: str = "none"
    lora: str = ""
    extra: tuple[tuple[str, str], ...] = ()
    digest: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Check the fields and compute the digest.

        Raises:
            ConfigError: The fingerprint or dtype is empty, ``chunk_tokens`` is below 1, or a name in ``extra`` repeats.
        """
        if not self.weights_fingerprint or not self.dtype:
            raise ConfigError(
                f"namespace: weights_fingerprint {self.weights_fingerprint!r} and dtype {self.dtype!r} must be given"
            )
        if self.chunk_tokens < 1:
            raise ConfigError(f"namespace: chunk_tokens is {self.chunk_tokens}, must be at least 1")
        if len({name for name, _ in self.extra}) != len(self.extra):
            raise ConfigError(f"namespace: a name repeats in extra {self.extra}")
        object.__setattr__(self, "extra", tuple(sorted(self.extra)))
        object.__setattr__(self, "digest", hashlib.sha256(self._canonical_json()).hexdigest()[:32])

    def parts(self) -> dict[str, str]:
        """What the digest is made of, by name, as text."""
        values = {
            each.name: str(getattr(self, each.name)) for each in fields(self) if each.init and each.name != "extra"
        }
        return values | dict(self.extra)

    def _canonical_json(self) -> bytes:
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


class ObjectKind(Enum):
    """What an object holds."""

    KV = "kv"
    """Keys and values of one chunk in a range of layers."""
    STATE = "state"
    """Running states of the recurrent layers in a range of layers, at the end of a chunk."""
    HIDDEN = "hidden"
    """Boundary hidden states of one chunk: the input of layer ``layer_lo``."""
    NEXT = "next"
    """Lengths of the partial chunks that were saved after this chain hash (see ``stores.prefix_index``)."""
    IDENTITY = "identity"
    """What a namespace stands for, as JSON text padded with spaces to ``IDENTITY_BYTES`` (see
    ``stores.identity_record``)."""


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Shard:
    """Which rank's part of a layer: tensor-parallel rank, pipeline stage."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        """Reject ranks outside their group.

        Raises:
            ConfigError: A rank is not in ``[0, size)``.
        """
        for name, rank, size in (("tp", self.tp_rank, self.tp_size), ("pp", self.pp_rank, self.pp_size)):
            if not 0 <= rank < size:
                raise ConfigError(f"shard: {name}_rank {rank} must be in [0, {name}_size {size})")

    def __str__(self) -> str:
        """Canonical form, ``tp0of1.pp0of1``."""
        return f"tp{self.tp_rank}of{self.tp_size}.pp{self.pp_rank}of{self.pp_size}"


WHOLE = Shard()
"""The only shard of a model on one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectKey:
    """The name of one stored object, which is one cell of the grid.

    Attributes:
        namespace: ``Namespace.digest``.
        chain_hash: Hex of the chain hash at the end of the chunk (for ``NEXT``: at the position it tells about; for
            ``IDENTITY``: zeros).
        kind: What the object holds.
        layer_lo: First layer; 0 for ``NEXT`` and ``IDENTITY``.
        layer_hi: One past the last layer; equal to ``layer_lo`` but for ``KV`` and ``STATE``.
        shard: Which rank's part.
        name: Canonical string of letters, digits, ``.``, ``-`` and ``_``: a file name, and what equality rests on.
    """

    namespace: str
    chain_hash: str
    kind: ObjectKind
    layer_lo: int = 0
    layer_hi: int = 0
    shard: Shard = WHOLE
    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: A digest is not hex of the right length, or the layer range does not fit the kind.
        """
        if len(self.chain_hash) != 2 * CHAIN_HASH_BYTES or not _HEX.match(self.chain_hash):
            raise ConfigError(f"chain_hash {self.chain_hash!r} is not {2 * CHAIN_HASH_BYTES} lower-case hex digits")
        if len(self.namespace) < 32 or not _HEX.match(self.namespace):
            raise ConfigError(f"namespace {self.namespace!r} is not a digest of at least 32 lower-case hex digits")
        of_no_layer = self.kind in (ObjectKind.NEXT, ObjectKind.IDENTITY)
        empty_range = self.layer_lo == self.layer_hi
        if (
            not 0 <= self.layer_lo <= self.layer_hi
            or empty_range == (self.kind in (ObjectKind.KV, ObjectKind.STATE))
            or (of_no_layer and self.layer_hi)
        ):
            raise ConfigError(f"layers [{self.layer_lo}, {self.layer_hi}) do not fit a {self.kind.value} object")
        name = f"{self.namespace}_{self.chain_hash}_{self.kind.value}_{self.layer_lo}-{self.layer_hi}_{self.shard}"
        object.__setattr__(self, "name", name)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical name, 32 bytes; it stands in the record's header."""
        return hashlib.sha256(self.name.encode()).digest()


@dataclass(frozen=True, slots=True)
class RankKeys:
    """Names the objects of one rank's part of a model.

    By the model's layers and the heads of the tensor-parallel rank, never by the pipeline stage that wrote them: what
    one split into stages saved, another restores.

    Attributes:
        shard: Tensor-parallel rank and pipeline stage.
        first_layer: The model's layer that is the stage's first.
        replicated: All tensor-parallel ranks keep the same bytes, so that there is one object for them.
    """

    shard: Shard = WHOLE
    first_layer: int = 0
    replicated: bool = False

    @property
    def writes(self) -> bool:
        """Whether this rank writes keys and values; of replicas the first does."""
        return not self.replicated or self.shard.tp_rank == 0

    def kv(self, namespace: str, chain_hash: str, layers: tuple[int, int]) -> ObjectKey:
        """Key of keys and values of a chunk, given the chain hash (hex) at its end.

        Args:
            namespace: ``Namespace.digest`` of the save.
            chain_hash: Hex.
            layers: ``[lo, hi)``, counted from the stage's first layer.
        """
        return self._of_layers(ObjectKind.KV, namespace, chain_hash, layers)

    def states(self, namespace: str, chain_hash: str, layers: tuple[int, int]) -> ObjectKey:
        """Key of the running states of recurrent layers, given the chain hash (hex) at their position.

        Arguments as in ``kv``. The states' dtype is part of the namespace.
        """
        return self._of_layers(ObjectKind.STATE, namespace, chain_hash, layers)

    def _of_layers(self, kind: ObjectKind, namespace: str, chain_hash: str, layers: tuple[int, int]) -> ObjectKey:
        return ObjectKey(
            namespace=namespace,
            chain_hash=chain_hash,
            kind=kind,
            layer_lo=self.first_layer + layers[0],
            layer_hi=self.first_layer + layers[1],
            shard=Shard(tp_rank=0 if self.replicated else self.shard.tp_rank, tp_size=self.shard.tp_size),
        )

    def boundary(self, namespace: str, chain_hash: str) -> ObjectKey:
        """Key of a chunk's boundary states, the input of the stage's first layer.

        All tensor-parallel ranks hold the same states, so there is one object for them; how many ranks added up to it
        decides its last bits.
        """
        layer, shard = self.first_layer, Shard(tp_size=self.shard.tp_size)
        return ObjectKey(
            namespace=namespace,
            chain_hash=chain_hash,
            kind=ObjectKind.HIDDEN,
            layer_lo=layer,
            layer_hi=layer,
            shard=shard,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankObjects:
    """Names the objects of a chunk that one rank stores.

    Attributes:
        keys: The rank's.
        rows: Layers ``[lo, hi)`` in each object of keys and values, bottom first.
        state_rows: Those of them that have running states too, stored at the end of some chunks.
        boundary: Whether it may store a chunk's boundary states too.
    """

    keys: RankKeys
    rows: tuple[tuple[int, int], ...]
    state_rows: tuple[tuple[int, int], ...] = ()
    boundary: bool = False

    def kv(self, namespace: str, chain_hash: str) -> list[ObjectKey]:
        """The objects of keys and values of a chunk, by the chain hash (hex) at its end."""
        return [self.keys.kv(namespace, chain_hash, rows) for rows in self.rows]

    def beside(self, namespace: str, chain_hash: str) -> list[ObjectKey]:
        """What may be stored beside them."""
        found = [self.keys.states(namespace, chain_hash, rows) for rows in self.state_rows]
        return [*found, self.keys.boundary(namespace, chain_hash)] if self.boundary else found


def next_key(namespace: str, parent_hash: bytes) -> ObjectKey:
    """Key of the ``NEXT`` object at a chain hash."""
    return ObjectKey(namespace=namespace, chain_hash=parent_hash.hex(), kind=ObjectKind.NEXT)


def identity_key(namespace: str) -> ObjectKey:
    """Key of the identity of a namespace (``Namespace.digest``).

    Raises:
        ConfigError: The namespace is no digest.
    """
    return ObjectKey(namespace=namespace, chain_hash="0" * (2 * CHAIN_HASH_BYTES), kind=ObjectKind.IDENTITY)


def namespace_of(name: str) -> str | None:
    """The namespace in an ``ObjectKey.name``; None for a name that is not of that form."""
    found = _NAME.fullmatch(name)
    return found[1] if found else None


def chain_hash_of(name: str) -> str:
    """The chain hash in an ``ObjectKey.name``."""
    return name.split("_", 2)[1]


def key_of(name: str) -> ObjectKey:
    """The key whose name this is.

    Raises:
        ConfigError: It is no ``ObjectKey.name``.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"{name!r} is not the name of an object")
    namespace, chain, kind, *numbers = found.groups()
    layer_lo, layer_hi, tp_rank, tp_size, pp_rank, pp_size = map(int, numbers)
    try:
        known = ObjectKind(kind)
    except ValueError as error:
        raise ConfigError(f"{name!r} is of an unknown kind, {kind}") from error
    shard = Shard(tp_rank=tp_rank, tp_size=tp_size, pp_rank=pp_rank, pp_size=pp_size)
    return ObjectKey(
        namespace=namespace, chain_hash=chain, kind=known, layer_lo=layer_lo, layer_hi=layer_hi, shard=shard
    )  # fmt: skip


def chain_root(salt: str = "") -> bytes:
    """Chain hash of the empty prefix; tenants with different salts share no descendant of it."""
    encoded = salt.encode()
    return hashlib.sha256(_ROOT_TAG + len(encoded).to_bytes(8, "little") + encoded).digest()


def chain_hash(parent: bytes, tokens: TokenIds, salt: str = "", multimodal_ids: Iterable[str] = ()) -> bytes:
    """Hash one chunk onto its parent: all 256 bits of SHA-256 over ``(parent, tokens, salt, multimodal_ids)``.

    Every part carries its length, so no two argument lists encode to the same bytes.

    Args:
        parent: Chain hash of the chunk before, or ``chain_root(salt)``.
        tokens: Token ids of this chunk alone.
        salt: Tenant salt, the same as in the root.
        multimodal_ids: Content hashes of the images or audio whose placeholders lie in this chunk, in order.

    Raises:
        ConfigError: ``parent`` is not 32 bytes long.
        PromptError: ``tokens`` is not one-dimensional integers of 0 or more.
    """
    if len(parent) != CHAIN_HASH_BYTES:
        raise ConfigError(f"parent chain hash has {len(parent)} bytes, must have {CHAIN_HASH_BYTES}; see chain_root")
    return _link(parent, as_token_array(tokens), _tail(salt, multimodal_ids))


def chain_hashes(
    tokens: TokenIds,
    chunk_ends: Sequence[int],
    salt: str = "",
    multimodal_ids: Sequence[Iterable[str]] = (),
    *,
    parent: bytes | None = None,
) -> tuple[bytes, ...]:
    """Chain hash at the end of each chunk, from the root (or from ``parent``, with positions relative to it).

    Args:
        tokens: Token ids, at least ``chunk_ends[-1]`` of them.
        chunk_ends: Ascending positions at which chunks end; the first chunk starts at 0.
        salt: Tenant salt.
        multimodal_ids: One entry per chunk, or empty when the prompt has none.
        parent: Chain hash before ``tokens[0]``; None for the root.

    Raises:
        ConfigError: Boundaries do not ascend within the tokens, or ``multimodal_ids`` has another length.
        PromptError: ``tokens`` is not one-dimensional integers of 0 or more.
    """
    if multimodal_ids and len(multimodal_ids) != len(chunk_ends):
        raise ConfigError(f"multimodal_ids has {len(multimodal_ids)} entries for {len(chunk_ends)} chunks")
    array = as_token_array(tokens)
    plain_tail = _tail(salt, ())
    last = chain_root(salt) if parent is None else parent
    start = 0
    hashes = []
    for index, end in enumerate(chunk_ends):
        if not start < end <= len(array):
            raise ConfigError(f"chunk end {end} must lie in ({start}, {len(array)}]")
        last = _link(last, array[start:end], _tail(salt, multimodal_ids[index]) if multimodal_ids else plain_tail)
        hashes.append(last)
        start = end
    return tuple(hashes)


def as_token_array(tokens: TokenIds) -> npt.NDArray[np.int64]:
    """Token ids as a contiguous little-endian int64 array; no copy if they are one already.

    Raises:
        PromptError: Not one-dimensional integers of 0 or more.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise PromptError(f"token ids must be one-dimensional integers, got shape {array.shape} of {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int64).max):
        raise PromptError(f"token ids must be 0 or more and fit 63 bits, got {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, dtype="<i8")


def _link(parent: bytes, array: npt.NDArray[np.int64], tail: bytes) -> bytes:
    digest = hashlib.sha256(_CHAIN_TAG + parent + len(array).to_bytes(8, "little"))
    digest.update(array.data)
    digest.update(tail)
    return digest.digest()


def _tail(salt: str, multimodal_ids: Iterable[str]) -> bytes:
    parts = [part.encode() for part in (salt, *multimodal_ids)]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
