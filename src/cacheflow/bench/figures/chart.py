"""What a figure shows, as data: the drawing module and the registry read it, nothing here draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from cacheflow.bench.figures.record import FigureRecord


class ChartKind(Enum):
    """How records become marks."""

    LINES = "lines"
    """``y`` over ``x``, a line a series."""
    BARS = "bars"
    """``y``, a group of bars each ``x``, a bar a series."""
    DISTRIBUTION = "distribution"
    """Cumulative distribution of the time to first token, a curve a series."""
    MAP = "map"
    """Ours over the best rival, a cell each ``x`` and ``y``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One row of panels.

    Attributes:
        kind: How it is drawn.
        x: Field of the records along the horizontal axis.
        y: Field along the vertical axis.
        bound: Field drawn beside ``y`` as the bound; empty for none.
        panel: Fields that tell panels apart.
        x_label: Of the axis.
        y_label: Of the axis.
        log_x: Logarithmic.
        log_y: Logarithmic.
        where: Field and value a record must have to stand in this chart; None for every record.
    """

    kind: ChartKind
    x: str = ""
    y: str = "ttft_s"
    bound: str = "bound_ttft_s"
    panel: tuple[str, ...] = ("model", "gpu")
    x_label: str = ""
    y_label: str = "time to first token [s]"
    log_x: bool = False
    log_y: bool = False
    where: tuple[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        number: As in the paper; ours from 11 on.
        title: Above the picture.
        published: What the paper says of it; empty for ours.
        charts: Rows of panels.
        records: Simulates its points; the argument asks for a reduced set.
    """

    number: int
    title: str
    published: str
    charts: tuple[Chart, ...]
    records: Callable[[bool], Iterable[FigureRecord]]

    @property
    def suite(self) -> str:
        """Name of its records."""
        return f"figure-{self.number}"
