"""Engines over tiny models with hand-made costs, and one conversation to play on them, for the embedded tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cacheflow.embedded import Engine, EngineOptions, Reply, Session
from cacheflow.engine.identity import model_identity
from cacheflow.engine.model import LoadedModel
from cacheflow.engine.random_models import tiny_model
from cacheflow.engine.sampling import Sampling
from cacheflow.engine.smollm2 import quiet_transformers
from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.costs import CostTable
from cacheflow.plan.problem import LinkCost
from cacheflow.profiling.calibrate import kinds_of_layers
from cacheflow.stores.base import Store
from support.engine_cases import WINDOWED
from support.patience import PATIENT
from support.waiting import PATIENCE_S

CHUNK = 32
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral")
WINDOW = 24
"""Of the mistral cases: shorter than a chunk, so that it cuts in everywhere."""

NEW_TOKENS = 4
TURN_TOKENS = (118, 45, 3, 40)
"""Turns end inside a chunk, fill several, are shorter than one."""

SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=5)


@contextmanager
def one_torch_thread() -> Iterator[int]:
    """Run torch on one thread; yields the number it had. Tiny models are fastest so, most of all beside other work."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield usual
    finally:
        torch.set_num_threads(usual)


@lru_cache(maxsize=32)
def tiny(family: str = "llama", dtype: str = "float32", *, seed: int = 0, windowed: bool = False) -> LoadedModel:
    overrides: dict[str, Any] = dict(WINDOWED) if windowed else {}
    if family == "mistral":
        overrides["sliding_window"] = WINDOW
    return tiny_model(family, dtype=dtype, seed=seed, **overrides)


def cost_table(
    model: LoadedModel, *, cell_s: float = 1e-3, chunk_tokens: int = 64, max_tokens: int = 2048
) -> CostTable:
    """Costs that rise with the chunk and with what lies before it; ``cell_s`` is a full chunk without a past."""
    lengths, offsets = (1, chunk_tokens), (0, max_tokens // 2, max_tokens)
    past_P = np.array(offsets) / max_tokens
    share_Q = np.array([0.2, 1.0])
    kinds = {}
    for kind in dict.fromkeys(kinds_of_layers(model)):
        growth = 0.1 if kind == "sliding_attention" else 0.8
        full_QP = cell_s * share_Q[:, None] * (1.0 + growth * past_P)
        kv_only_QP = np.repeat(0.3 * cell_s * share_Q[:, None], len(offsets), axis=1)
        kinds[kind] = CostGrid(chunk_tokens=lengths, offsets=offsets, full_QP=full_QP, kv_only_QP=kv_only_QP)
    return CostTable(identity=model_identity(model), layer_kinds=kinds_of_layers(model), kinds=kinds, head_s=cell_s / 4)


def balanced_bytes_per_s(model: LoadedModel, *, cell_s: float = 1e-3) -> float:
    """A link over which a full chunk of one layer takes about as long as ``cost_table`` says it computes."""
    return CHUNK * model.shape.kv_bytes_per_token_layer / (0.7 * cell_s)


def make_engine(model: LoadedModel, store: Store, *, cell_s: float = 1e-3, **options: Any) -> Engine:
    """An engine that expects load and compute to be worth the same, and takes no read or write for late."""
    values = {"chunk_tokens": CHUNK, "executor": PATIENT, "self_test": False, "save_deadline_s": PATIENCE_S, **options}
    return Engine(
        model,
        store=store,
        costs=cost_table(model, cell_s=cell_s),
        link=LinkCost(bytes_per_s=balanced_bytes_per_s(model, cell_s=cell_s)),
        options=EngineOptions(**values),
    )


def random_tokens(num_tokens: int, *, seed: int = 3, vocab_size: int = 320) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_tokens,), generator=generator).tolist()


@lru_cache(maxsize=1)
def turns() -> tuple[tuple[int, ...], ...]:
    """New tokens of each turn."""
    return tuple(tuple(random_tokens(length, seed=10 + index)) for index, length in enumerate(TURN_TOKENS))


@dataclass(frozen=True)
class Played:
    """A turn's answer, and the session's KV and boundaries right after it."""

    reply: Reply
    kv: torch.Tensor
    chunk_ends: tuple[int, ...]


def answer(session: Session, tokens: Any, *, sampling: Sampling | None = None, **options: Any) -> Played:
    reply = session.generate(tokens, max_new_tokens=NEW_TOKENS, sampling=sampling, **options)
    kv = session.resident_kv()
    assert kv is not None
    return Played(reply, kv.clone(), session.chunk_ends)


def sampling_of(turn: int) -> Sampling | None:
    """Greedy and sampled turns alternate."""
    return SAMPLED if turn % 2 else None


@lru_cache(maxsize=32)
def never_evicted(model: LoadedModel, chunk_tokens: int = CHUNK, layers_per_block: int = 1) -> tuple[Played, ...]:
    """The reference: every turn answered with the KV in memory, nothing ever saved."""
    from cacheflow.stores.memory import MemoryStore

    with MemoryStore(capacity_bytes=1 << 20) as store:
        engine = make_engine(model, store, chunk_tokens=chunk_tokens, layers_per_block=layers_per_block)
        session = engine.session()
        return tuple(
            answer(session, tokens, sampling=sampling_of(turn), save=False) for turn, tokens in enumerate(turns())
        )


def assert_same(played: Played, reference: Played) -> None:
    """Boundaries, KV, logits and tokens, bit for bit."""
    assert played.chunk_ends == reference.chunk_ends
    assert torch.equal(played.kv, reference.kv)
    assert torch.equal(played.reply.logits, reference.reply.logits)
    assert played.reply.tokens == reference.reply.tokens


def assert_nothing_runs() -> None:
    """No I/O thread of an executor is left."""
    assert not [thread for thread in threading.enumerate() if thread.name == "cacheflow-io"]


def save_tiny(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A tiny model as a folder that the command line takes."""
    with quiet_transformers():
        tiny_model(family, **overrides).module.save_pretrained(folder)
    return folder
