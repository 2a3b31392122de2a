"""Ray for one engine: a cluster of this machine alone, which lives as long as the engine.

vLLM's CPU platform is not for Ray, so it is given another one. It finds that by an entry point, in the engine's process
and in those that Ray starts for it; ``announce`` writes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OBJECT_STORE_BYTES = 100 << 20
"""Ray keeps what its own calls pass on; vLLM's steps and our KV go other ways."""


def announce(folder: Path) -> Path:
    """An entry point of ``register`` in a folder for ``PYTHONPATH``; returns the folder."""
    metadata = folder / "cacheflow_ray_platform-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cacheflow-ray-platform\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_cpu = support.ray_cluster:register\n")
    return folder


def register() -> str:
    """What vLLM asks a platform plugin for: the name of a class, which is not imported yet."""
    return "support.ray_platform.RayCpuPlatform"


@contextmanager
def ray_cluster(num_ranks: int) -> Iterator[None]:
    """Start Ray for so many ranks and end it whatever happens; its files go below ``RAY_TMPDIR``."""
    import ray

    try:
        ray.init(
            num_cpus=num_ranks, num_gpus=num_ranks, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES
        )
        yield
    finally:
        ray.shutdown()
