"""``cacheflow demo``: a coding session on the bundled model; each evicted turn is answered under every policy.

Every number is measured: real weights, real source text, real bytes over a link throttled so that loading the prefix
takes as long as recomputing it.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cacheflow.bench.chart import draw_results
from cacheflow.bench.options import DEFAULT_MODEL, Flags, make_folder, option
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.records.suites import append_record, read_records
from cacheflow.bench.suite import print_pictures
from cacheflow.bench.summary import console_tables, summarise
from cacheflow.bench.table import print_whole
from cacheflow.bench.timeline import draw_timelines
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy

if TYPE_CHECKING:
    from cacheflow.commands.demo_session import Demo

TURN_CHARS = (5_200, 4_200, 0)
"""Characters of source a turn shows: some 1,300 tokens, then 1,100 more, then a question alone."""


@dataclass(frozen=True, kw_only=True)
class DemoFlags(Flags):
    """The options of ``demo``."""

    out: Path = option(Path("out/demo"), metavar="DIR")
    model: str = option(DEFAULT_MODEL, "model folder or name")
    policies: tuple[str, ...] | None = option(
        None, "only this policy; may be repeated (default: all)", flag="--policy", words="repeated", metavar="NAME"
    )
    repeats: int = option(1, "alternations", metavar="N", at_least=1)


add_arguments = DemoFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Play the session, print the answers and the table, draw the pictures."""
    flags = DemoFlags.of(args)
    policies = flags.policies or tuple(RESTORE_POLICIES)
    for name in policies:
        make_policy(name)
    console, started_s = Console(), time.monotonic()
    make_folder("--out", flags.out)
    results = flags.out / "demo.jsonl"
    console.print(f"loading {flags.model} (the first time it is converted, about 20 s)", markup=False)
    from cacheflow.commands.demo_session import Demo

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        demo = Demo.open(flags.model, policies=policies, num_turns=len(TURN_CHARS))
        results.unlink(missing_ok=True)
        _play(demo, flags.repeats, results, progress, console)
    records = read_records(results, RestoreRecord)
    print_whole(console_tables(summarise(records)))
    title = f"{demo.last_prefix_tokens:,} evicted tokens, then the first token, under every policy"
    print_pictures(
        lambda: [
            *draw_results(records, flags.out),
            draw_timelines(demo.timelines, flags.out / "timeline.png", title=title),
        ],
        console,
    )
    console.print(f"records in {results}; took {time.monotonic() - started_s:.0f} s", markup=False)
    if not demo.all_equal:
        console.print("NOT EXACT: a restored answer, its KV or its logits differed from the never-evicted session")
        return 1
    console.print("every answer, every KV cell and every logit equalled those of the session that was never evicted")
    return 0


def _play(demo: Demo, repeats: int, results: Path, progress: Progress, console: Console) -> None:
    task: TaskID = progress.add_task("measuring this machine", total=None)
    shown: list[str] = []

    def on_step(what: str, done: int, total: int) -> None:
        progress.update(task, description=what, completed=done, total=total)
        if not console.is_terminal and shown[-1:] != [what]:
            shown.append(what)
            console.print(f"  {what}")

    demo.calibrate(on_step)
    last = len(TURN_CHARS) - 1
    with closing(demo):
        for index, turn in enumerate(demo.turns(TURN_CHARS)):
            reply = demo.answer_resident(turn)
            console.print(
                f"[bold]turn {index + 1}[/bold]: {len(turn.tokens)} new tokens after {turn.history_tokens}; "
                f"the model answers: {demo.text(reply.tokens)!r}"
            )
            if index:
                alone = index == last  # the last turn is also restored without its new tokens
                for record in demo.restore_everywhere(turn, repeats=repeats, alone=alone, on_step=on_step):
                    append_record(results, record)
            demo.save()
            console.print(f"turn {index + 1}: KV saved, then evicted")
