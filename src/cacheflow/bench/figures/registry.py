"""The figures as a table: what varies, over which values, which policies, which axes, and what the paper says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from cacheflow.bench.contender import Contender
from cacheflow.bench.figures.place import Place
from cacheflow.bench.figures.points import Alone, Arriving, Crossover, Points, Sessions, Together, Varied
from cacheflow.bench.figures.runs import CROWD, IN_ORDER, OURS
from cacheflow.bench.figures.stages import Pipelines
from cacheflow.bench.records.figure import FigureRecord
from cacheflow.errors import ConfigError


class ChartKind(Enum):
    """How records become marks."""

    LINES = "lines"
    """``y`` over ``x``, a line a series."""
    BARS = "bars"
    """``y``, a group of bars each ``x``, a bar a series."""
    DISTRIBUTION = "distribution"
    """Cumulative distribution of the time to first token, a curve a series."""
    MAP = "map"
    """Ours over the best rival, a cell each ``x`` and ``y``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One row of panels.

    Attributes:
        bound: Field drawn beside ``y`` as the bound; empty for none.
        panel: Fields that tell panels apart.
    """

    kind: ChartKind
    x: str = ""
    y: str = "ttft_s"
    bound: str = "bound_ttft_s"
    panel: tuple[str, ...] = ("model", "gpu")
    x_label: str = ""
    y_label: str = "time to first token [s]"
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        number: As in the paper; ours from 11 on.
        published: What the paper says of it; empty where it says nothing.
    """

    number: int
    title: str
    published: str = ""
    charts: tuple[Chart, ...]
    points: tuple[Points, ...]

    @property
    def suite(self) -> str:
        """Name of its records."""
        return f"figure-{self.number}"

    def records(self, fast: bool) -> Iterator[FigureRecord]:
        """Simulate its points, all or a reduced set."""
        for each in self.points:
            yield from each.records(self.suite, fast)


LINES, BARS, DISTRIBUTION, MAP = ChartKind.LINES, ChartKind.BARS, ChartKind.DISTRIBUTION, ChartKind.MAP
CROSSOVER_LENGTHS = (1024, 2048, 4096, 6144, 8192, 12_288, 16_384, 24_576, 32_768, 49_152, 65_536, 98_304)
H100, MIXTURE = Place(), Place(model="Qwen3-30B-A3B")
LONG_CHUNKS = Place(model="Qwen3-30B-A3B", chunk_tokens=2048)
"""Experts need long chunks to keep the GPU busy."""
HYBRIDS = (
    *(Place(model="Qwen3.5-9B", gbps=gbps, chunk_tokens=1024) for gbps in (10.0, 40.0, 80.0)),
    Place(model="Qwen3.5-9B", gpu="A100", chunk_tokens=1024),
    *(Place(model=model, chunk_tokens=1024) for model in ("Qwen3.6-27B", "Qwen3.6-35B-A3B", "Qwen3-Next-80B-A3B")),
)
DENSE = (H100, Place(model="Llama-3.1-8B"))
GPUS = ("L40S", "A100", "H100")
LINKS = tuple(Varied(*[(Place(gbps=gbps),)] * 2) for gbps in (10.0, 40.0, 80.0))
RATIOS_11: tuple[float | None, ...] = tuple(2.0**power for power in range(-4, 5))
RATIOS_14: tuple[float | None, ...] = tuple(2.0**power for power in range(-3, 5))
ORDERS = (
    *(Contender(name=name, restore=OURS, batch=name)
      for name in ("fcfs", "longest_first", "mean_ttft", "p99_ttft", "makespan", "slo")),
    Contender(name="dp", restore="cacheflow_v2", batch="dp"),
)  # fmt: skip
"""Each restores as ``cacheflow`` does, but for ``dp``, which plans itself."""
WITH_SLO = (*CROWD, Contender(name="cacheflow, slo", restore=OURS, batch="slo"))

