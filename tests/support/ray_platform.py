"""vLLM's CPU platform, which names no resource of Ray's: here a rank takes what Ray calls a GPU."""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    """Named by ``support.ray_cluster.register``, which vLLM finds by an entry point in every process."""

    ray_device_key = "GPU"
