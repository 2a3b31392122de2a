"""Values that the tensor-parallel ranks of a stage must agree on before they run layers: layers hold collectives.

Every rank of the stage must make the same calls in the same order. Alone, or outside vLLM's process groups, a value
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


def everyone(flag: bool) -> bool:
    """Whether the flag is set on every rank."""
    group = _group()
    if group is None:
        return flag
    # Not broadcast_object from each rank in turn: vLLM's tensor-parallel group broadcasts from its first rank alone.
    flags = [False] * group.world_size
    torch.distributed.all_gather_object(flags, flag, group=group.cpu_group)
    return all(flags)


def _group() -> Any:  # noqa: ANN401 -- vLLM's GroupCoordinator
    from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized

    if not model_parallel_is_initialized():
        return None
    group = get_tp_group()
    return group if group.world_size > 1 else None