FIGURES: Mapping[int, Figure] = MappingProxyType({figure.number: figure for figure in (
    Figure(
        number=3,
        title="Crossover of layer-wise and token-wise restoration",
        published="below a crossover length layer-wise is faster, above it token-wise (v2: 36K tokens, 22 % at 11K)",
        points=(Crossover(
            places=Varied((*DENSE, MIXTURE, LONG_CHUNKS), (H100,)),
            lengths=Varied(CROSSOVER_LENGTHS, CROSSOVER_LENGTHS[:5:2]),
        ),),
        charts=(Chart(
            kind=LINES, panel=("model", "workload"), x="num_tokens", y="restore_over_bound", bound="", log_x=True,
            x_label="tokens of the prefix", y_label="restoration time / lower bound",
        ),),
    ),
    Figure(
        number=4,
        title="Time to first token, three models by three workloads (H100, 10 Gbit/s, load 0.6)",
        published="10 to 62 % lower than the best existing (1.1 to 1.7x), most in the tail",
        points=(Sessions(
            places=Varied((*DENSE, LONG_CHUNKS), (H100,)),
            workloads=Varied(
                (("lmsys-chat", 120), ("wildchat", 80), ("swe-bench", 8)),
                (("lmsys-chat", 10), ("wildchat", 6), ("swe-bench", 1)),
            ),
            contenders=(*CROWD, IN_ORDER),
        ),),
        charts=(Chart(
            kind=DISTRIBUTION, panel=("model", "workload"), log_x=True,
            x_label="time to first token [s]", y_label="share of requests",
        ),),
    ),
    Figure(
        number=5,
        title="Busy while restoring (Qwen3-8B, H100, 10 Gbit/s)",
        published="GPU 88 %, I/O 78 % (LMCache: GPU 10 %, vLLM: GPU 91 %); v2: 89 and 89 %, its Cake 36 and 90 %",
        points=(
            Alone(sizes=Varied(((16_384, 0),), ((16_384, 0),))),
            Together(batches=Varied((8,), (2,)), workloads=("batch of {}",)),
            Sessions(workloads=Varied((("swe-bench", 8),), (("swe-bench", 1),))),
        ),
        charts=tuple(
            Chart(kind=BARS, x="workload", y=y, bound="", panel=("suite",), y_label=f"{what} busy, share of time")
            for y, what in (("compute_busy", "compute"), ("io_busy", "link"))
        ),
    ),
    Figure(
        number=6,
        title="Time to first token over prefix length (Qwen3-8B, 10 Gbit/s, 256 new tokens, one at a time)",
        published="1.1x at 6K to 1.7x at 30K tokens over the best existing",
        points=(Alone(
            places=Varied(tuple(Place(gpu=gpu) for gpu in GPUS), (H100,)),
            sizes=Varied(tuple((n, 256) for n in range(6144, 30_721, 6144)), ((6144, 256), (30_720, 256))),
        ),),
        charts=(Chart(kind=LINES, x="num_tokens", x_label="tokens of the prefix"),),
    ),
    Figure(
        number=7,
        title="Pipeline stages (Qwen3-8B, H100, 10 Gbit/s a stage)",
        published="0.21 s, without the GPU axis 0.29 s; v2: 1.59, 0.96, 0.67 s on 1, 2, 4 GPUs",
        points=(Pipelines(
            sizes=Varied(((4096, 256), (16_384, 256), (32_768, 256)), ((4096, 256),)), num_stages=(2, 4)
        ),),
        charts=(Chart(kind=BARS, x="num_stages", panel=("num_tokens",), x_label="GPUs in a pipeline"),),
    ),
    Figure(
        number=8,
        title="Faster links (Qwen3-8B, H100)",
        published="1.7x at 40 Gbit/s, 1.5x at 80 Gbit/s over the best existing (SWE-Bench)",
        # About the median, 90th and 99th percentile of SWE-Bench agents' prompts, the last cut to the longest.
        points=tuple(
            points
            for link in LINKS
            for points in (
                Alone(places=link, sizes=Varied(((4096, 256), (13_312, 256), (32_768, 256)), ((4096, 256),))),
                Sessions(places=link, workloads=Varied((("swe-bench", 8),), (("swe-bench", 1),))),
            )
        ),
        charts=(Chart(
            kind=BARS, x="link_gbps", log_y=True, panel=("workload", "num_tokens"), x_label="link [Gbit/s]"
        ),),
    ),
    Figure(
        number=9,
        title="Qwen3-30B-A3B on other GPUs, one each (10 Gbit/s, 256 new tokens, one at a time)",
        published="1.6x on two L40S, 1.5x on two A100 over the best existing",
        points=(Alone(
            places=Varied(*[tuple(Place(model="Qwen3-30B-A3B", gpu=gpu) for gpu in GPUS)] * 2),
            sizes=Varied(((8192, 256), (16_384, 256), (30_720, 256)), ((8192, 256),)),
            # Short chunks share the work finely, long ones read the experts' weights less often; each policy gets its
            # better.
            chunks=Varied((512, 2048), (512, 2048)),
        ),),
        charts=(Chart(kind=BARS, x="gpu", panel=("num_tokens", "chunk_tokens")),),
    ),
    Figure(
        number=10,
        title="Batches of requests that come at once (Qwen3-8B, 10 Gbit/s)",
        published="1.6x to 2.6x over the best existing at batch 2, 4, 8",
        points=(Together(
            places=Varied((H100, Place(gpu="A100")), (H100,)),
            batches=Varied((1, 2, 4, 8, 16), (1, 2)),
            workloads=("equal", "mixed"),
            contenders=(*CROWD, IN_ORDER),
        ),),
        charts=(Chart(
            kind=LINES, x="num_requests", panel=("gpu", "workload"), log_x=True, log_y=True,
            x_label="requests", y_label="mean time to first token [s]",
        ),),
    ),
    Figure(
        number=11,
        title="Time to first token over the bound (Qwen3-8B, H100, links of every speed, one at a time)",
        points=(Alone(
            sizes=Varied(((4096, 256), (4096, 1024), (32_768, 256), (32_768, 4096)), ((4096, 256),)),
            ratios=Varied(RATIOS_11, RATIOS_11[::4]),
        ),),
        charts=(Chart(
            kind=LINES, x="load_compute_ratio", y="ttft_over_bound", bound="", log_x=True, log_y=True,
            panel=("num_tokens", "suffix_tokens"), x_label="time to load everything / time to recompute everything",
            y_label="time to first token / lower bound",
        ),),
    ),
    Figure(
        number=12,
        title="Orders of requests (Qwen3-8B, H100, 10 Gbit/s, 80 mixed requests)",
        points=(Arriving(loads=Varied((0.7, 0.95), (0.95,)), contenders=ORDERS),),
        charts=tuple(
            Chart(kind=BARS, x="workload", y=y, bound=bound, panel=("suite",), y_label=label)
            for y, bound, label in (
                ("ttft_s", "bound_ttft_s", "mean TTFT [s]"),
                ("p99_ttft_s", "bound_p99_ttft_s", "99th percentile of TTFT [s]"),
                ("in_time", "", "share in time"),
            )
        ),
    ),
    Figure(
        number=13,
        title="Requests a second with their first token within 2 s (Qwen3-8B, H100, 10 Gbit/s, mixed requests)",
        points=(Arriving(
            rates_per_s=Varied((0.5, 1.0, 1.5, 2.0, 2.5, 3.0), (0.5, 2.0)), slo_s=2.0, contenders=WITH_SLO
        ),),
        charts=(Chart(
            kind=LINES, x="rate_per_s", y="goodput_per_s", bound="bound_goodput_per_s", panel=("suite",),
            x_label="arrivals a second", y_label="in time, a second",
        ),),
    ),
    Figure(
        number=14,
        title="Ours over the best rival of each cell; ×: behind by more than 2 % + 5 ms",
        points=(Alone(
            # All in chunks of 512 tokens, the mixture of experts too: that is the default.
            places=Varied((H100, Place(gpu="L40S"), MIXTURE), (H100,)),
            sizes=Varied(
                tuple((n, s) for s in (0, 16, 256, 2048) for n in (256, 512, 1024, 2048, 4096, 8192, 32_768)),
                tuple((n, s) for s in (0, 2048) for n in (1024, 8192)),
            ),
            ratios=Varied(RATIOS_14, RATIOS_14[::4]),
        ),),
        charts=(Chart(
            kind=MAP, x="load_compute_ratio", y="num_tokens", panel=("model", "gpu", "suffix_tokens"),
            x_label="load / compute", y_label="tokens of the prefix",
        ),),
    ),
    Figure(
        number=15,
        title="Hybrid models: rows of Gated DeltaNet layers under one attention layer (chunks of 1,024 tokens)",
        published="v2: 2.63x over Cake at 40, 2.40x at 80 Gbit/s, 2.69x on an H100, 2.07x on an A100; at most 19.5 ms "
        "over its ideal (Qwen3.5-9B, 10 Gbit/s), 6.5 % at 32K, 1.6 % at 128K",
        points=(
            Alone(
                places=Varied(HYBRIDS, HYBRIDS[:1]),
                sizes=Varied(
                    ((4096, 256), (32_768, 256), (131_072, 256), (32_768, 0), (131_072, 0)), ((4096, 256), (32_768, 0))
                ),
            ),
            Together(places=Varied(HYBRIDS[:2], HYBRIDS[:1]), batches=Varied((8,), (2,)), workloads=("mixed",)),
        ),
        charts=(Chart(
            kind=BARS, x="num_tokens", y="ttft_over_bound", bound="", log_y=True,
            panel=("model", "gpu", "link_gbps", "workload", "suffix_tokens"), x_label="tokens of the prefix",
            y_label="time to first token / lower bound",
        ),),
    ),
)})  # fmt: skip
"""3 to 10 as in the paper, ours from 11 on; 15 has what its second version says of hybrid models."""


def find_figures(numbers: Sequence[int] | None) -> list[Figure]:
    """The figures of these numbers in ascending order; every one for None.

    Raises:
        ConfigError: A number is not known; lists those that are.
    """
    for number in numbers or ():
        if number not in FIGURES:
            raise ConfigError(f"there is no figure {number}; known are {', '.join(map(str, FIGURES))}")
    return [FIGURES[number] for number in sorted(set(FIGURES if numbers is None else numbers))]
