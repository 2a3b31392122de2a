"""Brute force over every staircase of a small grid, from the definition: no code shared with the planner."""

from itertools import combinations_with_replacement


def every_staircase(num_chunks, num_blocks):
    """Yield every never-increasing tuple of levels."""
    yield from combinations_with_replacement(range(num_blocks, -1, -1), num_chunks)


def ends(problem, levels, *, kv_only_top=True):
    """Compute seconds and link seconds of one staircase."""
    compute_s, num_bytes = 0.0, 0
    for chunk, level in enumerate(levels):
        for block in range(problem.grid.num_blocks):
            if block >= level:
                num_bytes += int(problem.load_bytes_KB[chunk, block])
            elif block == level - 1 and kv_only_top:
                compute_s += float(problem.kv_only_KB[chunk, block])
            else:
                compute_s += float(problem.compute_KB[chunk, block])
    load_s = problem.link.latency_s + num_bytes / problem.link.bytes_per_s if num_bytes else 0.0
    return compute_s, load_s


def restore_s(problem, levels, *, kv_only_top=True):
    """When the last prefix cell is there."""
    return max(ends(problem, levels, kv_only_top=kv_only_top))


def ttft_s(problem, levels, *, kv_only_top=True):
    """When the first token could be there, the suffix climbing behind the load."""
    compute_s, load_s = ends(problem, levels, kv_only_top=kv_only_top)
    suffix_s = float(sum(problem.suffix_B)) + problem.head_s
    return max(compute_s + suffix_s, load_s + float(problem.suffix_B[-1]) + problem.head_s)


def least(problem, objective=restore_s, *, kv_only_top=True):
    """The least objective of any staircase, and one that reaches it."""
    grid = problem.grid
    return min(
        (objective(problem, levels, kv_only_top=kv_only_top), levels)
        for levels in every_staircase(grid.num_chunks, grid.num_blocks)
    )
