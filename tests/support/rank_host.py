"""A process that serves engines of several ranks, one after the other, as scripts tell it; see ``rank_engine``.

To import vLLM takes longer than most of these engines live: it is imported once, and by each rank of its own.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from support.rank_engine import Script
from support.ray_cluster import announce

PATIENCE_S = 150.0
END_PATIENCE_S = 60.0
TESTS = Path(__file__).parents[1]


class RankHost:
    """Begins with the first script, and anew after one that failed or killed a rank; Ray's have one of their own."""

    def __init__(self, folder: Path, *, on_ray: bool = False) -> None:
        """Write the log into ``folder``."""
        self._folder, self._log, self._on_ray = folder, folder / "log", on_ray
        self._process: subprocess.Popen | None = None
        self._of_ray: RankHost | None = None
        self._stack = ExitStack()

    def __enter__(self) -> RankHost:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, script: Script, folder: Path, *, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Start an engine, carry the script out, end the engine; what each step with a label returned."""
        folder.mkdir(parents=True, exist_ok=True)
        if script.executor == "ray" and not self._on_ray:
            self._of_ray = self._of_ray or RankHost(folder, on_ray=True)
            return self._of_ray.run(script, folder, patience_s=patience_s)
        (folder / "script").write_bytes(pickle.dumps(script))
        answers = folder / "answers"
        answers.unlink(missing_ok=True)
        process = self._process or self._start()
        said_before = self._log.stat().st_size
        try:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            ends_s = time.monotonic() + patience_s
            while not answers.exists():
                assert process.poll() is None, (
                    f"the process ended with {process.returncode}:\n{self._said(said_before)}"
                )
                assert time.monotonic() < ends_s, f"not done in {patience_s:.0f} s:\n{self._said(said_before)}"
                time.sleep(0.02)
        except BaseException:
            self._kill()
            raise
        if script.kills:
            self.close()
        return pickle.loads(answers.read_bytes())

    def close(self) -> None:
        """End the process, and whatever is left of its engines; Ray's too."""
        if self._of_ray is not None:
            self._of_ray.close()
        if self._process is not None:
            self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_PATIENCE_S)
            self._kill()

    def _start(self) -> subprocess.Popen:
        places = [TESTS, TESTS.parent / "src"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        if self._on_ray:
            places.append(announce(self._folder / "platform"))
            # Not below the test's folder: its sockets have long names, of which the system allows 107 bytes.
            ray_folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            environment |= {"RAY_TMPDIR": self._stack.enter_context(ray_folder), "RAY_USAGE_STATS_ENABLED": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])
        log = self._stack.enter_context(self._log.open("a"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.rank_engine"], env=environment, stdin=subprocess.PIPE, stdout=log,
            stderr=log, start_new_session=True, text=True,
        )  # fmt: skip
        return self._process

    def _said(self, since: int) -> str:
        """The end of what was logged since then."""
        return self._log.read_bytes()[since:].decode(errors="replace")[-6000:]

    def _kill(self) -> None:
        process, self._process = self._process, None
        with suppress(ProcessLookupError):  # nothing is left of a process that ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        self._stack.close()
