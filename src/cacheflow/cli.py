"""The command line: finds the command, hands over to its module, turns errors into one line and an exit code.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int``. Only the module of the command that was
called is imported, so that ``cacheflow plan`` needs no torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NoReturn, Protocol, cast

from cacheflow import __version__
from cacheflow.errors import CacheFlowError, ConfigError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

EXTRA_OF_PACKAGE = {
    "accelerate": "engine",
    "gguf": "engine",
    "safetensors": "engine",
    "torch": "engine",
    "transformers": "engine",
    "matplotlib": "plots",
}
"""Which extra brings a package that a command may find missing."""


class CommandModule(Protocol):
    """What a command's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's options."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit code; raises ``CacheFlowError`` for what the user can put right."""
        ...


@dataclass(frozen=True, slots=True)
class Command:
    """One command: the words that call it, the line that explains it, and its module.

    One that ``passes_on`` gets what stands after ``--`` unread, as ``args.passed_on``. One that is ``in_repository``
    serves this project alone, and is offered only where its module is there: the wheel leaves it out.
    """

    words: tuple[str, ...]
    help: str
    module: str
    passes_on: bool = False
    in_repository: bool = False

    @property
    def is_there(self) -> bool:
        """Whether its module can be imported, as far as that can differ."""
        try:
            return not self.in_repository or find_spec(self.module) is not None
        except ModuleNotFoundError:  # its folder is not there either
            return False


COMMANDS = (
    Command(("demo",), "play a coding session on the bundled model under every policy", "cacheflow.commands.demo"),
    Command(("calibrate",), "measure what a model and a store cost on this machine", "cacheflow.commands.calibrate"),
    Command(("plan",), "predict and draw a restoration on hardware you do not have", "cacheflow.commands.plan"),
    Command(("simulate",), "replay a trace on a simulated cluster under every policy", "cacheflow.commands.simulate"),
    Command(("serve",), "run stock vLLM's OpenAI server with CacheFlow", "cacheflow.commands.serve", passes_on=True),
    Command(("store", "stat"), "show what a store holds, by namespace", "cacheflow.commands.store.stat"),
    Command(("store", "verify"), "read and check every record of a store", "cacheflow.commands.store.verify"),
    Command(("store", "gc"), "free space: remove what is old, or too much", "cacheflow.commands.store.gc"),
    Command(("store", "clear"), "remove everything a store holds", "cacheflow.commands.store.clear"),
    Command(("store", "bench"), "measure a store's latency and bandwidth", "cacheflow.commands.store.bench"),
    Command(
        ("bench", "restore"), "restore one prefix under every policy, side by side", "cacheflow.bench.restore.command"
    ),
    Command(
        ("bench", "batch"), "restore many prefixes at once under every batch policy", "cacheflow.bench.batch.command"
    ),
    Command(
        ("bench", "vllm"),
        "restore inside stock vLLM, beside its own prefill and others",
        "cacheflow.bench.vllm.command",
    ),
    Command(
        ("bench", "ranks"),
        "restore on several ranks of vLLM at once, pipeline stages and tensor-parallel ranks",
        "cacheflow.bench.ranks.command",
    ),
    Command(
        ("bench", "stores"),
        "read stores as fast as they go, beside other clients",
        "cacheflow.bench.stores.command",
    ),
    Command(
        ("bench", "codecs"),
        "what codecs of stores do to a model's KV and to the tokens after it",
        "cacheflow.bench.codecs.command",
    ),
    Command(
        ("bench", "gpu"),
        "the first study on a GPU, in parts that watch the clock",
        "cacheflow.bench.gpu.command",
        in_repository=True,
    ),
    Command(
        ("bench", "figures"),
        "redraw the figures of the CacheFlow paper, and ours, by simulation",
        "cacheflow.bench.figures.command",
        in_repository=True,
    ),
    Command(("bench", "readme"), "write a measured table into a README", "cacheflow.bench.readme", in_repository=True),
)
GROUPS = {"store": "look after a store", "bench": "measure policies side by side, and show results"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message on standard error and leave with code 2."""
        self.exit(EXIT_ERROR, f"{self.prog}: error: {message}\n")


def build_parser(argv: Sequence[str], commands: Sequence[Command] = COMMANDS) -> argparse.ArgumentParser:
    """A parser that knows every command by name, and the options of the one that ``argv`` calls.

    Raises:
        ConfigError: It calls a command that this installation does not have.
    """
    parser = Parser(prog="cacheflow", description="KV-cache restoration: recompute and load at once, exactly.")
    parser.add_argument("--version", action="version", version=f"cacheflow {__version__}")
    top = parser.add_subparsers(metavar="COMMAND", required=True)
    groups = {
        name: top.add_parser(name, help=text, description=text, allow_abbrev=False).add_subparsers(
            metavar="COMMAND", required=True
        )
        for name, text in GROUPS.items()
        if any(command.words[0] == name for command in commands)
    }
    for command in commands:
        called = tuple(argv[: len(command.words)]) == command.words
        if not command.is_there:
            if called:
                raise ConfigError(
                    f"cacheflow {' '.join(command.words)} serves CacheFlow's own repository and is not in the "
                    "installed package: run it in a checkout (pip install --editable .)"
                )
            continue
        parent = groups[command.words[0]] if len(command.words) > 1 else top
        leaf = parent.add_parser(command.words[-1], help=command.help, description=command.help, allow_abbrev=False)
        if called:
            module = cast(CommandModule, importlib.import_module(command.module))
            module.add_arguments(leaf)
            leaf.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's error, 130 interrupted.

    Args:
        argv: Its words; None for those of this process, which SIGTERM then ends as an exception does, with code 143: a
            command that started servers ends them, and one that wrote probes into a store removes them.
    """
    if argv is None:
        signal.signal(signal.SIGTERM, _leave)
    words = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries below would tear ours
    try:
        args = parse(words)
        return int(args.run(args))
    except CacheFlowError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        extra = EXTRA_OF_PACKAGE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"this needs {error.name}: pip install 'cacheflow-kv[{extra}]'")
    except OSError as error:
        # Standard output: full, or closed by its reader (`| head`). Keep the interpreter's own flush at exit quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, BrokenPipeError) else _fail(str(error))
    except KeyboardInterrupt:
        print("cacheflow: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse(words: list[str]) -> argparse.Namespace:
    """The command that ``words`` ask for, with its arguments; exits where they are none."""
    passed_on: list[str] = []
    if "--" in words and any(each.passes_on and each.words == tuple(words[: len(each.words)]) for each in COMMANDS):
        index = words.index("--")
        words, passed_on = words[:index], words[index + 1 :]
    parser = build_parser(words)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{getattr(args, 'unknown_hint', '')}")
    args.passed_on = passed_on
    return args


def _leave(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would end what the first one began: removing, ending servers
    raise SystemExit(128 + number)


def _fail(message: str) -> int:
    print(f"cacheflow: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
