"""Figures by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from cacheflow.bench.figures import (
    figure_03,
    figure_04,
    figure_05,
    figure_06,
    figure_07,
    figure_08,
    figure_09,
    figure_10,
    figure_11,
    figure_12,
    figure_13,
    figure_14,
)
from cacheflow.bench.figures.chart import Figure
from cacheflow.errors import ConfigError

_MODULES = (
    figure_03, figure_04, figure_05, figure_06, figure_07, figure_08, figure_09, figure_10, figure_11, figure_12,
    figure_13, figure_14,
)  # fmt: skip
FIGURES: Mapping[int, Figure] = MappingProxyType({module.FIGURE.number: module.FIGURE for module in _MODULES})
"""3 to 10 as in the paper, ours from 11 on."""


def find_figures(numbers: Sequence[int] | None) -> list[Figure]:
    """The figures of these numbers in ascending order; every one for None.

    Raises:
        ConfigError: A number is not known; lists those that are.
    """
    if numbers is None:
        return list(FIGURES.values())
    for number in numbers:
        if number not in FIGURES:
            raise ConfigError(f"there is no figure {number}; known are {', '.join(map(str, FIGURES))}")
    return [FIGURES[number] for number in sorted(set(numbers))]
