"""GPU costs that others measured and published: LLMServingSim's profiles of vLLM, as a cost table and a decode table.

Source of the layout: casys-kaist/LLMServingSim, ``profiler/perf``. Two files a model and GPU, of one layer, in
microseconds: ``*_attention.csv`` (prefill_chunk, kv_prefill, n_decode, kv_decode, time_us; ``kv_prefill`` is what is
cached before the chunk, ``kv_decode`` the context of each of ``n_decode`` requests) and ``*_dense.csv`` (layer, tokens,
time_us: everything else by the number of tokens of a step). A layer costs its attention at (chunk, offset) and every
dense part of a decoder layer at the chunk's length.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cacheflow.errors import CostRangeError, ProfileError
from cacheflow.model_shape import DTYPE_BYTES, ModelShape
from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.costs import CostIdentity, CostTable
from cacheflow.plan.problem import Seconds

ATTENTION_FIELDS = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
DENSE_FIELDS = ("layer", "tokens", "time_us")
LAYER_PARTS: Mapping[str, int] = {
    "layernorm": 2, "qkv_proj": 1, "qk_norm": 1, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1,
    "down_proj": 1,
}  # fmt: skip
"""Dense parts of a decoder layer, and how often it has them; ``qk_norm`` where the model has one."""
OPTIONAL_PARTS = ("qk_norm",)
EXTRAPOLATED_TOKENS = 1 << 20
"""How far attention is continued in the offset when asked to."""

Points = Mapping[int, Sequence[tuple[int, float]]]
"""Measured seconds by a second coordinate, in lists by a first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTable:
    """Measured seconds of decoding in one layer.

    Attributes:
        num_requests: Measured batch sizes, ascending. Shape ``N``.
        contexts: Measured context lengths of each request, ascending. Shape ``C``.
        attention_NC: Attention of the whole batch.
        dense_tokens: Measured tokens of a step, ascending. Shape ``T``.
        dense_T: Everything else in the layer.
        num_layers: Layers of the model.
        head_s: Final norm and LM head of a step.
    """

    num_requests: tuple[int, ...]
    contexts: tuple[int, ...]
    attention_NC: Seconds
    dense_tokens: tuple[int, ...]
    dense_T: Seconds
    num_layers: int
    head_s: float

    def step_s(self, num_requests: int, context_tokens: int) -> float:
        """Seconds of a step; batch and mean context are interpolated, shorter than measured counts as the shortest.

        Raises:
            CostRangeError: The batch is larger, or its mean context longer, than was measured.
        """
        if num_requests == 0:
            return 0.0
        context = max(context_tokens / num_requests, self.contexts[0])
        if num_requests > self.num_requests[-1] or context > self.contexts[-1]:
            raise CostRangeError(
                f"decoding {num_requests} requests of {context:.0f} tokens is outside the measured "
                f"{self.num_requests[-1]} requests of {self.contexts[-1]} tokens: "
                "cap the batch (max_num_seqs) or extrapolate"
            )
        by_batch = [float(np.interp(context, self.contexts, row)) for row in self.attention_NC]
        attention_s = float(np.interp(num_requests, self.num_requests, by_batch))
        dense_s = float(np.interp(num_requests, self.dense_tokens, self.dense_T))
        return self.num_layers * (attention_s + dense_s) + self.head_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedCosts:
    """What a folder of measurements says of one model on one GPU.

    Attributes:
        source: ``published:<gpu>/<model>``, with what was added to it.
        table: Prefill costs.
        decode: Decode costs.
    """

    source: str
    table: CostTable
    decode: DecodeTable


