"""Real servers in processes of their own: ``cacheflow serve``, and stock vLLM to compare with."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cacheflow.stores.keys import ObjectKey, ObjectKind
from cacheflow.stores.record import HEADER_BYTES, verify
from cacheflow.types import LoadOutcome

PATIENCE_S = 240.0
MODEL = "model"
SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
LABEL = re.compile(r'(\w+)="([^"]*)"')


def wait_for(condition: Callable[[], object], what: str, *, poll_s: float = 0.05) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(poll_s)


@dataclass
class HttpServer:
    """A server that was started; its processes are gone on exit."""

    process: subprocess.Popen
    port: int
    log: Path

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        """``kill -9``, to all of its processes at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def terminate(self) -> int:
        """Ask the process that was started, and it alone, to end; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def group_is_gone(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_ready(self) -> HttpServer:
        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log_text()[-4000:]}"
            with suppress(OSError):
                self.get("/health")
                return True
            return False

        wait_for(ready, "the server to start", poll_s=0.25)
        return self

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as response:
            return response.read().decode()

    def client(self):
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def reset(self) -> None:
        """Empty vLLM's own prefix cache; refused for a moment while blocks are held."""

        def done() -> bool:
            request = urllib.request.Request(f"http://127.0.0.1:{self.port}/reset_prefix_cache", b"", method="POST")
            with urllib.request.urlopen(request, timeout=20) as response:
                return json.load(response)["success"]

        wait_for(done, "the prefix cache to be reset")

    def post(self, path: str) -> dict:
        """What the server answers to an empty request."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", b"", method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def metrics(self) -> dict[tuple[str, str], float]:
        """Samples by name and by the one label that is not about the engine (empty without one)."""
        found = {}
        for line in self.get("/metrics").splitlines():
            if (match := SAMPLE.match(line)) and not match["name"].endswith("_created"):
                labels = {k: v for k, v in LABEL.findall(match["labels"] or "") if k not in ("engine", "model_name")}
                found[match["name"], "".join(labels.values())] = float(match["value"])
        return found


def start_server(command: list[str], *, log: Path, core: int) -> HttpServer:
    """Start a server on one core; returns at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": str(cores[core % len(cores)]), "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }  # fmt: skip
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # servers run as users run them
    command = [
        *command, "--port", str(port), "--host", "127.0.0.1", "--served-model-name", MODEL, "--enforce-eager",
        "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "4", "--max-num-batched-tokens", "128",
        "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, cwd=log.parent,
        )  # fmt: skip
    return HttpServer(process, port, log)


def cacheflow_server(
    model: str, folder: Path, *options: str, name: str = "cacheflow", core: int = 0, more: Sequence[str] = ()
) -> HttpServer:
    """``cacheflow serve`` with a file store in ``folder``; ``more`` are options of vLLM."""
    command = [
        sys.executable, "-m", "cacheflow.cli", "serve", model, "--store-path", str(folder / "store"),
        "--profile-dir", str(folder / "profiles"), "--calibrate-budget-s", "1", "--chunk-tokens", "128",
        "--lookup-timeout-s", "5", *options, "--", *more,
    ]  # fmt: skip
    return start_server(command, log=folder / f"{name}.log", core=core)


def stock_server(model: str, folder: Path, *, core: int = 1) -> HttpServer:
    """vLLM without CacheFlow."""
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return start_server(command, log=folder / "stock.log", core=core)


def objects(store: Path) -> list[Path]:
    """Every object's file."""
    return sorted(path for path in (store / "objects").glob("*/*/*") if path.is_file())


def torn(store: Path) -> list[str]:
    """Objects whose checksum or description is wrong."""
    bad = []
    for path in objects(store):
        namespace, chain_hash, kind, layers, _ = path.name.split("_")
        lo, hi = map(int, layers.split("-"))
        key = ObjectKey(namespace=namespace, chain_hash=chain_hash, kind=ObjectKind(kind), layer_lo=lo, layer_hi=hi)
        raw = memoryview(path.read_bytes())
        if verify(raw[:HEADER_BYTES], raw[HEADER_BYTES:], key) is not LoadOutcome.OK:
            bad.append(path.name)
    return bad


def write_word_tokenizer(folder: Path, *, vocab_size: int) -> None:
    """A tokenizer of made-up words, because vLLM's server wants one; prompts are sent as ids."""
    model = {"type": "WordLevel", "vocab": {f"w{index}": index for index in range(vocab_size)}, "unk_token": "w0"}
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
