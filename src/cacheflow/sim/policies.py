"""The systems that a simulation compares: how each restores, and whom it serves first.

Rivals as their papers and releases describe them, at their best: no inefficiency of an implementation is put in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from cacheflow.errors import UnknownPolicyError
from cacheflow.plan.batch import BatchPolicy
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.remaining import together_s
from cacheflow.policies.base import RestorePolicy
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.policies.cacheflow_v1 import CacheFlowV1
from cacheflow.policies.objective import BatchObjective
from cacheflow.policies.registry import make_policy
from cacheflow.policies.stages import StagePolicy
from cacheflow.policies.step_overhead import STEP_OVERHEAD_S
from cacheflow.sim.granularity import CELLS, COLUMNS, EXACT, MAX_CELLS, ROWS, Grain
from cacheflow.sim.plugin import PluginRanking, RestoreThenPrefill

CLOSE = 1.15
"""A plan is within this of the closed form of compute and link together; a slower prefill cannot be the better way."""

GrainOf = Callable[[RestoreProblem], Grain]


def _longer_way(problem: RestoreProblem) -> Grain:
    """What v1 hands over: whole chunks or whole layers, as it chooses on the exact grid."""
    order = CacheFlowV1().plan(problem).compute_sequence
    return COLUMNS if not order or order[0].block_hi == problem.grid.num_blocks else ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One system.

    Attributes:
        restore: Name of its restore policy.
        batch: Name of its batch policy; None for the objective that the operator chose.
        grain_of: How coarse a grid of its restorations may be.
        about: One line for people.
        order: Whom it serves first, for people and records.
        in_plugin: It restores inside vLLM as our plugin does, which ranks restorations alone; see ``sim.plugin``.
        prefills: Restores nothing: the engine prefills what is not in GPU memory, in passes of its own.
        boundary_states: Its pipeline stages read stored boundary states where that is sooner.
    """

    restore: str
    batch: str | None
    grain_of: GrainOf
    about: str
    order: str = "all work by arrival"
    in_plugin: bool = False
    prefills: bool = False
    boundary_states: bool = False


PLUGIN = "cacheflow"
"""Ours, as it is deployed: inside vLLM."""
EMBEDDED = "cacheflow_embedded"
"""Ours, as ``Engine.concurrent`` serves."""
SYSTEMS: Mapping[str, System] = MappingProxyType({
    "vllm": System(
        restore="recompute", batch="fcfs", grain_of=lambda _: COLUMNS, about="recomputes what left GPU memory",
        prefills=True,
    ),
    "lmcache": System(
        restore="load", batch="fcfs", grain_of=lambda _: COLUMNS, about="loads the prefix whole, then prefills"
    ),
    "hicache": System(
        restore="layerwise_load", batch="fcfs", grain_of=lambda _: ROWS,
        about="loads layer by layer, new tokens after it",
    ),
    "cake": System(restore="cake", batch="fcfs", grain_of=lambda _: COLUMNS, about="chunks from both ends"),
    "cacheflow_v1": System(
        restore="cacheflow_v1", batch="longest_first", grain_of=_longer_way,
        about="chunks or layers from both ends", order="compute by arrival, the link to the largest saving",
    ),
    "cacheflow_v2": System(
        restore="cacheflow_v2", batch="dp", grain_of=lambda _: CELLS, about="one dynamic program over all requests"
    ),
    PLUGIN: System(
        restore="cacheflow", batch=None, grain_of=lambda _: CELLS, in_plugin=True, boundary_states=True,
        about="ours, the vLLM plugin: chunks shared by layers, new tokens after the restoration",
        order="restorations by objective, new tokens by arrival",
    ),
    EMBEDDED: System(
        restore="cacheflow", batch=None, grain_of=lambda _: CELLS, boundary_states=True,
        about="ours, the embedded engine: chunks shared by layers, new tokens climbing after the load",
        order="all work by objective, new prompts too",
    ),
})  # fmt: skip
"""By name, in the order of tables and plots."""
DEFAULT_SYSTEMS = tuple(name for name in SYSTEMS if name != EMBEDDED)
"""What a server can be made to do. The embedded engine serves one device and no fleet: it is a row only where asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimPolicy:
    """A system made ready to run.

    Attributes:
        name: Of the system.
        batch: Its batch policy; keeps no state.
        grain_of: How coarse a grid of one restoration may be.
        restore: How it restores.
        prefills: See ``System``.
        in_plugin: See ``System``.
        boundary_states: See ``System``.
    """

    name: str
    batch: BatchPolicy
    grain_of: GrainOf
    restore: RestorePolicy
    prefills: bool
    in_plugin: bool = False
    boundary_states: bool = False

    def leaves_to_prefill(self, problem: RestoreProblem) -> bool:
        """Whether a request is restored not at all; it is planned for that only where its own prefill comes close."""
        if self.prefills or problem.prefill_s is None:
            return self.prefills
        # New tokens that climb after the load are compute's share of the same time; after the restoration they add.
        beside_s = 0.0 if self.in_plugin else problem.suffix_s
        hybrid_s = together_s(compute_s=problem.recompute_s, load_s=problem.load_s, suffix_s=beside_s)
        if self.in_plugin:
            hybrid_s += problem.suffix_s + STEP_OVERHEAD_S
        return problem.prefill_s < CLOSE * hybrid_s and self.restore.plan(problem).left_to_prefill


def make_system(
    name: str, *, objective: str = BatchObjective.MEAN_TTFT.value, exact: bool = False, max_cells: int = MAX_CELLS
) -> SimPolicy:
    """A system by name.

    Args:
        name: One of ``SYSTEMS``.
        objective: What ours minimise: ``cacheflow`` over restorations, ``cacheflow_embedded`` over all requests.
        exact: Restore on exact grids, one layer and one chunk a cell.
        max_cells: Cells of a restoration otherwise.

    Raises:
        UnknownPolicyError: No such system or objective; lists the known ones.
    """
    if name not in SYSTEMS:
        raise UnknownPolicyError(f"policy {name!r} is not known; known are {', '.join(SYSTEMS)}")
    known = [each.value for each in BatchObjective]
    if objective not in known:
        raise UnknownPolicyError(f"objective {objective!r} is not known; known are {', '.join(known)}")
    system = SYSTEMS[name]
    restore: RestorePolicy = StagePolicy(make_policy(system.restore))
    if system.in_plugin:
        restore = RestoreThenPrefill(restore)
    batch = make_batch_policy(system.batch or objective, restore)
    return SimPolicy(
        name=name,
        batch=PluginRanking(batch) if system.in_plugin else batch,
        restore=restore,
        prefills=system.prefills,
        in_plugin=system.in_plugin,
        grain_of=(lambda _: EXACT) if exact else _limited(system.grain_of, max_cells),
        boundary_states=system.boundary_states,
    )


def _limited(grain_of: GrainOf, max_cells: int) -> GrainOf:
    if max_cells == MAX_CELLS:
        return grain_of
    return lambda problem: replace(grain_of(problem), max_cells=max_cells)
