"""Under which name this engine saves and restores KV now, and what must not be saved: the scheduler's side of changes.

An engine starts in the generation that it shares with every engine of the same weights. A reset, or a change of the
weights that a worker reports, begins a generation of its own: nothing saved before is found any more, and no other
process finds what is saved from now on. What others share in the store stays.

KV of the base model that vLLM computes in one step with an adapter's is not saved where its kernels mix the two up.

vLLM's own prefix cache is another matter, and so is what another connector loads: they may go on holding KV of the
weights or the adapter before. Until they are reset too, a request that has tokens from them is not saved, or the old KV
would get the new name. A change is heard of after the first step with it: where vLLM's own cache was reset before that
step, it holds nothing old. Of other connectors nobody knows what was still on its way to them, or comes to them from
blocks that requests keep: a reset of them counts once the change was heard of, and together with that of vLLM's cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from cacheflow.vllm.adapters import Adapter, AdapterFiles, AdapterLoad, AdapterVersion
from cacheflow.vllm.facts import BOTTOM, EngineFacts
from cacheflow.vllm.step import WeightsChange

logger = logging.getLogger(__name__)

MIXED = -1
"""Generation of KV that is of more than one state of the weights or of its adapter: it is not saved."""
_Place = tuple[str, str]
"""Name and path of an adapter, by which vLLM's own prefix cache knows it."""
_NO_RANK = -1
"""Stands for the workers until one has said what it has loaded: the files that were there first."""
WEIGHTS_BY_LAYER = "weights_by_layer"
"""Part of ``describe``: tensor-parallel rank, layer and the beginning of its digest, with colons; split by spaces."""
_LAYER_DIGITS = 8
_MAX_LAYERS = 8
_RESET = "(POST /reset_prefix_cache?reset_external=true, or reset_prefix_cache(reset_connector=True))"
_ADVICE = f"Reset vLLM's prefix cache too {_RESET}: it holds KV of the old weights, and other connectors may"
_ADVICE_OF_OTHERS = (
    f"Where the engine has other connectors, reset all of them {_RESET}: they may hold KV of the old ones"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvName:
    """Under which name a request's KV is saved and looked for.

    Attributes:
        namespace: ``Namespace.digest`` of its objects.
        adapter: Its adapter, in the version that its files hold; None without one, or where they cannot be read.
        generation: The engine's generation in which the KV is computed; ``MIXED`` where it is of more than one, or of
            an adapter that cannot be read.
    """

    namespace: str
    adapter: AdapterVersion | None
    generation: int


@dataclass(slots=True)
class _Stale:
    """Which KV of a cache that is not ours may be old.

    Attributes:
        everything: All of it, since the weights are other ones.
        adapters: That of these adapters, by name and path; None is the base model.
        num_steps: Steps that were made since it was reset; None where it never was.
    """

    everything: bool = False
    adapters: set[_Place | None] = field(default_factory=set)
    num_steps: int | None = None

    def step_made(self) -> None:
        if self.num_steps is not None:
            self.num_steps += 1

    def is_older(self, *, before_forward: bool) -> bool:
        """Whether it may hold KV from before a change that a worker reports, from ``before_forward`` of its step."""
        # With two steps it is not known which of them reports: the first may have computed with what was before.
        in_first_step = self.num_steps is not None and self.num_steps <= 1
        return not (in_first_step and before_forward)

    def concerns(self, place: _Place | None) -> bool:
        return self.everything or place in self.adapters


class KvIdentity:
    """Names the KV of requests by the weights and adapters it is computed with, and says which may not be saved.

    Scheduler's thread alone.

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
        self._loaded: dict[_Place, dict[int, str]] = {}
        self._numbers: dict[_Place, set[int]] = {}
        self._of_several_files: set[_Place] = set()
        self._local, self._others = _Stale(), _Stale()
        self._base_leaked = False

    def reset(self) -> None:
        """Begin a generation; what was stopped goes on. vLLM resets all connectors at once."""
        self._begin()
        self.stopped = ""
        if self._local.num_steps == 0:  # or what vLLM itself still holds may come to the others again
            self._others = self._emptied()

    def loaded_by_another(self) -> None:
        """Note that another connector loads a prefix: it comes to be in vLLM's own cache too, and is as old there."""
        self._local.everything |= self._others.everything
        self._local.adapters |= self._others.adapters
        self._local.num_steps = None

    def step_made(self) -> None:
        """Note that a step goes to the workers, whose KV may come to be in vLLM's own cache."""
        self._local.step_made()

    def _begin(self) -> None:
        """From now on nothing that was saved so far is found."""
        self._token = secrets.token_hex(16)
        self.generation += 1

    def weights_changed(self, change: WeightsChange) -> None:
        """Begin a generation because weights changed; unless that was announced, nothing goes on until a reset."""
        if change.announced:
            self._begin_with_other_weights(change)
            logger.warning(
                "the model's weights were changed (%s): nothing saved so far is restored any more, and KV is saved for "
                "this engine alone. %s", change.how, _ADVICE if self._local.everything else _ADVICE_OF_OTHERS,
            )  # fmt: skip
        elif not self.stopped:
            self._begin_with_other_weights(change)
            without_notice = f"the model's weights were changed without notice ({change.how})"
            self.stopped = f"{without_notice}; reset the connector to go on"
            logger.error(
                "%s: nothing is saved or restored until the connector is reset (POST "
                "/reset_prefix_cache?reset_external=true, or reset_prefix_cache(reset_connector=True))", without_notice,
            )  # fmt: skip

    def _begin_with_other_weights(self, change: WeightsChange) -> None:
        self._begin()
        self.stopped = ""
        self._local.everything |= self._local.is_older(before_forward=change.before_forward)
        self._others.everything = True

    def adapter_loaded(self, rank: int, load: AdapterLoad) -> None:
        """Take in that a worker has loaded an adapter, perhaps from other files than before."""
        place = _place(load.version)
        digests = self._loaded.setdefault(place, {})
        digests.pop(_NO_RANK, None)
        digests[rank] = load.version.digest
        numbers = self._numbers.setdefault(place, set())
        numbers.add(load.version.number)
        if not load.replaced:
            return
        self._others.adapters.add(place)
        if len(numbers) > 1:  # requests with the other number go on with its files, under the same name in vLLM's cache
            self._of_several_files.add(place)
        if place in self._of_several_files or self._local.is_older(before_forward=load.before_forward):
            self._local.adapters.add(place)

    def base_leaked(self) -> None:
        """Note that vLLM has computed KV of the base model with an adapter, which all caches but ours may hold now."""
        if not self._base_leaked:
            logger.warning(
                "vLLM has computed a request of the base model in one step with an adapter's: its LoRA kernels for the "
                "CPU give it that adapter. KV of such requests is not saved, nor of those that find it in vLLM's "
                "prefix cache, until that is reset"
            )
        self._base_leaked = True
        self._local.adapters.add(None)
        self._others.adapters.add(None)

    def local_cache_was_reset(self) -> None:
        """VLLM's own prefix cache is empty: what is found in it from now on is new."""
        self._local = self._emptied()

    def _emptied(self) -> _Stale:
        return _Stale(num_steps=0, adapters=set(self._of_several_files))

    def name(self, adapter: Adapter | None) -> KvName:
        """The present name of KV of the base model, or of an adapter by the files that its path holds now."""
        version = None if adapter is None else self._files.version(adapter)
        if version is not None:
            self._loaded.setdefault(_place(version), {_NO_RANK: version.digest})
        generation = MIXED if version is None and adapter is not None else self.generation
        return KvName(namespace=self.namespace(version), adapter=version, generation=generation)

    def namespace(self, adapter: AdapterVersion | None) -> str:
        """Digest for keys, of the base model or of an adapter."""
        own = generation_namespace(self._shared, token=self._token)
        return own if adapter is None else adapter_namespace(own, digest=adapter.digest)

    def parts(self, adapter: AdapterVersion | None) -> dict[str, str]:
        """What tells ``namespace`` from the one that all engines with the weights as loaded share; for people."""
        own = {"generation": self._token} if self._token else {}
        return own if adapter is None else own | {"lora": adapter.digest}

    def may_be_old(
        self, adapter: AdapterVersion | None, *, num_local: int, num_loaded: int, num_before: int = 0
    ) -> bool:
        """Whether a request may have KV of other weights, or of its adapter's files before.

        ``num_local`` of its tokens came from vLLM's own prefix cache, ``num_loaded`` by another connector, and
        ``num_before`` in all were there before the step that is to save. As long as a worker is not known to have
        loaded the files that its adapter has now, these are of the files before.
        """
        place = None if adapter is None else _place(adapter)
        if adapter is not None and set(self._loaded[_place(adapter)].values()) != {adapter.digest}:
            return bool(num_local or num_loaded or num_before)
        return bool(num_local and self._local.concerns(place)) or bool(num_loaded and self._others.concerns(place))


def _place(version: AdapterVersion) -> _Place:
    assert version.adapter is not None, "files are read, and loaded, of an adapter that is known"
    return version.adapter.name, version.adapter.path


def shared_namespace(ranks: Iterable[EngineFacts]) -> str:
    """One digest for all ranks of an engine: the same for every number of pipeline stages that share the layers.

    Ranks that know nothing of their weights (fakes) are distinguished by number; a single one has its own digest.
    """
    facts = sorted(ranks, key=lambda each: each.rank)
    if len(facts) == 1 and not facts[0].weights:
        return facts[0].namespace
    if not all(each.weights for each in facts):
        return _digest(json.dumps([(each.rank, each.namespace) for each in facts]))
    names = sorted({(each.shard.tp_rank, each.namespace) for each in facts})
    layers = sorted((each.shard.tp_rank, layer, digest) for each in facts for layer, digest in each.weights)
    return _digest(json.dumps([names, layers]))


def describe(ranks: Iterable[EngineFacts]) -> dict[str, str]:
    """What ``shared_namespace`` is the digest of, by name, for people; and how a layer's objects are cut."""
    facts = sorted(ranks, key=lambda each: each.rank)
    first = facts[0]
    layers = sorted((each.shard.tp_rank, layer, digest) for each in facts for layer, digest in each.weights)
    return dict(first.identity) | {
        "weights_fingerprint": _digest(json.dumps(layers)),
        WEIGHTS_BY_LAYER: " ".join(f"{rank}:{layer}:{digest[:_LAYER_DIGITS]}" for rank, layer, digest in layers),
        "shard": f"tensor_parallel_size {first.shard.tp_size}",
        "layers_per_block": str(first.layers_per_block),
    }


def differing_layers(own: str, other: str) -> str:
    """Which layers two values of ``WEIGHTS_BY_LAYER`` differ in, for people; empty where that cannot be said."""
    digests, others = (dict(each.rsplit(":", 1) for each in text.split() if ":" in each) for text in (own, other))
    if digests.keys() != others.keys():
        return ""
    all_layers = {int(name.partition(":")[2]) for name in digests}
    layers = sorted({int(name.partition(":")[2]) for name in digests if digests[name] != others[name]})
    if not layers or len(all_layers) == 1:
        return ""
    if len(layers) == len(all_layers):
        return "in every layer"
    named = ", ".join("below the first" if layer == BOTTOM else str(layer) for layer in layers[:_MAX_LAYERS])
    return f"in {len(layers)} of {len(all_layers)} layers: {named}{', ...' if len(layers) > _MAX_LAYERS else ''}"


def adapter_namespace(namespace: str, *, digest: str) -> str:
    """Digest under which KV of an adapter with files of this digest is stored; its name and path do not matter."""
    return _digest(json.dumps(["adapter", namespace, digest]))


def generation_namespace(namespace: str, *, token: str) -> str:
    """Digest under which an engine stores KV after a reset or a change of its weights.

    A ``token`` is random: no other process can have it. Without one ``namespace`` stays, which all engines share that
    have the weights as loaded.
    """
    return _digest(json.dumps(["generation", namespace, token])) if token else namespace


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
