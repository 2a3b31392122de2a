"""Options of a command as a dataclass: field, type, default, help and limits in one place; the flags are made of it."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from cacheflow.errors import ConfigError
from cacheflow.plan.cell_sizes import chunk_tokens_of

DEFAULT_MODEL = "smollm2-135m"
"""What is restored unless ``--model`` or ``--shape`` says otherwise."""
DTYPES = ("bfloat16", "float32", "float16")
Value = Any
"""Of an option: what its field's type says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """What a field of options says besides its type and default.

    Attributes:
        help: For ``--help``; the default is added.
        flag: On the command line; None: from the field's name. Empty: no flag.
        parse: Makes a value of a word; None: by the field's type.
        shown: The default in ``--help``, where it is another than the field's; empty for none.
        known: Names that are allowed, and what one is called in a message, as in ``("policy", ...)``.
        finite: ``inf`` is refused.
        one_of: Name of a group of flags of which exactly one is given.
        words: How the flag takes words: ``"one"``, ``"positional"``, ``"positionals"`` or ``"repeated"``.
    """

    help: str = ""
    flag: str | None = None
    metavar: str | None = None
    parse: Callable[[str], Value] | None = None
    shown: str | None = None
    choices: Collection[str] | None = None
    known: tuple[str, Collection[str]] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    finite: bool = False
    one_of: str = ""
    words: str = "one"

    def allows(self, value: float) -> bool:
        """Whether a number is within the limits."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and not (self.finite and not math.isfinite(value))
        )

    @property
    def limits(self) -> str:
        """What is allowed, in words."""
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least:g} and {self.at_most:g}"
        parts = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        parts += [f"above {self.above:g}"] if self.above is not None else []
        parts += ["finite"] if self.finite else []
        return " and ".join(parts)


def option(default: Value = MISSING, help: str = "", **knob: Value) -> Any:  # noqa: ANN401 -- a field of any type
    """A field of a class of flags; see ``Knob``."""
    return field(default=default, metadata={"knob": Knob(help=help, **knob)})


class Flags:
    """Base of a command's flags, which are frozen keyword-only dataclasses.

    ``__post_init__`` refuses values outside the limits of their fields.
    """

    def __post_init__(self) -> None:
        """Check every field by itself.

        Raises:
            ConfigError: Names the flag, the value and what is allowed.
        """
        for name, knob in knobs(type(self)).items():
            _check(flag_of(name, knob), getattr(self, name), knob)

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser, *, given_only: bool = False) -> None:
        """Add a flag for every field that has one.

        Args:
            parser: Gets them.
            given_only: Flags that are not given leave nothing, so that something else may stand in for them.
        """
        hints = get_type_hints(cls)
        groups: dict[str, Any] = {"": parser}
        defaults = {each.name: each.default for each in fields(cls)}  # type: ignore[arg-type]
        for name, knob in knobs(cls).items():
            if knob.flag == "":
                continue
            if knob.one_of not in groups:
                groups[knob.one_of] = parser.add_mutually_exclusive_group(required=True)
            arguments = _arguments(name, knob, hints[name], defaults[name])
            if given_only:
                arguments["default"] = argparse.SUPPRESS
            names = (name,) if knob.words.startswith("positional") else (flag_of(name, knob),)
            groups[knob.one_of].add_argument(*names, **arguments)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """The options given as flags.

        Raises:
            ConfigError: A value is wrong, or two contradict each other; names them.
        """
        given = {name: getattr(args, name) for name in knobs(cls) if hasattr(args, name)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def knobs(cls: type) -> dict[str, Knob]:
    """What each field of a class of flags says, by name."""
    return {each.name: each.metadata["knob"] for each in fields(cls) if "knob" in each.metadata}


def flag_of(name: str, knob: Knob) -> str:
    """The flag of a field: ``--chunk-tokens`` of ``chunk_tokens`` unless it says another."""
    return knob.flag or "--" + name.replace("_", "-")


def _arguments(name: str, knob: Knob, hint: Any, default: Value) -> dict[str, Any]:  # noqa: ANN401 -- a type
    kind = next(each for each in get_args(hint) if each is not type(None)) if _is_optional(hint) else hint
    if kind is bool:
        return {"dest": name, "action": "store_true", "help": knob.help}
    arguments: dict[str, Any] = {"help": _help(knob, default), "metavar": knob.metavar, "choices": knob.choices}
    if knob.words != "repeated":
        arguments["type"] = knob.parse or _parser_of(kind)
    if knob.words == "positionals":
        arguments |= {"nargs": "*", "type": str, "default": ()}
    if knob.words.startswith("positional"):
        return arguments
    arguments |= {"action": "append"} if knob.words == "repeated" else {}
    required = default is MISSING
    return arguments | {"dest": name, "default": None if required else default, "required": required}


def _help(knob: Knob, default: Value) -> str:
    shown = knob.shown
    if shown is None and default is not MISSING and default is not None:
        listed = default if isinstance(default, tuple) else (default,)
        shown = ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in listed)
    text = knob.help if not shown else f"{knob.help} (default: {shown})".strip()
    return text.replace("%", "%%")