def read_published(folder: Path, *, gpu: str, shape: ModelShape, extrapolate: bool = False) -> PublishedCosts:
    """Read the files of one model on one GPU.

    Args:
        folder: Holds ``llmservingsim_<gpu>_<organisation>_<model>_<dtype>_tp1_attention.csv`` and ``..._dense.csv``.
        gpu: Name of the GPU as in the file names.
        shape: The model; its name must stand in the file names.
        extrapolate: Continue attention linearly in the offset beyond what was measured (for a fixed chunk it is linear:
            every token sees as many more); the source then says so.

    Raises:
        ProfileError: No such files, or they are malformed or lack a part of the layer.
    """
    attention_path, dense_path = _find(folder, gpu, shape.name)
    prefill, decode = _read_attention(attention_path)
    parts = _read_dense(dense_path)
    chunks, offsets, attention_QP = _rectangle(prefill, attention_path)
    batches, contexts, attention_NC = _rectangle(decode, attention_path)
    if extrapolate:
        offsets, attention_QP = _continued(offsets, attention_QP)
        contexts, attention_NC = _continued(contexts, attention_NC)
    dense_Q = _dense_s(parts, LAYER_PARTS, chunks, dense_path)
    tokens = tuple(each for each, _ in parts["qkv_proj"])
    head_s = _head_s(parts, shape)
    full_QP = attention_QP + dense_Q[:, None]
    identity = CostIdentity(
        model=shape.name, fingerprint=attention_path.stem, num_layers=shape.num_layers, device_type="cuda", device=gpu,
        dtype=shape.dtype, num_threads=0, attention="vllm",
    )  # fmt: skip
    measured = CostGrid(
        chunk_tokens=chunks,
        offsets=offsets,
        full_QP=full_QP,
        kv_only_QP=np.minimum(full_QP, _kv_only_s(parts, shape, chunks, dense_path)[:, None]),
    )
    return PublishedCosts(
        source=f"published:{gpu}/{shape.name}{'+extrapolated' if extrapolate else ''}",
        table=CostTable(
            identity=identity, layer_kinds=("full",) * shape.num_layers, kinds={"full": measured}, head_s=head_s
        ),
        decode=DecodeTable(
            num_requests=batches,
            contexts=contexts,
            attention_NC=attention_NC,
            dense_tokens=tokens,
            dense_T=_dense_s(parts, LAYER_PARTS, tokens, dense_path),
            num_layers=shape.num_layers,
            head_s=head_s,
        ),
    )


def published_gpus(folder: Path) -> tuple[str, ...]:
    """GPUs that a folder holds measurements of."""
    names = (path.name.split("_")[1] for path in folder.glob("llmservingsim_*_tp1_attention.csv"))
    return tuple(sorted(set(names)))


def _find(folder: Path, gpu: str, model: str) -> tuple[Path, Path]:
    found = sorted(
        path
        for path in folder.glob("llmservingsim_*_tp1_attention.csv")
        if path.name.split("_")[1].lower() == gpu.lower() and model.lower() in path.name.lower()
    )
    if len(found) != 1:
        known = sorted(path.name for path in folder.glob("llmservingsim_*_tp1_attention.csv"))
        raise ProfileError(
            f"{folder} holds {len(found)} measurements of {model} on {gpu}, expected 1; "
            f"it has {', '.join(known) or 'no llmservingsim_*_tp1_attention.csv'}"
        )
    dense = found[0].with_name(found[0].name.replace("_attention.csv", "_dense.csv"))
    return found[0], dense


def _rows(path: Path, fields: tuple[str, ...]) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} cannot be read: {error}") from error
    if not rows or tuple(rows[0]) != fields:
        raise ProfileError(f"{path}: the first line must be {','.join(fields)}")
    return rows[1:]


def _read_attention(path: Path) -> tuple[Points, Points]:
    """Pure prefill by chunk and offset, pure decode by batch and context; mixed rows are left out. In seconds."""
    prefill: dict[int, list[tuple[int, float]]] = {}
    decode: dict[int, list[tuple[int, float]]] = {}
    for number, row in enumerate(_rows(path, ATTENTION_FIELDS), start=2):
        try:
            chunk, offset, batch, context = (_count(value) for value in row[:4])
            seconds = _seconds(row[4])
        except (ValueError, IndexError) as error:
            raise ProfileError(f"{path}, line {number}: {','.join(row)!r} is no measurement") from error
        if chunk and not batch:
            prefill.setdefault(chunk, []).append((offset, seconds))
        elif batch and not chunk:
            decode.setdefault(batch, []).append((context, seconds))
    return prefill, decode


