"""Figure 3: layer-wise against token-wise restoration over the length of the prefix."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.runs import OURS, alone
from cacheflow.bench.figures.setting import Setting
from cacheflow.bench.figures.simulate import Contender
from cacheflow.plan.bound import Bound, bound

LENGTHS = (1024, 2048, 4096, 6144, 8192, 12_288, 16_384, 24_576, 32_768, 49_152, 65_536, 98_304)
PLACES = (("Qwen3-8B", 512), ("Llama-3.1-8B", 512), ("Qwen3-30B-A3B", 512), ("Qwen3-30B-A3B", 2048))
ALWAYS = 10**9
"""A crossover length that no prefix reaches: layer-wise whatever the length."""
TOKEN_WISE = Contender(series="token-wise", policy="cacheflow_v1", crossover_tokens=0)
LAYER_WISE = Contender(series="layer-wise", policy="cacheflow_v1", crossover_tokens=ALWAYS)
ONE_PASS = Contender(series="layer-wise, one pass", policy="cacheflow_v1", crossover_tokens=ALWAYS, reads_in_flight=1)
HYBRID = Contender(series=OURS, policy=OURS)


def records(fast: bool) -> Iterator[FigureRecord]:
    """Restoration alone; layer-wise in chunks, and with each layer in one pass over the whole prefix."""
    for model, chunk_tokens in PLACES[:1] if fast else PLACES:
        setting, one_pass = Setting(model=model, chunk_tokens=chunk_tokens), Setting(model=model, chunk_tokens=0)
        for num_tokens in LENGTHS[:5:2] if fast else LENGTHS:
            chunks = setting.problem(num_tokens=num_tokens, suffix_tokens=0)
            whole = one_pass.problem(num_tokens=num_tokens, suffix_tokens=0)
            own_s = setting.prefill(chunks).suffix_s
            least_s = min(bound(chunks).restore_s, bound(whole).restore_s, own_s)
            least = Bound(restore_s=least_s, ttft_s=least_s)
            runs = ((setting, chunks, (TOKEN_WISE, LAYER_WISE, HYBRID)), (one_pass, whole, (ONE_PASS,)))
            for place, problem, contenders in runs:
                yield from alone(
                    FIGURE.suite, place, problem,
                    contenders=contenders, least=least, workload=f"chunks of {chunk_tokens}",
                )  # fmt: skip


FIGURE = Figure(
    number=3,
    title="Crossover of layer-wise and token-wise restoration",
    published="below a crossover length layer-wise is faster, above it token-wise (v2: 36K tokens, 22 % at 11K)",
    charts=(
        Chart(
            kind=ChartKind.LINES, panel=("model", "workload"), x="num_tokens", y="restore_over_bound",
            bound="", log_x=True,
            x_label="tokens of the prefix", y_label="restoration time / lower bound",
        ),
    ),
    records=records,
)  # fmt: skip
