"""One request after its prefix was saved and evicted: asked, timed, and compared with stock vLLM's own answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from cacheflow.bench.vllm.client import Completion, ServerError, VllmClient

NEIGHBOUR_TOKENS = 64
"""Prompt of the neighbour: less than a block, so that nothing of it is stored or loaded."""
NEIGHBOUR_WARM_TOKENS = 8
NUDGE_TOKENS = 16
TIE_LOGPROB = 0.1
"""Beside a neighbour: vLLM's chunks lose a token to it, which moves log-probabilities by 0.03 to 0.05 in bf16."""
TOP_LOGPROBS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An answer, and what the neighbour felt while its first token was awaited (empty without one)."""

    answer: Completion
    neighbour_itls_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An answer against stock vLLM's; see ``VllmRecord`` for the fields."""

    correct: bool
    equal_tokens: int
    logprob_distance: float | None
    note: str


class Neighbour:
    """Another request that decodes all the time; a context manager around what it is to be beside."""

    def __init__(self, client: VllmClient, tokens: Sequence[int], *, max_tokens: int) -> None:
        """Take what it asks; nothing is sent before ``__enter__``."""
        self._client, self._tokens, self._max_tokens = client, list(tokens), max_tokens
        self._decoding, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="neighbour", daemon=True)
        self._answer: Completion | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        """Start decoding and wait for the first tokens.

        Raises:
            ServerError: The request failed.
        """
        self._thread.start()
        self._decoding.wait()
        if self._error is not None:
            raise ServerError(f"the neighbour failed: {self._error}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def itls_s(self, answer: Completion) -> tuple[float, ...]:
        """Its inter-token latencies from the sending of another request to that one's first token; after exit."""
        if self._answer is None:
            raise ServerError(f"the neighbour failed: {self._error}")
        return tuple(self._answer.itls_s(start_s=answer.sent_s, end_s=answer.sent_s + answer.ttft_s))

    def _run(self) -> None:
        def go_on(num_tokens: int) -> bool:
            if num_tokens >= NEIGHBOUR_WARM_TOKENS:
                self._decoding.set()
            return not self._stop.is_set()

        try:
            self._answer = self._client.complete(self._tokens, max_tokens=self._max_tokens, go_on=go_on)
        except ServerError as error:
            self._error = error
        finally:
            self._decoding.set()


def save_prefix(client: VllmClient, prefix: Sequence[int]) -> None:
    """Send a prefix, so that it is computed and saved; returns when the save has let go of its blocks.

    Raises:
        ServerError: The server failed, or a save does not end.
    """
    client.evict()
    client.complete(prefix, max_tokens=1)
    nudge(client)
    client.evict()


def nudge(client: VllmClient) -> None:
    """A tiny request: connectors start what they put off to the next step, and a thawed server is warm again."""
    client.complete([1] * NUDGE_TOKENS, max_tokens=4)


def ask(client: VllmClient, prompt: Sequence[int], *, num_tokens: int, neighbour: Neighbour | None = None) -> Asked:
    """Ask with an empty local cache and time the answer.

    Raises:
        ServerError: The server failed or would not evict.
    """
    nudge(client)
    client.evict()
    if neighbour is None:
        answer = client.complete(prompt, max_tokens=num_tokens, logprobs=TOP_LOGPROBS)
        return Asked(answer=answer, neighbour_itls_s=())
    with neighbour:
        answer = client.complete(prompt, max_tokens=num_tokens, logprobs=TOP_LOGPROBS)
    return Asked(answer=answer, neighbour_itls_s=neighbour.itls_s(answer))


def compare(answer: Completion, reference: Completion, *, beside_neighbour: bool) -> Comparison:
    """Compare tokens with stock vLLM's; equal is correct.

    Beside a neighbour vLLM itself cuts a prompt into other chunks, and bf16 may choose another token where two were
    nearly equal: then a first token whose candidates are within ``TIE_LOGPROB`` is correct too, with a note.
    """
    pairs = list(zip(answer.tokens, reference.tokens, strict=False))
    equal = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    distance = logprob_distance(answer, reference)
    if equal == len(reference.tokens) == len(answer.tokens):
        return Comparison(correct=True, equal_tokens=equal, logprob_distance=distance, note="")
    shown = "unknown" if distance is None else f"{distance:.3f}"
    note = f"tokens differ from token {equal} on; first-token log-probabilities differ by {shown}"
    tie = beside_neighbour and distance is not None and distance <= TIE_LOGPROB
    if tie:
        note += (
            f": a tie, because the neighbour shares steps and so changes chunks and batches (allowed: {TIE_LOGPROB})"
        )
    return Comparison(correct=tie, equal_tokens=equal, logprob_distance=distance, note=note)


def logprob_distance(answer: Completion, reference: Completion) -> float | None:
    """Largest difference of log-probability over the first token's candidates that both answers list."""
    both = answer.first_logprobs.keys() & reference.first_logprobs.keys()
    return max((abs(answer.first_logprobs[key] - reference.first_logprobs[key]) for key in both), default=None)