def _read_dense(path: Path) -> dict[str, list[tuple[int, float]]]:
    parts: dict[str, list[tuple[int, float]]] = {}
    for number, row in enumerate(_rows(path, DENSE_FIELDS), start=2):
        try:
            parts.setdefault(row[0], []).append((_count(row[1]), _seconds(row[2])))
        except (ValueError, IndexError) as error:
            raise ProfileError(f"{path}, line {number}: {','.join(row)!r} is no measurement") from error
    missing = [part for part in LAYER_PARTS if part not in parts and part not in OPTIONAL_PARTS]
    if missing:
        raise ProfileError(f"{path} lacks {', '.join(missing)}: a layer cannot be priced without")
    return {part: sorted(points) for part, points in parts.items()}


def _count(text: str) -> int:
    if not 0 <= int(text) < 1 << 40:
        raise ValueError("no number of tokens or requests")
    return int(text)


def _seconds(microseconds: str) -> float:
    if not 0 < float(microseconds) < math.inf:
        raise ValueError("no duration")
    return float(microseconds) * 1e-6


def _rectangle(points: Points, path: Path) -> tuple[tuple[int, ...], tuple[int, ...], Seconds]:
    """Both axes and the seconds; a row that lacks a point of another gets it between its own neighbours."""
    if len(points) < 2:
        raise ProfileError(f"{path}: measurements of at least two sizes are needed, found {sorted(points)}")
    rows = {first: sorted(row) for first, row in sorted(points.items())}
    low = max(row[0][0] for row in rows.values())
    high = min(row[-1][0] for row in rows.values())
    axis = tuple(sorted({second for row in rows.values() for second, _ in row if low <= second <= high}))
    if len(axis) < 2:
        raise ProfileError(f"{path}: its sizes have no two offsets in common")
    seconds = [np.interp(axis, [second for second, _ in row], [s for _, s in row]) for row in rows.values()]
    return tuple(rows), axis, np.array(seconds)


def _continued(axis: tuple[int, ...], seconds: Seconds) -> tuple[tuple[int, ...], Seconds]:
    """The table with one point more, far off, on the line through the last point and the one at half of it or before.

    Not through the last two: they may lie so close that noise decides the slope.
    """
    anchor = max(index for index, value in enumerate(axis[:-1]) if value <= axis[-1] / 2 or index == 0)
    slope = np.maximum(0.0, seconds[:, -1] - seconds[:, anchor]) / (axis[-1] - axis[anchor])
    far = seconds[:, -1] + slope * (EXTRAPOLATED_TOKENS - axis[-1])
    return (*axis, EXTRAPOLATED_TOKENS), np.column_stack([seconds, far])


def _dense_s(
    parts: Mapping[str, Sequence[tuple[int, float]]], counts: Mapping[str, int], tokens: Sequence[int], path: Path
) -> Seconds:
    """Seconds of these parts together for each number of tokens."""
    total = np.zeros(len(tokens))
    for part, count in counts.items():
        if part not in parts:
            continue
        axis = [each for each, _ in parts[part]]
        if tokens[-1] > axis[-1]:
            raise ProfileError(f"{path}: {part} was measured up to {axis[-1]} tokens, attention up to {tokens[-1]}")
        total += count * np.interp(tokens, axis, [seconds for _, seconds in parts[part]])
    return total


def _kv_only_s(
    parts: Mapping[str, Sequence[tuple[int, float]]], shape: ModelShape, tokens: Sequence[int], path: Path
) -> Seconds:
    """One norm, the share of the projection that keys and values have, rotary embedding and, where there is one, norm.

    An estimate: nobody measured it alone.
    """
    share = 2 * shape.num_kv_heads / (shape.num_q_heads + 2 * shape.num_kv_heads)
    projection_s = share * _dense_s(parts, {"qkv_proj": 1}, tokens, path)
    return projection_s + _dense_s(parts, {"layernorm": 1, "qk_norm": 1, "rotary_emb": 1}, tokens, path)


def _head_s(parts: Mapping[str, Sequence[tuple[int, float]]], shape: ModelShape) -> float:
    """Final norm, and the LM head at the rate at which the widest projection read its weights for the fewest tokens."""
    item_bytes = DTYPE_BYTES[shape.dtype]
    gate_up_bytes = 2 * shape.intermediate_size * shape.hidden_size * item_bytes
    bytes_per_s = gate_up_bytes / parts["gate_up_proj"][0][1]
    norm_s = parts["final_layernorm"][0][1] if "final_layernorm" in parts else 0.0
    return norm_s + shape.vocab_size * shape.hidden_size * item_bytes / bytes_per_s
