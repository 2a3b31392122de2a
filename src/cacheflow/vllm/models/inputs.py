"""How vLLM's runner gives a model text: as token ids or, in an engine that takes images or sound, as embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class TextInputs:
    """How one model, the target or a drafter, is given text.

    Attributes:
        model: VLLM's.
        embedded: As embeddings, which the model makes of the ids.
        with_ids: The ids beside the embeddings, for a model that looks at both.
    """

    model: Any
    embedded: bool = False
    with_ids: bool = False

    @classmethod
    def of_model(cls, model: Any, *, embedded: bool) -> TextInputs:  # noqa: ANN401 -- vLLM's model
        """How the runner calls a model."""
        return cls(model, embedded, bool(getattr(model, "requires_raw_input_tokens", False)))

    def arguments(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """The call's arguments for tokens ``[n]``, of which none is an image's."""
        if not self.embedded:
            return {"input_ids": token_ids, "inputs_embeds": None}
        no_media = torch.zeros(token_ids.shape, dtype=torch.bool, device=token_ids.device)
        embeddings = self.model.embed_input_ids(token_ids, multimodal_embeddings=[], is_multimodal=no_media)
        return {"input_ids": token_ids if self.with_ids else None, "inputs_embeds": embeddings}
