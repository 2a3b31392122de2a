"""The answer of one request among others, token by token."""

from __future__ import annotations

import time

from cacheflow.embedded.turn import Turn
from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.sampling import TokenSampler


class Answer:
    """Makes the tokens that ``sampling.generate`` would; provides ``restore.batch_request.DecodePort`` by structure.

    Attributes:
        tokens: So far.
        ttft_s: Seconds from the turn's start to the first token; 0 before.
    """

    def __init__(
        self,
        runner: LayerRunner,
        port: EngineComputePort,
        kv: KVBuffer,
        turn: Turn,
        *,
        sampler: TokenSampler,
        stop_tokens: frozenset[int],
    ) -> None:
        """Nothing is chosen before ``start``; ``port`` yields the last prompt token's logits."""
        self.tokens: list[int] = []
        self.ttft_s = 0.0
        self._runner, self._port, self._kv, self._turn = runner, port, kv, turn
        self._sampler, self._stop_tokens = sampler, stop_tokens

    def start(self) -> bool:
        """See ``DecodePort.start``."""
        assert self._port.logits is not None, "the prompt always has a suffix"
        self.tokens.append(self._sampler.choose(self._port.logits))
        self.ttft_s = time.perf_counter() - self._turn.started_s
        return self._goes_on()

    def step(self) -> bool:
        """See ``DecodePort.step``."""
        position = len(self._turn.prompt) + len(self.tokens) - 1
        self.tokens.append(self._sampler.choose(self._runner.decode_step(self.tokens[-1], position, self._kv)))
        return self._goes_on()

    def _goes_on(self) -> bool:
        return len(self.tokens) < self._turn.max_new_tokens and self.tokens[-1] not in self._stop_tokens
