"""From options and a cluster file to the cluster that is simulated, and its costs."""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from cacheflow.bench.options import Flags, flag_of, knobs, option
from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json, read_text
from cacheflow.model_shape import ModelShape
from cacheflow.plan.stages import RankLayout
from cacheflow.shapes.hardware import GPUS, MODEL_FILES, MODEL_SHAPES, find_gpu
from cacheflow.shapes.published import published_gpus, read_published
from cacheflow.shapes.roofline import Roofline
from cacheflow.sim.cluster import ClusterConfig
from cacheflow.sim.costs import ChunkCosts, measured_costs, published_costs, roofline_costs
from cacheflow.sim.router import make_router

LEAST = 1e-6
"""Of bandwidths in Gbit/s and seconds that must not be 0: below it nothing would come to an end."""
GREATEST = 1e15
"""No number of a cluster file is as great; it is there for slips, and for what no float holds."""
MEMORY_SHARE = 0.9
"""Share of a GPU's memory that an engine uses, weights included (vLLM's default)."""
PUBLISHED_MEMORY_GB = {"rtxpro6000": 96, "rtx4090": 24}
"""Memory of GPUs that have published measurements but no peaks here."""
DEFAULT_HOST_GBPS = 256.0
"""PCIe 4 x16, for GPUs whose host link is not known."""
_RANKS: dict[str, Any] = {"flag": "", "at_least": 1, "at_most": 1024}
_TOKENS: dict[str, Any] = {"flag": "", "at_least": 1, "at_most": 10**6}


@dataclass(frozen=True, kw_only=True)
class ClusterFile(Flags):
    """Keys of a cluster file, and what holds where it is silent; some have a flag that overrides it.

    The default is eight H100, each with a link of 10 Gbit/s to a store of 10 TB. Greatest values are what memory here,
    or the numbers we calculate with, allow.
    """

    num_replicas: int = option(
        8, "engines, a GPU and a link each", flag="--replicas", metavar="N", at_least=1, at_most=100_000
    )
    model: str = option("Llama-3.1-8B", f"{', '.join(MODEL_SHAPES)}, or {MODEL_FILES}", metavar="SHAPE")
    gpu: str = option("H100", f"{', '.join(GPUS)}, or a .json file of peaks", metavar="NAME")
    bandwidth_gbps: float = option(10.0, "of each link to the store", metavar="G", at_least=LEAST)
    latency_s: float = option(5e-4, "of each link to the store", flag="", at_least=0)
    store_gb: float = option(10_000.0, "room of the store", flag="", at_least=0)
    store_gbps: float = option(math.inf, "the store's own bandwidth, for all links", flag="", at_least=LEAST)
    host_gb: float = option(0.0, "room of each replica's host tier", flag="", at_least=0)
    host_gbps: float | None = option(None, "of the host tier; None: the GPU's host link", flag="", at_least=LEAST)
    kv_tokens: int | None = option(
        None, "tokens in GPU memory (default: what it leaves)", metavar="N", at_least=1, at_most=10**12
    )
    block_tokens: int = option(512, "of a prefix block, and of a chunk", **_TOKENS)
    pass_tokens: int = option(2048, "most of one pass of prefill", **_TOKENS)
    max_num_seqs: int = option(256, "requests a replica runs at once", **_TOKENS)
    recompute_budget_s: float = option(0.05, "work after which decoding gets a token", flag="", at_least=LEAST)
    router: str = option("affinity", "who gets a request", flag="")
    pipeline_parallel_size: int = option(1, "stages of a replica", **_RANKS)
    tensor_parallel_size: int = option(1, "ranks of a stage", **_RANKS)
    link_per_rank: bool = option(True, "each GPU has a link of its own", flag="")

    @property
    def layout(self) -> RankLayout:
        """How a replica's GPUs share the model."""
        return RankLayout(
            pipeline_parallel_size=self.pipeline_parallel_size,
            tensor_parallel_size=self.tensor_parallel_size,
            link_per_rank=self.link_per_rank,
        )


def cluster_values(path: Path | None, given: Mapping[str, Any]) -> ClusterFile:
    """Every key of a cluster file: the option where one was given, else the file, else the default.

    Raises:
        ConfigError: The file cannot be read, or a value is wrong; names the option, or the file and its key.
    """
    known = knobs(ClusterFile)
    found = _read_cluster(path) if path is not None else {}
    checked = {key: _checked(f"--cluster {path}: {key}", key, value) for key, value in found.items()}
    checked |= {key: _checked(flag_of(key, known[key]), key, value) for key, value in given.items()}
    return ClusterFile(**checked)


def _read_cluster(path: Path) -> dict[str, Any]:
    if path.suffix not in (".json", ".toml"):
        raise ConfigError(f"--cluster {path} must be a .json or a .toml file")
    try:
        text = read_text(path)
        values: Any = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--cluster {path} cannot be read: {error}") from error
    known = knobs(ClusterFile)
    if not isinstance(values, dict) or values.keys() - known.keys():
        raise ConfigError(f"--cluster {path} must be one table with the keys {', '.join(known)}")
    return values


