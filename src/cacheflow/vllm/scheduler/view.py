"""What the connector passes on of vLLM's requests and steps, in plain data: the scheduler side does not import vLLM."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cacheflow.vllm.adapters import Adapter

_HASH = re.compile(r"(?:^|:)[0-9a-f]{64,}$")
BlockIdsOf = Callable[[str], Sequence[int]]
"""KV blocks of a request, in order, by its id."""
StateBlocksOf = Callable[[str, int], tuple[int, ...]]
"""Blocks, one of each group, that hold a request's running states after so many tokens, by its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSpan:
    """Where an image or a sound stands in a prompt: tokens ``[start, end)``, and what vLLM calls its content."""

    start: int
    end: int
    content_id: str

    @classmethod
    def of(cls, feature: Any) -> MediaSpan:  # noqa: ANN401 -- vLLM's MultiModalFeatureSpec
        """What vLLM passes with a request."""
        start = feature.mm_position.offset
        return cls(start=start, end=start + feature.mm_position.length, content_id=feature.identifier)

    @property
    def is_hash(self) -> bool:
        """Whether that is a hash of the content, and neither a number of this process nor a name of the user's."""
        return _HASH.search(self.content_id) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStates:
    """Where a restoration's running states stand, of a model with recurrent layers: one block of each group.

    Attributes:
        blocks: Those that vLLM has set aside for the end of the prefix.
        start: Those that hold the states where the prefix goes on; none where it begins with the first token.
    """

    blocks: tuple[int, ...] = ()
    start: tuple[int, ...] = ()


NO_STATES = TargetStates()


def no_state_blocks(request_id: str, num_tokens: int) -> tuple[int, ...]:
    """A ``StateBlocksOf`` of a model without recurrent layers."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """One request.

    Attributes:
        request_id: vLLM's.
        tokens: Known token ids, prompt and output; a live view that grows.
        num_prompt_tokens: Tokens of the prompt.
        salt: ``cache_salt``.
        adapter: Its LoRA adapter; None without.
        media: Images and sounds in the prompt, in order.
        params: ``kv_transfer_params``.
        hashable: Whether the token ids say what the prompt is (not so for prompt embeddings), and ``media`` what else.
        streams: Whether its prompt goes on while it is served (vLLM's streaming input). Each part takes the last token
            back that is known by then, and may bring images and sounds that are not in ``media``.
        computes_all: Whether vLLM computes the whole prompt, whatever is cached of it.
    """

    request_id: str
    tokens: Sequence[int]
    num_prompt_tokens: int
    salt: str = ""
    adapter: Adapter | None = None
    media: Sequence[MediaSpan] = ()
    params: Mapping[str, Any] | None = None
    hashable: bool = True
    streams: bool = False
    computes_all: bool = False

    @classmethod
    def of(cls, request: Any) -> RequestView:  # noqa: ANN401 -- vLLM's Request
        """VLLM's request."""
        lora, media = request.lora_request, [MediaSpan.of(feature) for feature in request.mm_features]
        plain = request.prompt_embeds is None and request.pooling_params is None
        return cls(
            request_id=request.request_id,
            tokens=request.all_token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            salt=request.cache_salt or "",
            adapter=Adapter.of(lora) if lora else None,
            media=media,
            params=request.kv_transfer_params,
            hashable=plain and all(each.is_hash for each in media),
            streams=bool(request.resumable),
            computes_all=bool(request.skip_reading_prefix_cache),
        )

    @property
    def num_text_tokens(self) -> int | None:
        """Leading tokens before the first image or sound, which alone can be recomputed; None where all can."""
        return min((each.start for each in self.media), default=None)


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request of a step, and how many of its tokens are computed when the step has run.

    Attributes:
        request_id: vLLM's.
        num_computed: Tokens.
        num_scheduled: Those of them that the step computes.
        unproven: Another connector loads a prefix for this very step, and may fail, which shows after the step.
    """

    request_id: str
    num_computed: int
    num_scheduled: int = 0
    unproven: bool = False

    @classmethod
    def of_step(cls, scheduler_output: Any) -> Iterator[ScheduledRequest]:  # noqa: ANN401 -- vLLM's SchedulerOutput
        """A step's requests without their drafts: tokens that may be rejected are no request's tokens yet."""
        drafts, sync_loads = scheduler_output.scheduled_spec_decode_tokens, scheduler_output.has_sync_kv_loads
        cached = scheduler_output.scheduled_cached_reqs
        new = [(each.req_id, each.num_computed_tokens) for each in scheduler_output.scheduled_new_reqs]
        for request_id, num_computed in [*new, *zip(cached.req_ids, cached.num_computed_tokens, strict=True)]:
            count = scheduler_output.num_scheduled_tokens[request_id] - len(drafts.get(request_id, ()))
            begins = request_id not in cached.req_ids or request_id in cached.resumed_req_ids
            yield cls(request_id, num_computed + count, count, unproven=sync_loads and begins)
