"""LMCache's server beside vLLM: its own environment, made on demand, and a paced link in front of it.

LMCache wants older numpy, protobuf and opentelemetry than others, and its connector is imported by vLLM. So it gets a
virtual environment of its own that sees vLLM's packages after its own ones, and this policy's vLLM runs in it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

from cacheflow.bench.vllm.client import ServerError
from cacheflow.bench.vllm.policies import CPU_BYTES, RivalMissingError
from cacheflow.bench.vllm.process_group import group_cpu_s
from cacheflow.bench.vllm.rivals.relay import Relay
from cacheflow.bench.vllm.server import free_port, start_process, stop_process
from cacheflow.cache_root import cache_root

LMCACHE_VERSION = "0.5.6"
INSTALL_TIMEOUT_S = 600.0
START_TIMEOUT_S = 90.0
_CHECK = "import lmcache, importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
_SERVE = "from lmcache.cli.main import main; main()"


class LMCacheServer:
    """LMCache's server with a relay in front; see ``SideServer``. The owner closes it."""

    def __init__(self, python: Path, *, bytes_per_s: float, log_dir: Path) -> None:
        """Start both and wait until the server listens.

        Raises:
            ServerError: The server ended or did not listen in time; the message names its log.
        """
        port = free_port()
        environment = {**os.environ, "LMCACHE_DISABLE_BANNER": "1"}
        self._process, self._log = start_process("lmcache-server", _command(python, port), environment, log_dir)
        try:
            self._wait_ready(port)
            self.relay = Relay(port, bytes_per_s=bytes_per_s)
        except BaseException:
            stop_process(self._process)
            raise

    @property
    def port(self) -> int:
        """The relay's port."""
        return self.relay.port

    @property
    def loaded_bytes(self) -> int:
        """Bytes that came through the relay so far."""
        return self.relay.answered_bytes

    def cpu_s(self) -> float:
        """Processor seconds the server used so far; the relay is ours."""
        return group_cpu_s(self._process.pid)

    def close(self) -> None:
        """End relay and server."""
        self.relay.close()
        stop_process(self._process)

    def _wait_ready(self, port: int) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline_s:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise ServerError(f"LMCache's server did not come up; see {self._log}")


def lmcache_python(given: Path | None, vllm_python: Path) -> Path:
    """An interpreter that imports LMCache and vLLM; made in the cache folder if none is given.

    Raises:
        RivalMissingError: The given one lacks a package, or the installation failed.
    """
    python = given or cache_root() / f"lmcache-{LMCACHE_VERSION}" / "bin" / "python"
    if given is None and not python.exists():
        _install(python, vllm_python)
    _run([str(python), "-c", _CHECK], f"{python} does not import both lmcache and vllm")
    return python


def _command(python: Path, port: int) -> list[str]:
    return [
        str(python), "-c", _SERVE, "server", "--host", "127.0.0.1", "--port", str(port),
        "--http-port", str(free_port()), "--prometheus-port", str(free_port()),
        "--l1-size-gb", str(max(1, CPU_BYTES // 10**9)), "--eviction-policy", "LRU",
        # Without a name for shared memory the bytes come over TCP, where they can be paced. Without "auto" vLLM hangs.
        "--supported-transfer-mode", "auto",
    ]  # fmt: skip


def _install(python: Path, vllm_python: Path) -> None:
    folder = python.parents[1]
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    _run([str(vllm_python), "-m", "venv", str(folder)], "a virtual environment for LMCache cannot be made")
    theirs = _run([str(vllm_python), "-c", where], "vLLM's packages cannot be found").strip()
    ours = Path(_run([str(python), "-c", where], "the new environment does not run").strip())
    (ours / "zz_vllm.pth").write_text(theirs + "\n", encoding="utf-8")  # after our own: LMCache's older ones come first
    try:
        _run([str(python), "-m", "pip", "install", "-q", f"lmcache=={LMCACHE_VERSION}"], "pip cannot install LMCache")
    except RivalMissingError:
        (folder / "bin" / "python").unlink()  # tried anew next time
        raise


def _run(command: list[str], failed: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RivalMissingError(f"{failed}: {error}") from error
    if done.returncode:
        raise RivalMissingError(f"{failed}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout
