"""A small HTTP server that streams what vLLM streams, so that clients are tested without an engine."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from cacheflow.bench.vllm.client import VllmClient


class FakeVllm(BaseHTTPRequestHandler):
    """Answers every prompt with its own ids counted on; refuses the first eviction after each completion.

    Of requests for which the connector is asked to decide it counts a decision of the guard.
    """

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[str]] = []
    held: ClassVar[bool] = False
    cached_share: ClassVar[float] = 1.0
    modes: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        metrics = '# HELP x\nvllm:x_total{engine="0"} 3.0\n'
        if guarded := self.modes.count("auto"):
            metrics += f'vllm:cacheflow_guard_decisions_total{{choice="hybrid"}} {guarded}\n'
        self._answer(metrics.encode() if self.path == "/metrics" else b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/reset_prefix_cache":
            self.seen.append("evict")
            held, FakeVllm.held = FakeVllm.held, False  # before the answer: the client's next request may be held again
            self._answer(json.dumps({"success": not held}).encode())
            return
        asked = json.loads(body)
        self.seen.append(f"complete {len(asked['prompt'])}")
        if asked["prompt"][0] == 13:
            self.send_error(400, "unlucky")
            return
        FakeVllm.held = True
        params = asked.get("kv_transfer_params") or {}
        self.modes.append(params.get("cacheflow"))
        if not asked["stream"]:
            explained = {"cacheflow": [{"choice": "hybrid", "reason": "both at once is faster"}]}
            self._answer(json.dumps({"kv_transfer_params": explained if params.get("explain") else None}).encode())
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in _stream(asked):
                self._chunk(b"data: " + event + b"\n\n")
            self._chunk(b"")
        except OSError:
            pass  # the client has heard enough

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


def _stream(asked: dict[str, Any]) -> Iterator[bytes]:
    for index in range(asked["max_tokens"]):
        choice: dict[str, Any] = {"token_ids": [asked["prompt"][-1] + index + 1]}
        if index == 0 and asked.get("logprobs"):
            choice["logprobs"] = {"top_logprobs": [{"a": -0.5, "b": -1.0}]}
        yield json.dumps({"choices": [choice]}).encode()
    usage = {"prompt_tokens_details": {"cached_tokens": int(FakeVllm.cached_share * (len(asked["prompt"]) - 1))}}
    yield json.dumps({"choices": [], "usage": usage}).encode()
    yield b"[DONE]"


@contextmanager
def fake_vllm() -> Iterator[VllmClient]:
    """A client of a fresh fake."""
    FakeVllm.seen.clear()
    FakeVllm.modes.clear()
    FakeVllm.held = False
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeVllm)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield VllmClient(server.server_address[1], timeout_s=30.0)
    server.shutdown()
    thread.join()
    server.server_close()
