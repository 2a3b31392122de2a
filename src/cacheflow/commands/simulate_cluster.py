"""From options and a cluster file to the cluster that is simulated, and its costs."""

from __future__ import annotations

import hashlib
import math
import tomllib
from pathlib import Path
from typing import Any

from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json, read_text
from cacheflow.plan.stages import RankLayout
from cacheflow.shapes.hardware import GPUS, find_gpu, find_model
from cacheflow.shapes.published import published_gpus, read_published
from cacheflow.shapes.roofline import Roofline
from cacheflow.sim.cluster import ClusterConfig
from cacheflow.sim.costs import ChunkCosts, measured_costs, published_costs, roofline_costs
from cacheflow.sim.router import make_router
from cacheflow.types import ModelShape

CLUSTER_DEFAULTS: dict[str, Any] = {
    "num_replicas": 8,
    "model": "Llama-3.1-8B",
    "gpu": "H100",
    "bandwidth_gbps": 10.0,
    "latency_s": 5e-4,
    "store_gb": 10_000.0,
    "store_gbps": math.inf,
    "host_gb": 0.0,
    "host_gbps": None,
    "kv_tokens": None,
    "block_tokens": 512,
    "pass_tokens": 2048,
    "max_num_seqs": 256,
    "recompute_budget_s": 0.05,
    "router": "affinity",
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 1,
    "link_per_rank": True,
}
"""Keys of a cluster file, and what holds where it is silent: eight H100 before a store of 10 TB at 10 Gbit/s each.

``None`` means: from the GPU (its host link, and what its memory leaves beside the weights).
"""
OPTIONS = {
    "num_replicas": "--replicas",
    "model": "--model",
    "gpu": "--gpu",
    "bandwidth_gbps": "--bandwidth-gbps",
    "kv_tokens": "--kv-tokens",
}
"""Options that override a key of a cluster file."""
TEXT_KEYS = ("model", "gpu", "router")
FLAG_KEYS = ("link_per_rank",)
COUNT_KEYS = {
    "num_replicas": 100_000,
    "pipeline_parallel_size": 1024,
    "tensor_parallel_size": 1024,
    "kv_tokens": 10**12,
    "block_tokens": 10**6,
    "pass_tokens": 10**6,
    "max_num_seqs": 10**6,
}
"""Whole numbers, and the greatest that memory here or the numbers we calculate with allow."""
FROM_ZERO_KEYS = ("latency_s", "store_gb", "host_gb")
LEAST = 1e-6
"""Of bandwidths in Gbit/s and seconds that must not be 0: below it nothing would come to an end."""
MEMORY_SHARE = 0.9
"""Share of a GPU's memory that an engine uses, weights included (vLLM's default)."""
PUBLISHED_MEMORY_GB = {"rtxpro6000": 96, "rtx4090": 24}
"""Memory of GPUs that have published measurements but no peaks here."""
GREATEST = 1e15
"""No number of a cluster file is as great; it is there for slips, and for what no float holds."""
DEFAULT_HOST_GBPS = 256.0
"""PCIe 4 x16, for GPUs whose host link is not known."""


