"""What bound and planner minimise: the later of two ends, compute's and the link's, over all staircases.

Every recomputed cell moves ``compute_KB`` seconds onto compute and takes ``load_KB`` seconds off the link. The
objective adds what must follow: for TTFT the whole suffix follows compute, and the top block's suffix with the head
follows the last byte. Shapes: ``K`` chunks, ``B`` layer blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from cacheflow.plan.problem import LinkCost, RestoreProblem, Seconds
from cacheflow.plan.staircase import Levels, marginal_compute_KB, recomputed_KB


class Objective(Enum):
    """Which end a plan minimises."""

    RESTORE = "restore"
    """When the last prefix cell is there."""
    TTFT = "ttft"
    """When the first token is there, the suffix climbing after the load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What a staircase costs on both sides.

    Attributes:
        compute_s: Compute seconds of the cells inside.
        load_s: Link seconds of the cells outside, latency included; 0 when nothing is loaded.
        value_s: The objective.
    """

    compute_s: float
    load_s: float
    value_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tradeoff:
    """A problem reduced to two costs a cell and what follows them.

    Attributes:
        compute_KB: Marginal compute seconds of a cell (``marginal_compute_KB``).
        load_KB: Link seconds of a cell, without latency.
        load_bytes_KB: Bytes of a cell. The bottom cell of a chunk counts what recomputing it brings over the link as
            boundary states as saved less, and may be negative.
        link: The link.
        after_compute_s: Seconds that must follow the last recomputed cell, or come before the first.
        after_load_s: Seconds that must follow the last loaded cell; never more than ``after_compute_s``.
        fixed_bytes: What the link brings whatever is recomputed: of each chunk its boundary states, or as many bytes
            of its keys and values.
    """

    compute_KB: Seconds
    load_KB: Seconds
    load_bytes_KB: npt.NDArray[np.int64]
    link: LinkCost
    after_compute_s: float
    after_load_s: float
    fixed_bytes: float = 0.0

    @property
    def num_chunks(self) -> int:
        """Number of chunks ``K``."""
        return int(self.compute_KB.shape[0])

    @property
    def num_blocks(self) -> int:
        """Number of layer blocks ``B``."""
        return int(self.compute_KB.shape[1])

    @property
    def link_end_s(self) -> float:
        """What a link that loads anything adds to the time of its cells: latency and what must go with them."""
        return self.link.latency_s + self.fixed_bytes / self.link.bytes_per_s + self.after_load_s

    def split(self, levels_K: Levels) -> Split:
        """Cost of one staircase."""
        inside_KB = recomputed_KB(levels_K, self.num_blocks)
        compute_s = float(self.compute_KB.sum(where=inside_KB))
        load_s = self.link.load_s(float(self.load_bytes_KB.sum(where=~inside_KB)) + self.fixed_bytes)
        value_s = max(compute_s + self.after_compute_s, load_s + self.after_load_s)
        return Split(compute_s=compute_s, load_s=load_s, value_s=value_s)

    def cover(self) -> Levels:
        """Levels of the smallest staircase outside of which there is no byte to load: usually the whole grid."""
        if (self.load_bytes_KB > 0).all():
            return np.full(self.num_chunks, self.num_blocks, dtype=np.int64)
        top_K = ((self.load_bytes_KB > 0) * np.arange(1, self.num_blocks + 1)).max(axis=1)
        return np.maximum.accumulate(top_K[::-1])[::-1].astype(np.int64)


def tradeoff(
    problem: RestoreProblem, objective: Objective = Objective.RESTORE, *, kv_only_top: bool = True
) -> Tradeoff:
    """Reduce a problem to what the objective needs.

    Args:
        problem: What the restoration costs.
        objective: For ``RESTORE`` nothing follows either side.
        kv_only_top: Count the topmost recomputed cell of each chunk for its keys and values only.
    """
    with_suffix = objective is Objective.TTFT
    load_bytes_KB, fixed_bytes, first_s = problem.load_bytes_KB, 0, 0.0
    if problem.boundary_bytes_K.any():
        # A boundary larger than all it stands for is never read: loading is as good, and the bound stays valid.
        boundary_K = np.minimum(problem.boundary_bytes_K, load_bytes_KB.sum(axis=1))
        load_bytes_KB = load_bytes_KB.copy()
        load_bytes_KB[:, 0] -= boundary_K
        fixed_bytes = int(boundary_K.sum())
        first_s = problem.link.load_s(float(boundary_K[0]))  # compute starts with the first chunk's boundary states
    return Tradeoff(
        compute_KB=marginal_compute_KB(problem, kv_only_top=kv_only_top),
        load_KB=load_bytes_KB / problem.link.bytes_per_s,
        load_bytes_KB=load_bytes_KB,
        fixed_bytes=fixed_bytes,
        link=problem.link,
        after_compute_s=first_s + (problem.suffix_s if with_suffix else 0.0),
        after_load_s=float(problem.suffix_B[-1]) + problem.head_s if with_suffix else 0.0,
    )
