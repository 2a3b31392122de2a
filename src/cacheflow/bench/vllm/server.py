"""Starts and stops stock vLLM servers, and keeps those that are not in turn from using the processor."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cacheflow
from cacheflow.bench.vllm.client import MODEL, ServerError, VllmClient
from cacheflow.bench.vllm.process_group import group_cpu_s, group_memory
from cacheflow.errors import ConfigError

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
TIDY_TIMEOUT_S = 5.0
"""For what is left of a server's group once its first process has ended."""
POLL_S = 0.1
LOG_TAIL_LINES = 25
ENTRY_POINTS = Path(__file__).with_name("entry_points")
"""Makes vLLM find the plugin and the load format of random weights also in a checkout that is not installed."""
USUAL = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Unless the user says otherwise: a machine without a network has no other address, and greedy requests need no package
that draws tokens, which vLLM for CUDA would import."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a vLLM server is started; equal for all policies but for the connector.

    Attributes:
        chunk_tokens: Tokens of a step (``max_num_batched_tokens``): the chunk of chunked prefill.
        kv_cache_bytes: KV cache on any device, instead; None for the above, and for vLLM's choice elsewhere.
        hybrid: Whether the model has recurrent layers: its KV blocks are as long as a chunk.
        compiled: Let vLLM compile the model; else it runs eagerly, in which restoration by layers is bit-exact.
        load_format: How vLLM gets the weights; None: from the model's folder.
        omp_bind: Cores of the ranks in vLLM's notation; empty: all cores for the only rank.
    """

    python: Path
    model_dir: Path
    dtype: str
    chunk_tokens: int
    max_tokens: int
    kv_cache_gib: int
    compiled: bool
    log_dir: Path
    kv_cache_bytes: int | None = None
    load_format: str | None = None
    hybrid: bool = False
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    omp_bind: str = ""


def server_command(options: ServerOptions, *, port: int, transfer: Mapping[str, Any] | None) -> list[str]:
    """The command line of vLLM's API server."""
    command = [
        str(options.python), "-m", "vllm.entrypoints.openai.api_server",
        "--host", "127.0.0.1", "--port", str(port),
        "--model", str(options.model_dir), "--served-model-name", MODEL,
        "--dtype", options.dtype, "--max-model-len", str(options.max_tokens),
        "--max-num-batched-tokens", str(options.chunk_tokens), "--max-num-seqs", "8",
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    for key in ("pipeline_parallel_size", "tensor_parallel_size"):
        if (size := getattr(options, key)) > 1:
            command += [f"--{key.replace('_', '-')}", str(size), "--distributed-executor-backend", "mp"]
    if not options.compiled:
        command.append("--enforce-eager")
    if options.hybrid:
        command += ["--block-size", str(options.chunk_tokens)]
    if options.load_format is not None:
        command += ["--load-format", options.load_format]
    if options.kv_cache_bytes is not None:
        command += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    if transfer is not None:
        command += ["--kv-transfer-config", json.dumps(transfer)]
    return command


def server_environment(options: ServerOptions) -> dict[str, str]:
    """The environment of a server: ours, plus what vLLM reads from it."""
    paths = [str(Path(cacheflow.__file__).parents[1]), str(ENTRY_POINTS), os.environ.get("PYTHONPATH")]
    environment = {
        **USUAL,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),  # so that vLLM finds connector, plugin and spec
        "VLLM_SERVER_DEV_MODE": "1",  # offers /reset_prefix_cache
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": options.omp_bind or threads_bind(),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if options.kv_cache_bytes is not None:
        del environment["VLLM_CPU_KVCACHE_SPACE"]  # where it is set, vLLM does not read --kv-cache-memory-bytes
    return environment


def threads_bind() -> str:
    """Cores that a CPU server computes on, in vLLM's notation: the user's choice, else all we may use.

    Never left to vLLM: by default it keeps one core free without a connector and two with one, so that servers with and
    without would compute with different numbers of threads, and their results would differ in the last bits.
    """
    return os.environ.get("VLLM_CPU_OMP_THREADS_BIND") or ",".join(map(str, sorted(os.sched_getaffinity(0))))


class VllmServer:
    """One running server; the owner closes it."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], *, port: int, log: Path) -> None:
        """Take over a started process that leads its own process group; use ``start_server``."""
        self.name, self.client, self.port = name, VllmClient(port), port
        self._process, self.log = process, log
        self._frozen = False

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: It ended, or did not answer in time; the message holds the end of its log.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self.client.healthy():
            if self._process.poll() is not None:
                raise ServerError(f"vLLM server {self.name!r} ended while starting:\n{self.log_tail()}")
            if time.monotonic() > deadline_s:
                raise ServerError(f"vLLM server {self.name!r} not ready after {timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(POLL_S)

    def log_tail(self) -> str:
        """The last lines that the server wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def cpu_s(self) -> float:
        """Processor seconds used so far by the server and its children."""
        return group_cpu_s(self._process.pid)

    def memory_bytes(self) -> list[int]:
        """Bytes of memory that each of the server's processes takes, see ``group_memory``."""
        return group_memory(self._process.pid)

    def freeze(self) -> None:
        """Stop all processes of the server, so that it cannot disturb others; idle servers only."""
        if not self._frozen:
            self._signal(signal.SIGSTOP)
            self._frozen = True

    def thaw(self) -> None:
        """Let a frozen server go on."""
        if self._frozen:
            self._signal(signal.SIGCONT)
            self._frozen = False

    def close(self) -> None:
        """End the server and its children; waits until they are gone."""
        self.thaw()
        stop_process(self._process)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it ended by itself: what asks it next says so
            os.killpg(self._process.pid, number)


def start_server(name: str, options: ServerOptions, *, transfer: Mapping[str, Any] | None) -> VllmServer:
    """Start a server; returns at once, see ``VllmServer.wait_ready``.

    Raises:
        ConfigError: The interpreter is missing.
    """
    port = free_port()
    command = server_command(options, port=port, transfer=transfer)
    process, log = start_process(name, command, server_environment(options), options.log_dir)
    return VllmServer(name, process, port=port, log=log)


def start_process(
    name: str, command: list[str], environment: Mapping[str, str], log_dir: Path
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a command as leader of its own process group; its output goes to ``log_dir/name.log``.

    Raises:
        ConfigError: The program is missing.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{name}.log"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be started: {error}") from error
    return process, log


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its group, with all of the group; waits until it is gone.

    Children may tidy up after their parent, as Python's resource tracker does with shared memory that workers left.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        deadline_s = time.monotonic() + TIDY_TIMEOUT_S
        while process.returncode is not None and time.monotonic() < deadline_s:
            os.killpg(process.pid, 0)
            time.sleep(POLL_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A local port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
