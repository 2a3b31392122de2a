"""The drafter of an engine that speculates with a model (EAGLE, MTP): a last row on top of the target's own.

At a position the drafter reads what the target made of the token there and the token after it, and keeps keys and
values of its own for it, in the same KV blocks as the target. So once all of the target has run for a chunk, the
drafter's keys and values follow by one call of it, as vLLM makes it in every prefill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from cacheflow.errors import UnsupportedModelError
from cacheflow.vllm.models.inputs import TextInputs
from cacheflow.vllm.models.layers import CallEnded, ended_by, writes_before


@dataclass(frozen=True, slots=True, eq=False)
class Drafter:
    """A drafter with one attention layer.

    Attributes:
        model: VLLM's.
        inputs: How it is given text.
        attention: Its attention object.
        name: That one's name, the key of its KV cache.
    """

    model: Any
    inputs: TextInputs
    attention: Any
    name: str

    @property
    def writes_before(self) -> bool:
        """Whether its keys and values are in the cache before its attention is computed."""
        return writes_before(self.attention)

    def write(self, target_out: Any, token_ids: torch.Tensor, positions: torch.Tensor) -> None:  # noqa: ANN401
        """Write its keys and values; within a forward context of the chunk.

        Args:
            target_out: What the target returned for the chunk: its last states, or those with the auxiliary ones.
            token_ids: ``[n]``: the token after each of the chunk's.
            positions: As the target is given them.
        """
        states = target_out
        if isinstance(target_out, tuple):
            states, auxiliary = target_out
            if auxiliary:
                states = self.model.combine_hidden_states(torch.cat(auxiliary, dim=-1))
        call = {**self.inputs.arguments(token_ids), "positions": positions, "hidden_states": states}
        if not self.writes_before:
            self.model(**call)
            return
        with suppress(CallEnded), ended_by(self.attention):
            self.model(**call)


def drafter_names(model: Any, context: Mapping[str, Any], names: Sequence[str]) -> list[str]:  # noqa: ANN401
    """Those of these attention layers that are the drafter's; ``model`` is None without one."""
    own = set() if model is None else {id(module) for module in model.modules()}
    return [name for name in names if id(context[name]) in own]


def find_drafter(runner: Any, context: Mapping[str, Any], names: Sequence[str]) -> Drafter | None:  # noqa: ANN401
    """The drafter with these attention layers; None where it has none of its own.

    Raises:
        UnsupportedModelError: It has several.
    """
    if not names:
        return None
    if len(names) > 1:
        raise UnsupportedModelError(f"its drafter has {len(names)} layers with a KV cache: one is recomputed")
    model = runner.get_draft_model()
    proposer = getattr(runner, "speculator", None) or runner.drafter  # of the second runner generation, or the first
    inputs = TextInputs.of_model(model, embedded=bool(proposer.supports_mm_inputs))
    return Drafter(model=model, inputs=inputs, attention=context[names[0]], name=names[0])
