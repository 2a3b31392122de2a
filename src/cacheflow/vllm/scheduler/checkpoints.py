"""Where the running states of a request's recurrent layers are saved: at few of its chunks, for they take much room.

vLLM's own prefix cache keeps them where a prompt's last whole block ends, and a step that stops anywhere else leaves
them for that step alone. So they are saved where a later prompt is likely to go on: at the prompt's last chunk, where
the store's keys and values part from this prompt, and of a reply at the last chunk that it completed.
"""

from __future__ import annotations

from enum import Enum

from cacheflow.types import Clock
from cacheflow.vllm.scheduler.lookup import StoreQuestion
from cacheflow.vllm.scheduler.view import RequestView
from cacheflow.vllm.step import SaveWork


class CheckpointDue(Enum):
    """When running states are to be written."""

    NOW = "now"
    AT_END = "at end"
    """When the request ends, unless it completes another chunk first."""


class RequestCheckpoints:
    """Where one request's running states are saved. Scheduler's thread alone."""

    def __init__(self, view: RequestView, *, chunk_tokens: int, every_chunks: int | None, decode_too: bool) -> None:
        """``every_chunks``: also where a step ends at a multiple of so many chunks; ``decode_too``: of replies too."""
        self._view, self._chunk_tokens = view, chunk_tokens
        self._every_chunks, self._decode_too = every_chunks, decode_too
        self._stop_at = 0
        self._stored: frozenset[int] = frozenset()

    def note_stored(self, chunks: frozenset[int]) -> None:
        """Note the chunks at whose end the store holds the states."""
        self._stored = chunks

    @property
    def prompt_end(self) -> int:
        """Where the prompt's last whole chunk ends that leaves a token to compute."""
        return (self._view.num_prompt_tokens - 1) // self._chunk_tokens * self._chunk_tokens

    def stop_at(self, *, num_stored: int, end: int, stops_itself: bool, vllm_stop: int) -> int:
        """Where vLLM is to end a step, for the states there; 0 for nowhere, and where it will stop anyway.

        Args:
            num_stored: Leading chunks the store holds of the prompt.
            end: Tokens that are in the KV cache, or will have been restored, when the prompt goes on.
            stops_itself: Whether vLLM ends a step where the prompt's last chunk ends.
            vllm_stop: Where it means to stop itself, because prompts that it has seen part there; 0 for nowhere.
        """
        last = self.prompt_end
        parts_at = min(num_stored * self._chunk_tokens, last)
        if end < parts_at < last and num_stored - 1 not in self._stored:
            chosen = parts_at
        elif end < last and not stops_itself:
            chosen = last
        else:
            # Where a restored prefix ends vLLM keeps the states only if it thinks that prompts part there.
            chosen = end if end < last else 0
        self._stop_at = max(chosen, vllm_stop)
        return self._stop_at

    def due(self, num_computed: int) -> CheckpointDue | None:
        """Whether to save the states after a step that ends with so many tokens computed."""
        chunk, rest = divmod(num_computed, self._chunk_tokens)
        if rest or not chunk or chunk - 1 in self._stored:
            return None
        if num_computed in (self.prompt_end, self._stop_at):
            return CheckpointDue.NOW
        if self._every_chunks is not None and chunk % self._every_chunks == 0:
            return CheckpointDue.NOW
        replies = self._decode_too and num_computed >= self._view.num_prompt_tokens
        return CheckpointDue.AT_END if replies else None


class StatesUnderWay:
    """Running states that workers keep of a request, and write when it ends: what the store is asked meanwhile is old.

    The next turn of a chat comes at once, and so does a request that was preempted. Scheduler's thread alone.
    """

    def __init__(self, *, patience_s: float, clock: Clock) -> None:
        """What is being written is waited for so long."""
        self._patience_s, self._clock = patience_s, clock
        self._kept: dict[str, tuple[str, str]] = {}
        self._until_s: dict[tuple[str, str], float] = {}

    def keep(self, save: SaveWork) -> None:
        """Note that workers keep the states at the end of a chunk of a request instead of those before."""
        self._kept[save.request_id] = save.namespace, save.chain_hash

    def release(self, request_id: str) -> None:
        """Note that a request ends or is preempted: workers are told in the next step."""
        name = self._kept.pop(request_id, None)
        if name is not None:
            self._until_s[name] = self._clock() + self._patience_s

    def awaited(self, question: StoreQuestion) -> bool:
        """Whether some of a prompt are on their way into the store, which did not have them when it was asked."""
        now_s, found = self._clock(), question.checkpoints or frozenset()
        self._until_s = {name: until_s for name, until_s in self._until_s.items() if now_s < until_s}
        if not self._until_s:
            return False
        missing = (each for chunk, each in enumerate(question.chain_hashes) if chunk not in found)
        return any((question.namespace, each) in self._until_s for each in missing)
