"""``cacheflow demo``: a coding session on the bundled model; each evicted turn is answered under every policy.

Every number is measured: real weights, real source text, real bytes over a link throttled so that loading the prefix
takes as long as recomputing it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cacheflow.bench.options import make_folder
from cacheflow.bench.record import append_record, read_records
from cacheflow.bench.summary import summarise
from cacheflow.bench.table import console_tables
from cacheflow.errors import ConfigError
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy

if TYPE_CHECKING:
    from cacheflow.commands.demo_session import Demo

MODEL = "smollm2-135m"
TURN_CHARS = (5_200, 4_200, 0)
"""Characters of source a turn shows: some 1,300 tokens, then 1,100 more, then a question alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``demo``."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--model", default=MODEL, help="model folder or name (default: %(default)s)")
    parser.add_argument("--policy", action="append", dest="policies", metavar="NAME",
                        help="only this policy; may be repeated (default: all)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="alternations (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Play the session, print the answers and the table, draw the pictures."""
    policies = tuple(args.policies or RESTORE_POLICIES)
    for name in policies:
        make_policy(name)
    if args.repeats < 1:
        raise ConfigError(f"--repeats is {args.repeats}, must be at least 1")
    console, started_s = Console(), time.monotonic()
    make_folder("--out", args.out)
    results = args.out / "demo.jsonl"
    console.print(f"loading {args.model} (the first time it is converted, about 20 s)", markup=False)
    from cacheflow.commands.demo_session import Demo

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        demo = Demo.open(args.model, policies=policies, num_turns=len(TURN_CHARS))
        results.unlink(missing_ok=True)
        _play(demo, args.repeats, results, progress, console)
    console.print(console_tables(summarise(read_records(results))))
    _draw(demo, results, args.out, console)
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


def _draw(demo: Demo, results: Path, out: Path, console: Console) -> None:
    from cacheflow.bench.chart import draw_results
    from cacheflow.bench.timeline import draw_timelines

    try:
        written = draw_results(results, out)
        title = f"{demo.last_prefix_tokens:,} evicted tokens, then the first token, under every policy"
        written.append(draw_timelines(demo.timelines, out / "timeline.png", title=title))
    except ConfigError as error:
        console.print(f"no pictures: {error}", markup=False)
        return
    for path in written:
        console.print(f"drew {path}", markup=False)
