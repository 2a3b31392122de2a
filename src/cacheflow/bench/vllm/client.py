"""A client of vLLM's OpenAI-compatible server that times streamed tokens; standard library only.

All times are of the client's clock: from just before the request is sent to the arrival of the event that carries
the token, as a user would see it.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cacheflow.errors import CacheFlowError, ConfigError

MODEL = "bench"
"""Name under which every server serves its model."""
RETRY_S = 0.05
JSON_BODY = {"Content-Type": "application/json"}

GoOn = Callable[[int], bool]


class ServerError(CacheFlowError, RuntimeError):
    """A vLLM server answered with an error, or not at all; the message holds what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One streamed completion.

    Attributes:
        arrivals_s: When each token arrived, counted from sending the request; tokens of one event share a time.
        sent_s: When the request was sent, on the client's clock.
        first_logprobs: The server's most likely first tokens with their log-probabilities; empty if not asked for.
        cached_tokens: Prompt tokens that the server did not compute, local and external hits together.
    """

    tokens: tuple[int, ...]
    arrivals_s: tuple[float, ...]
    sent_s: float
    first_logprobs: dict[str, float]
    cached_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.arrivals_s[0]

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return len(self.tokens)

    def itls_s(self, *, start_s: float = float("-inf"), end_s: float = float("inf")) -> list[float]:
        """Inter-token latencies that overlap ``[start_s, end_s]`` of the client's clock."""
        times = [self.sent_s + each for each in self.arrivals_s]
        return [later - earlier for earlier, later in pairwise(times) if later > start_s and earlier < end_s]


class VllmClient:
    """Talks to one local server; a connection per call, so threads may share it."""

    def __init__(self, port: int, *, timeout_s: float = 300.0, params: Mapping[str, Any] | None = None) -> None:
        """Take the port and what every request asks of the connector; nothing is sent yet."""
        self._port, self._timeout_s, self._params = port, timeout_s, dict(params or {})

    def asking(self, params: Mapping[str, Any]) -> VllmClient:
        """A client of the same server whose requests ask ``params`` of its connector."""
        return VllmClient(self._port, timeout_s=self._timeout_s, params=params)

    def complete(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        logprobs: int = 0,
        go_on: GoOn = lambda _: True,
        params: Mapping[str, Any] | None = None,
    ) -> Completion:
        """Greedy completion of token ids; end-of-sequence is ignored, so that ``max_tokens`` come.

        Args:
            prompt: Token ids.
            max_tokens: Tokens to generate.
            logprobs: How many alternatives of the first token to return.
            params: ``kv_transfer_params``, beside those of the client.
            go_on: Asked after each event with the number of tokens so far; False ends the request there.

        Raises:
            ServerError: The server refused the request or closed the stream.
        """
        asked = {**self._params, **(params or {})}
        body = _request_body(prompt, max_tokens=max_tokens, logprobs=logprobs, params=asked)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout_s)
        try:
            connection.connect()
            sent_s = time.perf_counter()
            connection.request("POST", "/v1/completions", body=body, headers=JSON_BODY)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise ServerError(f"vLLM answered {response.status}: {response.read(500).decode(errors='replace')}")
            return _read_answer(response, sent_s=sent_s, go_on=go_on)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"vLLM's server on port {self._port} failed: {error}") from error
        finally:
            connection.close()

    def explain(self, prompt: Sequence[int]) -> dict[str, Any]:
        """What CacheFlow says of a request of one more token; of streamed ones vLLM does not pass it on.

        Raises:
            ServerError: The server failed, or refused the request.
        """
        asked = {**self._params, "explain": True}
        body = _request_body(prompt, max_tokens=1, logprobs=0, params=asked, streamed=False)
        text = self._call("POST", "/v1/completions", timeout_s=self._timeout_s, body=body)
        said: dict[str, Any] = json.loads(text).get("kv_transfer_params") or {}
        return said

    def evict(self, *, within_s: float = 20.0) -> None:
        """Drop every block from the local prefix cache; stored prefixes stay.

        vLLM refuses while blocks are held, as by a save under way, so this is tried until ``within_s`` are over.

        Raises:
            ServerError: The cache could not be dropped.
        """
        deadline_s = time.perf_counter() + within_s
        while not self._post("/reset_prefix_cache").get("success"):
            if time.perf_counter() > deadline_s:
                raise ServerError(f"vLLM still held cache blocks after {within_s:.0f} s; a save may be stuck")
            time.sleep(RETRY_S)  # vLLM offers no event to wait for

    def healthy(self) -> bool:
        """Whether the server answers."""
        try:
            self._get("/health")
        except ServerError:
            return False
        return True

    def metrics(self) -> dict[str, float]:
        """Prometheus samples by name with labels, counters and gauges alike."""
        found = {}
        for line in self._get("/metrics").splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found

    def _get(self, path: str) -> str:
        return self._call("GET", path, timeout_s=10.0)

    def _post(self, path: str) -> dict[str, Any]:
        text = self._call("POST", path, timeout_s=60.0)
        values: dict[str, Any] = json.loads(text) if text else {}
        return values

    def _call(self, verb: str, path: str, *, timeout_s: float, body: str | None = None) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout_s)
        try:
            connection.request(verb, path, body=body, headers=JSON_BODY if body else {})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
            if response.status != http.client.OK:
                raise ServerError(f"vLLM answered {verb} {path} with {response.status}: {text[:300]}")
            return text
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"vLLM's server on port {self._port} failed at {verb} {path}: {error}") from error
        finally:
            connection.close()


def _request_body(
    prompt: Sequence[int], *, max_tokens: int, logprobs: int, params: Mapping[str, Any], streamed: bool = True
) -> str:
    if not prompt or max_tokens < 1:
        raise ConfigError(f"a request needs a prompt and max_tokens of 1 or more, got {len(prompt)} and {max_tokens}")
    return json.dumps(
        {
            "model": MODEL,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": streamed,
            **({"stream_options": {"include_usage": True}} if streamed else {}),
            "return_token_ids": True,
            **({"logprobs": logprobs} if logprobs else {}),
            **({"kv_transfer_params": dict(params)} if params else {}),
        }
    )


def _read_answer(response: http.client.HTTPResponse, *, sent_s: float, go_on: GoOn) -> Completion:
    tokens: list[int] = []
    arrivals_s: list[float] = []
    first: dict[str, float] = {}
    cached = 0
    for arrived_s, event in _events(response):
        now_s = arrived_s - sent_s
        if "error" in event:
            raise ServerError(f"vLLM ended a stream: {event['error']}")
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids") or ()
            if ids and not tokens:
                first = _top_logprobs(choice)
            tokens.extend(ids)
            arrivals_s.extend([now_s] * len(ids))
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or cached
        if not go_on(len(tokens)):
            break
    if not tokens:
        raise ServerError("vLLM ended a stream without a token")
    return Completion(
        tokens=tuple(tokens),
        arrivals_s=tuple(arrivals_s),
        sent_s=sent_s,
        first_logprobs=first,
        cached_tokens=cached,
    )


def _top_logprobs(choice: dict[str, Any]) -> dict[str, float]:
    top = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
    return {token: float(value) for token, value in (top[0] or {}).items()}


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[float, dict[str, Any]]]:
    """Server-sent events as JSON objects with their time of arrival, up to ``[DONE]``."""
    for raw in response:
        arrived_s = time.perf_counter()
        line = raw.strip()
        if line == b"data: [DONE]":
            return
        if line.startswith(b"data: "):
            yield arrived_s, json.loads(line[len(b"data: ") :])