def cluster_values(path: Path | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Every key of a cluster file: the option where one was given, else the file, else the default.

    Raises:
        ConfigError: The file cannot be read, or a value is wrong; names the option, or the file and its key.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    found = _read_cluster(path) if path is not None else {}
    for key, value in found.items():
        _check_value(f"--cluster {path}: {key}", key, value)
    for key, value in given.items():
        _check_value(OPTIONS[key], key, value)
    return CLUSTER_DEFAULTS | found | given


def _read_cluster(path: Path) -> dict[str, Any]:
    if path.suffix not in (".json", ".toml"):
        raise ConfigError(f"--cluster {path} must be a .json or a .toml file")
    try:
        text = read_text(path)
        values: Any = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--cluster {path} cannot be read: {error}") from error
    if not isinstance(values, dict) or values.keys() - CLUSTER_DEFAULTS.keys():
        raise ConfigError(f"--cluster {path} must be one table with the keys {', '.join(CLUSTER_DEFAULTS)}")
    return values


def _check_value(name: str, key: str, value: Any) -> None:  # noqa: ANN401 -- whatever a file holds
    """Refuse a value of the wrong type or out of range; ``name`` is what the user called it."""
    if key in TEXT_KEYS:
        if not isinstance(value, str):
            raise ConfigError(f"{name} is {value!r}, must be a name")
        if key == "router":
            _check_router(name, value)
        return
    if key in FLAG_KEYS:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, must be true or false")
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, must be a number")
    if key == "store_gbps" and value == math.inf:
        return
    if not abs(value) < GREATEST:
        raise ConfigError(f"{name} must be finite and below {GREATEST:g}")
    if (reason := _out_of_range(key, value)) is not None:
        raise ConfigError(f"{name} is {value:g}, must be {reason}")


def _out_of_range(key: str, value: float) -> str | None:
    """What a number must be, when it is not."""
    if key in COUNT_KEYS:
        if value == int(value) and 1 <= value <= COUNT_KEYS[key]:
            return None
        return f"a whole number of at least 1 and at most {COUNT_KEYS[key]:,}"
    if key in FROM_ZERO_KEYS:
        return None if value >= 0 else "0 or more"
    return None if value >= LEAST else f"above 0, and at least {LEAST:g}"


def _check_router(name: str, value: str) -> None:
    try:
        make_router(value, 1)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def cluster_config(values: dict[str, Any], shape: ModelShape, *, slo_ttft_s: float) -> ClusterConfig:
    """The cluster that these values describe, as ``cluster_values`` checked them.

    Raises:
        ConfigError: The weights do not leave room for keys and values.
    """
    token_bytes = shape.kv_bytes_per_token
    layout = RankLayout(
        pipeline_parallel_size=int(values["pipeline_parallel_size"]),
        tensor_parallel_size=int(values["tensor_parallel_size"]),
        link_per_rank=values["link_per_rank"],
    )
    kv_tokens = values["kv_tokens"] or _kv_tokens(values["gpu"], shape, layout)
    return ClusterConfig(
        num_replicas=int(values["num_replicas"]),
        kv_tokens=int(kv_tokens),
        nic_bytes_per_s=values["bandwidth_gbps"] * 1e9 / 8,
        nic_latency_s=values["latency_s"],
        store_tokens=int(values["store_gb"] * 1e9 / token_bytes),
        store_bytes_per_s=values["store_gbps"] * 1e9 / 8,
        host_tokens=int(values["host_gb"] * 1e9 / token_bytes),
        host_bytes_per_s=_host_gbps(values) * 1e9 / 8,
        block_tokens=int(values["block_tokens"]),
        pass_tokens=int(values["pass_tokens"]),
        max_num_seqs=int(values["max_num_seqs"]),
        recompute_budget_s=values["recompute_budget_s"],
        router=values["router"],
        slo_ttft_s=slo_ttft_s,
        pipeline_parallel_size=layout.pipeline_parallel_size,
        tensor_parallel_size=layout.tensor_parallel_size,
        link_per_rank=layout.link_per_rank,
    )


def _host_gbps(values: dict[str, Any]) -> float:
    if values["host_gbps"] is not None:
        return float(values["host_gbps"])
    try:
        return find_gpu(values["gpu"]).pcie_bytes_per_s * 8 / 1e9
    except ConfigError:  # one that has published measurements alone
        return DEFAULT_HOST_GBPS


def _kv_tokens(gpu_name: str, shape: ModelShape, layout: RankLayout) -> int:
    """Tokens that a replica's memory holds beside the weights; every rank has its part of both."""
    memory_gb = PUBLISHED_MEMORY_GB.get(gpu_name.lower())
    memory_bytes = memory_gb * 10**9 if memory_gb else find_gpu(gpu_name).memory_bytes
    weight_bytes = Roofline(shape=shape, gpu=GPUS["H100"]).weight_bytes
    parts = layout.kv_parts(shape) * layout.pipeline_parallel_size
    kv_bytes = (MEMORY_SHARE * memory_bytes - weight_bytes / layout.num_ranks) * parts
    if kv_bytes < shape.kv_bytes_per_token:
        owner = f"{gpu_name} has" if layout.num_ranks == 1 else f"{layout.num_ranks} {gpu_name} have"
        raise ConfigError(
            f"the weights of {shape.name} take {weight_bytes / 1e9:.0f} GB, "
            f"{owner} {memory_bytes * layout.num_ranks / 1e9:.0f} GB: "
            "choose a larger GPU, a smaller model, or more ranks (pipeline_parallel_size, tensor_parallel_size)"
        )
    return int(kv_bytes / shape.kv_bytes_per_token)


def find_costs(
    source: str, values: dict[str, Any], shape: ModelShape, *, measured: Path | None, extrapolate: bool
) -> ChunkCosts:
    """The costs that ``--costs`` names.

    Raises:
        ConfigError: Nothing of that name, or it does not fit the model or the GPU; says what there is.
    """
    chunk_tokens = int(values["block_tokens"])
    if source == "roofline":
        roofline = Roofline(shape=shape, gpu=find_gpu(values["gpu"]))
        return roofline_costs(roofline, chunk_tokens=chunk_tokens)
    if source == "published":
        if measured is None or not measured.is_dir():
            raise ConfigError(
                f"--costs published needs --measured, a folder of LLMServingSim's CSV files; got {measured}"
            )
        gpu = values["gpu"]
        if gpu.lower() not in (each.lower() for each in published_gpus(measured)):
            known = ", ".join(published_gpus(measured)) or "none"
            raise ConfigError(f"--measured {measured} has no measurements of gpu {gpu!r}; known: {known}")
        costs = read_published(measured, gpu=gpu, shape=shape, extrapolate=extrapolate)
        return published_costs(costs, shape, chunk_tokens=chunk_tokens)
    # Imported here: profiles live beside code that needs the engine's packages.
    from cacheflow.profiling.profile import load_profile

    return measured_costs(load_profile(Path(source)).costs, shape, path=source, chunk_tokens=chunk_tokens)


def inputs_fingerprint(source: str, values: dict[str, Any], shape: ModelShape, *, measured: Path | None) -> str:
    """What tells two simulations apart whose model, GPU and costs have equal names: a digest of all they say.

    Raises:
        ConfigError: A file cannot be read.
    """
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=8)
    try:
        if source == "roofline":
            digest.update(repr(find_gpu(values["gpu"])).encode())
        elif source == "published":
            for path in sorted(measured.glob("*.csv")) if measured is not None else ():
                digest.update(path.name.encode() + path.read_bytes())
        else:
            digest.update(Path(source).read_bytes())
    except OSError as error:
        raise ConfigError(f"--costs {source} cannot be read: {error}") from error
    return digest.hexdigest()


def find_shape(name: str) -> ModelShape:
    """The model by name, or from a file.

    Raises:
        ConfigError: Not known; lists those that are.
    """
    return find_model(name)