def _checked(name: str, key: str, value: Any) -> Any:  # noqa: ANN401 -- whatever a file holds
    """A value of the right type and within its limits; ``name`` is what the user called it."""
    hint = get_type_hints(ClusterFile)[key]
    if hint is str:
        if not isinstance(value, str):
            raise ConfigError(f"{name} is {value!r}, must be a name")
        if key == "router":
            _check_router(name, value)
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, must be true or false")
        return value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, must be a number")
    if not abs(value) < GREATEST and not (key == "store_gbps" and value == math.inf):
        raise ConfigError(f"{name} must be finite and below {GREATEST:g}")
    knob = knobs(ClusterFile)[key]
    whole = knob.at_most is not None
    if not knob.allows(value) or (whole and value != int(value)):
        if whole:
            allowed = f"a whole number of at least {knob.at_least} and at most {knob.at_most:,}"
        else:
            allowed = f"above 0, and at least {LEAST:g}" if knob.at_least else "0 or more"
        raise ConfigError(f"{name} is {value:g}, must be {allowed}")
    return int(value) if whole else value


def _check_router(name: str, value: str) -> None:
    try:
        make_router(value, 1)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def cluster_config(values: ClusterFile, shape: ModelShape, *, slo_ttft_s: float) -> ClusterConfig:
    """The cluster that these values describe.

    Raises:
        ConfigError: The layout does not fit the model, or the weights do not leave room for keys and values.
    """
    values.layout.kv_parts(shape)
    token_bytes = shape.kv_bytes_per_token
    kv_tokens = values.kv_tokens or _kv_tokens(values.gpu, shape, values.layout)
    same = {each.name for each in fields(ClusterConfig)} & knobs(ClusterFile).keys() - {"kv_tokens"}
    return ClusterConfig(
        **{name: getattr(values, name) for name in same},
        kv_tokens=kv_tokens,
        nic_bytes_per_s=values.bandwidth_gbps * 1e9 / 8,
        nic_latency_s=values.latency_s,
        store_tokens=int(values.store_gb * 1e9 / token_bytes),
        store_bytes_per_s=values.store_gbps * 1e9 / 8,
        host_tokens=int(values.host_gb * 1e9 / token_bytes),
        host_bytes_per_s=_host_gbps(values) * 1e9 / 8,
        slo_ttft_s=slo_ttft_s,
    )


def _host_gbps(values: ClusterFile) -> float:
    if values.host_gbps is not None:
        return values.host_gbps
    try:
        return find_gpu(values.gpu).pcie_bytes_per_s * 8 / 1e9
    except ConfigError:  # one that has published measurements alone
        return DEFAULT_HOST_GBPS


def _kv_tokens(gpu_name: str, shape: ModelShape, layout: RankLayout) -> int:
    """Tokens that a replica's memory holds beside the weights; every rank has its part of both."""
    memory_gb = PUBLISHED_MEMORY_GB.get(gpu_name.lower())
    memory_bytes = memory_gb * 10**9 if memory_gb else find_gpu(gpu_name).memory_bytes
    parts = layout.kv_parts(shape) * layout.pipeline_parallel_size
    kv_bytes = (MEMORY_SHARE * memory_bytes - shape.weight_bytes / layout.num_ranks) * parts
    if kv_bytes < shape.kv_bytes_per_token:
        owner = f"{gpu_name} has" if layout.num_ranks == 1 else f"{layout.num_ranks} {gpu_name} have"
        raise ConfigError(
            f"the weights of {shape.name} take {shape.weight_bytes / 1e9:.0f} GB, "
            f"{owner} {memory_bytes * layout.num_ranks / 1e9:.0f} GB: "
            "choose a larger GPU, a smaller model, or more ranks (pipeline_parallel_size, tensor_parallel_size)"
        )
    return int(kv_bytes / shape.kv_bytes_per_token)


def find_costs(
    source: str, values: ClusterFile, shape: ModelShape, *, measured: Path | None, extrapolate: bool
) -> ChunkCosts:
    """The costs that ``--costs`` names.

    Raises:
        ConfigError: Nothing of that name, or it does not fit the model or the GPU; says what there is.
    """
    chunk_tokens = values.block_tokens
    if source == "roofline":
        roofline = Roofline(shape=shape, gpu=find_gpu(values.gpu))
        return roofline_costs(roofline, chunk_tokens=chunk_tokens)
    if source == "published":
        if measured is None or not measured.is_dir():
            raise ConfigError(
                f"--costs published needs --measured, a folder of LLMServingSim's CSV files; got {measured}"
            )
        gpu = values.gpu
        if gpu.lower() not in (each.lower() for each in published_gpus(measured)):
            known = ", ".join(published_gpus(measured)) or "none"
            raise ConfigError(f"--measured {measured} has no measurements of gpu {gpu!r}; known: {known}")
        costs = read_published(measured, gpu=gpu, shape=shape, extrapolate=extrapolate)
        return published_costs(costs, shape, chunk_tokens=chunk_tokens)
    # Imported here: profiles live beside code that needs the engine's packages.
    from cacheflow.profiling.profile import load_profile

    return measured_costs(load_profile(Path(source)).costs, shape, path=source, chunk_tokens=chunk_tokens)


def inputs_fingerprint(source: str, values: ClusterFile, shape: ModelShape, *, measured: Path | None) -> str:
    """What tells two simulations apart whose model, GPU and costs have equal names: a digest of all they say.

    Raises:
        ConfigError: A file cannot be read.
    """
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=8)
    try:
        if source == "roofline":
            digest.update(repr(find_gpu(values.gpu)).encode())
        elif source == "published":
            for path in sorted(measured.glob("*.csv")) if measured is not None else ():
                digest.update(path.name.encode() + path.read_bytes())
        else:
            digest.update(Path(source).read_bytes())
    except OSError as error:
        raise ConfigError(f"--costs {source} cannot be read: {error}") from error
    return digest.hexdigest()
