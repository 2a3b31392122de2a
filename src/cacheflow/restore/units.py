"""Cuts what compute claimed into the least that is ordered, and joins what a step orders of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cacheflow.plan.grid import Tile
from cacheflow.plan.problem import RestoreProblem
from cacheflow.restore.work import ComputeWork
from cacheflow.state.claims import ComputeClaim


@dataclass(frozen=True, slots=True)
class Unit:
    """An order with what the profile expects it to take, uncorrected."""

    order: ComputeWork
    predicted_s: float


def cut(claim: ComputeClaim, problem: RestoreProblem) -> list[Unit]:
    """One unit per cell of a claim, in the order in which compute climbs: a budget may end behind any of them."""
    units: list[Unit] = []
    tile = claim.tile
    if tile is None:
        return units
    for chunk, block in tile.cells():
        kv_only = claim.kv_only_top and block == tile.block_hi - 1
        cost_KB = problem.kv_only_KB if kv_only else problem.compute_KB
        order = ComputeWork(
            Tile(chunk, chunk + 1, block, block + 1), restart=claim.restart and not units, kv_only_top=kv_only
        )
        units.append(Unit(order, float(cost_KB[chunk, block])))
    return units


def handed_on(unit: Unit, problem: RestoreProblem) -> Unit:
    """A unit at the top of its chunk whose activations the stage above takes: it needs the top block in full."""
    tile = unit.order.tile
    order = replace(unit.order, kv_only_top=False, sends=True)
    return Unit(order, float(problem.compute_KB[tile.chunk_lo, tile.block_lo]))


def join(units: Iterable[Unit]) -> list[Unit]:
    """Join units that continue each other, so that a worker computes them in one go."""
    joined: list[Unit] = []
    for unit in units:
        if joined and _continues(joined[-1].order, unit.order):
            last = joined.pop()
            before = last.order.tile
            tile = Tile(before.chunk_lo, before.chunk_hi, before.block_lo, unit.order.tile.block_hi)
            order = replace(unit.order, tile=tile, restart=last.order.restart)
            joined.append(Unit(order, last.predicted_s + unit.predicted_s))
        else:
            joined.append(unit)
    return joined


def _continues(before: ComputeWork, after: ComputeWork) -> bool:
    if before.kv_only_top or before.sends or after.restart or before.tile.chunk_lo != after.tile.chunk_lo:
        return False
    return before.tile.block_hi == after.tile.block_lo
