"""Values that ranks must agree on before they run layers: layers hold collectives.

Every rank must make the same calls in the same order. Alone, or outside vLLM's process groups, a value
is itself.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed

T = TypeVar("T")


def from_first_rank(value: T) -> T:
    """The first rank's value, on every rank."""
    group = _group()
    if group is None:
        return value
    agreed: T = group.broadcast_object(value, src=0)
    return agreed


def of_all_ranks(value: T) -> list[T]:
    """The value of every rank of the engine, those of other pipeline stages included; all of them must ask."""
    from vllm.distributed.parallel_state import get_world_group, model_parallel_is_initialized

    if not model_parallel_is_initialized() or get_world_group().world_size == 1:
        return [value]
    group = get_world_group()
    values = [value] * group.world_size
    torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def _group() -> Any:  # noqa: ANN401 -- vLLM's GroupCoordinator
    from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized

    if not model_parallel_is_initialized():
        return None
    group = get_tp_group()
    return group if group.world_size > 1 else None
