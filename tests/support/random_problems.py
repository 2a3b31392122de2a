"""Restoration problems for tests: by hand, by seed, and as a hypothesis strategy."""

import numpy as np
from hypothesis import strategies as st

from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem

CELL_BYTES = 1 << 20


def equal_blocks(
    *, num_chunks=8, num_blocks=4, cell_s=0.01, growth=0.05, kv_share=0.1, load_ratio=1.0, suffix_s=0.0, last=1.0
):
    """Equal blocks, chunk cost rising by ``growth`` of the first per chunk; loading takes ``load_ratio`` of compute.

    ``last`` shortens the last chunk to that share of a chunk.
    """
    compute_K = cell_s * (1.0 + growth * np.arange(num_chunks))
    tokens_K = np.full(num_chunks, 512)
    if num_chunks:
        compute_K[-1] *= 0.2 + 0.8 * last
        tokens_K[-1] = max(1, int(512 * last))
    compute_KB = np.repeat(compute_K[:, None], num_blocks, axis=1)
    load_bytes_KB = np.repeat(tokens_K[:, None] * (CELL_BYTES // 512), num_blocks, axis=1)
    rate = load_bytes_KB.sum() / (compute_KB.sum() * load_ratio) if num_chunks else 1e9
    return RestoreProblem(
        grid=Grid(
            chunk_ends=tuple(tokens_K.cumsum().tolist()),
            num_blocks=num_blocks,
            suffix_ends=(int(tokens_K.sum()) + 64,) if suffix_s else (),
        ),
        compute_KB=compute_KB,
        kv_only_KB=compute_KB * kv_share,
        load_bytes_KB=load_bytes_KB,
        link=LinkCost(bytes_per_s=float(rate)),
        suffix_B=np.full(num_blocks, suffix_s * 0.9 / num_blocks),
        head_s=suffix_s * 0.1,
    )


def random_problem(rng, *, num_chunks, num_blocks, equal=None, suffix=None):
    """Any shape of cost: convex or not, equal or unequal blocks, equal or unequal bytes, with or without a suffix."""
    equal = rng.random() < 0.4 if equal is None else equal
    suffix = rng.random() < 0.5 if suffix is None else suffix
    shape = (num_chunks, num_blocks)
    column = rng.uniform(0.2, 1.0, num_chunks)
    if rng.random() < 0.6:
        column = np.sort(column)
    row = np.ones(num_blocks) if equal else rng.uniform(0.2, 2.0, num_blocks)
    compute = column[:, None] * row
    if not equal and rng.random() < 0.3:
        compute = rng.uniform(0.05, 1.0, shape)
    kv_only = compute * rng.choice([0.05, 0.3, 1.0])
    tokens = np.full(num_chunks, 16)
    if num_chunks and rng.random() < 0.4:
        tokens[-1] = rng.integers(1, 16)
    if rng.random() < 0.2:
        tokens = rng.integers(1, 40, num_chunks)
    per_block = np.full(num_blocks, 64) if equal or rng.random() < 0.5 else rng.integers(0, 99, num_blocks)
    load_bytes = tokens[:, None] * per_block
    total = max(1.0, float(load_bytes.sum()))
    rate = total / max(1e-9, float(compute.sum()) * 10 ** rng.uniform(-1.3, 1.3))
    return RestoreProblem(
        grid=Grid(
            chunk_ends=tuple(tokens.cumsum().tolist()),
            num_blocks=num_blocks,
            suffix_ends=(int(tokens.sum()) + 8,) if suffix else (),
        ),
        compute_KB=compute,
        kv_only_KB=kv_only,
        load_bytes_KB=load_bytes,
        link=LinkCost(bytes_per_s=rate, latency_s=float(rng.choice([0.0, 0.02, 0.5]))),
        suffix_B=rng.uniform(0.01, 1.0, num_blocks) if suffix else np.zeros(num_blocks),
        head_s=0.05 if suffix else 0.0,
    )


@st.composite
def problems(draw, *, max_chunks=6, max_blocks=5, suffix=None):
    """Random problems by drawn shape and seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_problem(
        rng,
        num_chunks=draw(st.integers(1, max_chunks)),
        num_blocks=draw(st.integers(1, max_blocks)),
        suffix=suffix,
    )
