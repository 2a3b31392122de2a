"""Which of vLLM's KV cache groups holds what: one holds keys and values, in a hybrid model others hold running states.

A block id belongs to one group at a time, and every group has its own list of a request's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cacheflow.errors import ConfigError

STATE_SPEC = "MambaSpec"
"""VLLM's KV cache spec of layers that keep a running state."""
DELTA_NET, MAMBA2 = "GDN_ATTN", "MAMBA2"
"""What vLLM calls recurrent layers whose running states are restored: Gated DeltaNet and Mamba-2."""


@dataclass(frozen=True, slots=True)
class KvGroups:
    """The KV cache groups of one worker, by their place in vLLM's list.

    Attributes:
        attention: The group of layers that keep keys and values of every token.
        states: The groups of layers that keep a running state; none but in a hybrid model.
        block_size: Tokens of one KV block; a running state is kept for each so many tokens.
        spec: What vLLM says of the attention layers' blocks.
        attention_names: VLLM's names of the layers of ``attention``.
        state_names: Names of the layers of each of ``states``.
        state_kind: What vLLM calls the layers of ``states``; empty without any.
        kept_within_passes: Whether a prompt's last pass leaves the states where its last whole block ends as it goes by
            (Mamba-2): then vLLM ends no pass there.
    """

    attention: int
    states: tuple[int, ...]
    block_size: int
    spec: Any
    attention_names: tuple[str, ...]
    state_names: tuple[tuple[str, ...], ...]
    state_kind: str = ""
    kept_within_passes: bool = False

    @classmethod
    def of(cls, kv_cache_config: Any) -> KvGroups:  # noqa: ANN401 -- vLLM's KVCacheConfig
        """The groups of an engine.

        Raises:
            ConfigError: Not exactly one of them keeps keys and values.
        """
        groups = list(enumerate(kv_cache_config.kv_cache_groups))
        states = [(index, group) for index, group in groups if is_state_spec(group.kv_cache_spec)]
        others = [(index, group) for index, group in groups if not is_state_spec(group.kv_cache_spec)]
        if len(others) != 1:
            raise ConfigError(f"{len(others)} KV cache groups keep keys and values; only models with one are supported")
        [(attention, group)] = others
        return cls(
            attention=attention,
            states=tuple(index for index, _ in states),
            block_size=int(group.kv_cache_spec.block_size),
            spec=group.kv_cache_spec,
            attention_names=tuple(getattr(group, "layer_names", ())),
            state_names=tuple(tuple(each.layer_names) for _, each in states),
            state_kind=kind_of_states(states[0][1].kv_cache_spec) if states else "",
            kept_within_passes=any(keeps_within_passes(each.kv_cache_spec) for _, each in states),
        )

    def kv_blocks(self, by_group: Sequence[Sequence[int]]) -> list[int]:
        """A request's blocks of keys and values, of those that vLLM lists by group."""
        return list(by_group[self.attention])

    def state_blocks(self, by_group: Sequence[Sequence[int]], num_tokens: int) -> tuple[int, ...]:
        """The blocks, one of each state group, that hold a request's states after so many tokens, whole blocks.

        None where vLLM keeps no states there, or has let go of them: its null block stands for those.
        """
        column = num_tokens // self.block_size - 1
        blocks = tuple(int(by_group[group][column]) for group in self.states if column < len(by_group[group]))
        return blocks if len(blocks) == len(self.states) and 0 not in blocks else ()

    def by_group(self, kv_blocks: Sequence[int], state_blocks: Sequence[Sequence[int]]) -> tuple[list[int], ...]:
        """Blocks of a request as vLLM lists them."""
        listed: list[list[int]] = [[] for _ in range(1 + len(self.states))]
        listed[self.attention] = list(kv_blocks)
        for group, blocks in zip(self.states, state_blocks, strict=True):
            listed[group] = list(blocks)
        return tuple(listed)


def kind_of_states(spec: Any) -> str:  # noqa: ANN401 -- vLLM's MambaSpec
    """What vLLM calls the layers that keep these running states."""
    kind = getattr(spec, "mamba_type", "")
    return str(getattr(kind, "name", kind))


def keeps_within_passes(spec: Any) -> bool:  # noqa: ANN401 -- vLLM's KVCacheSpec
    """Whether layers with this KV cache spec leave states in the middle of a pass."""
    return bool(getattr(spec, "num_prefill_checkpoint_blocks", 0))


def is_state_spec(spec: Any) -> bool:  # noqa: ANN401 -- vLLM's KVCacheSpec
    """Whether layers with this KV cache spec keep a running state."""
    return type(spec).__name__ == STATE_SPEC