def _is_optional(hint: Any) -> bool:  # noqa: ANN401 -- a type
    return get_origin(hint) is UnionType


def _parser_of(kind: Any) -> Callable[[str], Value]:  # noqa: ANN401 -- a type
    if get_origin(kind) is tuple:
        return {int: int_list, float: float_list, str: name_list}[get_args(kind)[0]]
    found: Callable[[str], Value] = kind
    return found


def _check(flag: str, value: Value, knob: Knob) -> None:
    """Refuse what the limits or the known names of an option do not allow; None is no value."""
    if value is None:
        return
    many = isinstance(value, tuple)
    values = value if many else (value,)
    if knob.known is not None:
        what, known = knob.known
        if not values:
            raise ConfigError(f"{flag} is empty; known: {', '.join(known)}")
        for each in values:
            if each not in known:
                raise ConfigError(f"{flag}: {what} {each!r} is not known; known are {', '.join(known)}")
    elif knob.limits and not (values and all(map(knob.allows, values))):
        said = f"{flag} {','.join(map(str, value))}" if many else f"{flag} is {value},"
        raise ConfigError(f"{said} must be {knob.limits}")


@dataclass(frozen=True, kw_only=True)
class EmbeddedFlags(Flags):
    """What every benchmark of the embedded engine on this machine is asked."""

    out: Path = option(help="folder for results.jsonl and figures", metavar="DIR")
    model: str | None = option(None, f"model folder or name (default: {DEFAULT_MODEL})", metavar="NAME")
    shape: str | None = option(None, "random weights of this shape instead of a model (see cacheflow plan)")
    device: str = option("cpu", choices=("cpu", "cuda"))
    dtype: str = option("bfloat16", choices=DTYPES)
    suffix: int = option(256, "new tokens", metavar="N", at_least=1)
    flash3: bool = option(False, "compute attention by FlashAttention-3 (CUDA, package fa3-fwd)")
    chunk: int | None = option(None, "chunk tokens (default: 512; 1024 with --device cuda)", metavar="N", at_least=1)
    repeats: int = option(3, "alternations", metavar="N", at_least=1)
    time_limit_s: float | None = option(
        None, "stop after this long; the same command goes on where it stopped", metavar="S", above=0
    )

    def __post_init__(self) -> None:
        """Check each value, and that a model or a shape is given, not both.

        Raises:
            ConfigError: Names the options.
        """
        super().__post_init__()
        if self.model is not None and self.shape is not None:
            raise ConfigError("--model and --shape both say what is restored: drop one of them")
        if self.flash3 and self.device == "cpu":
            raise ConfigError("--flash3 is of --device cuda: drop it")

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return chunk_tokens_of(self.device, self.chunk)


@dataclass(frozen=True, kw_only=True)
class ServedFlags(Flags):
    """What every benchmark of a prefix inside vLLM is asked."""

    out: Path = option(help="folder for results.jsonl, figures, logs", metavar="DIR")
    ratios: tuple[float, ...] = option(
        (0.5, 1.0, 2.0), "load time over prefill time of one rank", metavar="R,R,...", above=0, finite=True
    )
    tokens: int = option(4096, "prefix", metavar="N", at_least=1)
    suffix: int = option(37, "new tokens", metavar="N", at_least=1)
    chunk: int = option(512, "tokens of a step", metavar="N", at_least=1)
    repeats: int | None = option(3, "rounds per ratio", metavar="N", at_least=1)
    compiled: bool = option(False, "let vLLM compile the model (default: eager)")
    vllm_python: Path = option(Path(sys.executable), "interpreter that has vLLM", metavar="PATH", shown="this one")

    def __post_init__(self) -> None:
        """Check each value, and that the prefix is whole chunks.

        Raises:
            ConfigError: Names the options.
        """
        super().__post_init__()
        if self.tokens % self.chunk:
            raise ConfigError(
                f"--tokens {self.tokens} must be a multiple of --chunk {self.chunk}: only whole chunks are saved"
            )


T = TypeVar("T")


def _listed(text: str, kind: Callable[[str], T], what: str) -> tuple[T, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of {what}") from error


def float_list(text: str) -> tuple[float, ...]:
    """``0.5,1,inf`` as floats.

    Raises:
        argparse.ArgumentTypeError: Not a comma-separated list of numbers.
    """
    return _listed(text, float, "numbers")


def int_list(text: str) -> tuple[int, ...]:
    """``512,4096`` as integers.

    Raises:
        argparse.ArgumentTypeError: Not a comma-separated list of whole numbers.
    """
    return _listed(text, int, "whole numbers")


def name_list(text: str) -> tuple[str, ...]:
    """``a,b`` as names, without repeats."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def make_folder(flag: str, folder: Path) -> None:
    """Create the folder that an option names, parents included; one that is there is taken as it is.

    Raises:
        ConfigError: It cannot be created, or nothing can be written into it; names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # now, not after the work
            probe.write(b"-")
    except OSError as error:
        raise ConfigError(f"{flag} {folder} cannot be used: {error}") from error
