"""Prefixes restored under policies side by side: the usual one, in other cells, a short one, the longest."""

from __future__ import annotations

from cacheflow.bench import setup
from cacheflow.bench.gpu.study import GpuStudy
from cacheflow.bench.restore.link import PinnedStudyLink, StoreStudyLink
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy

FEW_POLICIES = ("recompute", "load", "cake", "cacheflow")


def main_table(study: GpuStudy) -> bool:
    """Part 4: the usual prefix under every policy over every link."""
    ground, flags = study.main(), study.flags
    ground.run(make_policy("cacheflow"), with_suffix=True, bytes_per_s=float("inf"))  # first uses are not timed
    return study.rounds(ground, gbps=flags.gbps, policies=tuple(RESTORE_POLICIES), repeats=flags.repeats)


def other_cells(study: GpuStudy) -> bool:
    """Part 5: smaller and larger chunks and cells over the links that are fast for them."""
    flags, policies = study.flags, ("recompute", "load", "cacheflow")
    study.free()
    for chunk_tokens, blocks in ((flags.chunk_tokens // 2, (1, 4)), (2 * flags.chunk_tokens, (1,))):
        ground = study.study(flags.tokens, chunk_tokens=max(1, chunk_tokens), layers_per_block=blocks[0])
        for layers_per_block in blocks:
            ground.regrain(min(layers_per_block, ground.model.shape.num_layers))
            if not study.rounds(ground, gbps=(40.0, 80.0), policies=policies, repeats=1):
                return False
        ground.close()
        del ground
        study.collect()
    return True


def short_and_stored(study: GpuStudy) -> bool:
    """Part 6: a short prefix, from pinned memory and from a real store."""
    flags = study.flags
    study.free()
    namespace = setup.namespace_of(setup.open_model(flags), flags.chunk_tokens)
    for link in (PinnedStudyLink(), StoreStudyLink(namespace)):
        ground = study.study(flags.short_tokens, chunk_tokens=flags.chunk_tokens, layers_per_block=2, link=link)
        complete = study.rounds(ground, gbps=(10.0, 40.0), policies=FEW_POLICIES, repeats=1)
        ground.close()
        del ground
        study.collect()
        if not complete:
            return False
    return True


def longest(study: GpuStudy) -> bool:
    """Part 8: the longest prefix once."""
    flags = study.flags
    study.free()
    ground = study.study(flags.long_tokens, chunk_tokens=flags.chunk_tokens, layers_per_block=2, cost_repeats=1)
    complete = study.rounds(ground, gbps=(40.0,), policies=FEW_POLICIES, repeats=1)
    ground.close()
    return complete
