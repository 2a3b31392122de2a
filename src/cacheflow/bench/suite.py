"""The one runner of suites: policies take turns in one process, each run is appended, a summary stands at the end.

The same command in the same folder goes on where it stopped: what is on record is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cacheflow.bench.options import make_folder
from cacheflow.bench.records.base import BenchRecord
from cacheflow.bench.records.suites import append_record, read_records
from cacheflow.bench.results_file import only_run, take_up
from cacheflow.bench.table import print_whole
from cacheflow.errors import ConfigError

R = TypeVar("R", bound=BenchRecord)
T = TypeVar("T")


class Alternation(Protocol):
    """What every round of a suite says."""

    @property
    def policies(self) -> Sequence[str]:
        """Who takes turns."""
        ...


RoundT = TypeVar("RoundT", bound=Alternation)
OnRun = Callable[[str], None]
"""Called with a policy's name before its run."""


class SuiteRun(Generic[R]):
    """One command over one results file.

    Attributes:
        done: What was on record before.
        added: What this command put on record.
    """

    def __init__(self, results: Path, done: list[R], console: Console, time_limit_s: float | None) -> None:
        """Start the clock of the time limit (None: no limit)."""
        self.results, self.done, self.console = results, done, console
        self.added: list[R] = []
        self._ends_s = float("inf") if time_limit_s is None else time.monotonic() + time_limit_s

    @property
    def left_s(self) -> float:
        """Seconds of the time limit that are left; below 0 once it has passed, infinite without one."""
        return self._ends_s - time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the time limit has passed."""
        return self.left_s < 0

    @property
    def records(self) -> list[R]:
        """All that is on record by now."""
        return [*self.done, *self.added]

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, markup=False, soft_wrap=True)

    def add(self, record: R) -> None:
        """Put a run on record."""
        append_record(self.results, record)
        self.added.append(record)

    def run_rounds(
        self,
        progress: Progress,
        rounds: Sequence[RoundT],
        measure: Callable[[RoundT, OnRun], Iterable[R]],
        describe: Callable[[RoundT], str],
    ) -> bool:
        """Run rounds one after the other; False when the time limit ended it between two.

        Args:
            progress: Shows it.
            rounds: What is not on record yet; repeats outermost, so that a drifting machine hits all settings alike.
            measure: Runs one round, calling its second argument before each run.
            describe: What a round is, for people.
        """
        task = progress.add_task("restoring", total=sum(len(each.policies) for each in rounds))
        for each in rounds:
            if self.is_over:
                return False
            what = describe(each)
            for record in measure(
                each,
                lambda name, what=what: progress.update(  # type: ignore[misc]
                    task, description=f"{what}, {name}", advance=1
                ),
            ):
                self.add(record)
        return True


@dataclass(frozen=True, kw_only=True)
class Suite(Generic[R]):
    """One command: a folder with its results file, and what is shown of it.

    Attributes:
        out: The folder, held meanwhile against a second measurement.
        draw: Draws them, and returns the files written; raises ``ConfigError`` where it cannot.
        time_limit_s: Seconds after which a run reports that it is over; None for no limit.
        resumes: Runs that are on record are not run again; said where there are any.
        only_added: Show what this command added, without what was there before.
    """

    out: Path
    kind: type[R]
    show: Callable[[Sequence[R]], RenderableType]
    draw: Callable[[Sequence[R]], Sequence[Path]] = lambda records: ()
    time_limit_s: float | None = None
    resumes: bool = False
    file: str = "results.jsonl"
    only_added: bool = False

    def run(self, work: Callable[[SuiteRun[R]], bool]) -> int:
        """Measure, then show and draw what is on record.

        Returns:
            0; 1 when a run that is shown was wrong.

        Raises:
            ConfigError: The folder cannot be used, another run holds it, or a line of the file is malformed.
        """
        console = Console()
        make_folder("--out", self.out)
        results = self.out / self.file
        with only_run(self.out):
            say = partial(console.print, markup=False, soft_wrap=True)
            done = take_up(results, lambda path: read_records(path, self.kind), tell=say)
            if done and self.resumes:
                say(f"going on with {results}: runs that are in it are not run again")
            run = SuiteRun(results, done, console, self.time_limit_s)
            finished = work(run)
        records = run.added
        if not self.only_added:
            records = read_records(results, self.kind) if results.exists() else []
        print_whole(self.show(records))
        print_pictures(partial(self.draw, records), console)
        console.print(f"records in {results}", markup=False)
        if not finished:
            limit = f"{self.time_limit_s:.0f} s"
            console.print(f"stopped at the time limit of {limit}; run the same command again to go on")
        return 0 if all(record.is_good for record in records) else 1


def print_pictures(draw: Callable[[], Sequence[Path]], console: Console) -> None:
    """Draw, and say what was drawn, or why nothing was, as without matplotlib."""
    try:
        for path in draw():
            console.print(f"drew {path}", markup=False)
    except ConfigError as error:
        console.print(f"no figures: {error}", markup=False)


def new_progress(console: Console) -> Progress:
    """A progress bar with a count and the time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def rotated(names: Sequence[T], repeat: int) -> list[T]:
    """Names in the order of a repeat's turns: a different one is first each time."""
    shift = repeat % len(names)
    return [*names[shift:], *names[:shift]]
