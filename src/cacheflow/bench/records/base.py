"""What all records share: a suite, limits that are part of the types, and their lines.

A record cannot hold a time unless its run was checked for exactness, and nothing shows a time whose check failed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Self, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from cacheflow.errors import ConfigError

Environment = Mapping[str, str | int | float | None]
Name = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
NotBelow0 = Annotated[float, Meta(ge=0)]
Seconds = NotBelow0
Above0 = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

T = TypeVar("T")


class BenchRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all records share: a suite, limits that are part of the types, and their lines."""

    suite: Name

    def __post_init__(self) -> None:
        """Refuse numbers outside the limits of their types."""
        for name, meta in _limits(type(self)):
            value = getattr(self, name)
            if value is not None and not _is_within(value, meta):
                raise ConfigError(f"record field {name} is {value!r}, must be {_in_words(meta)}")

    @property
    def is_good(self) -> bool:
        """Whether the run was checked and right, where runs are checked."""
        return True

    def to_json(self) -> str:
        """One line, without the newline."""
        return msgspec.json.format(msgspec.json.encode(self), indent=0).decode()

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read one line back.

        Raises:
            ConfigError: It is no JSON object, lacks a field, has an unknown one, or holds an impossible value.
        """
        return decode(line, cls)


class RunRecord(BenchRecord, frozen=True, kw_only=True):
    """A run on a real model.

    Attributes:
        device: ``"cpu"``, or the name of the accelerator.
        suffix_tokens: New tokens after the prefix; 0 for a restoration alone.
        link_bytes_per_s: Bandwidth of the link as configured; None when it was not throttled (``inf`` becomes None).
        load_compute_ratio: Time to load everything over the time to recompute it, as the study set it.
        repeat: Which alternation of the policies this run belongs to; runs with equal ``repeat`` ran side by side.
        correct: Whether KV, logits and tokens equalled the reference; None when nothing was checked.
        fingerprint: Of the model's weights; two of one name are told apart by it. Empty in records that do not know it.
    """

    policy: Name
    model: Name
    device: Name
    dtype: Name
    suffix_tokens: Count
    chunk_tokens: Positive
    num_layers: Positive
    link_bytes_per_s: Above0 | None
    load_compute_ratio: Seconds
    repeat: Count
    correct: bool | None
    environment: Environment
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Check the limits; an infinite bandwidth becomes None, because JSON has no infinity."""
        if self.link_bytes_per_s == math.inf:
            force_setattr(self, "link_bytes_per_s", None)
        super().__post_init__()

    @property
    def is_good(self) -> bool:
        """Whether the run was checked and equal to the reference."""
        return self.correct is True


def decode(line: str, kind: type[T]) -> T:
    """Read one line.

    Raises:
        ConfigError: It is no JSON object, or no such record.
    """
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"malformed record: {error}") from error
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise ConfigError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError("not readable as JSON: nested too deeply") from error


@cache
def _limits(kind: type[BenchRecord]) -> tuple[tuple[str, Meta], ...]:
    """The fields of a record whose types have limits."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        (name, part.__metadata__[0])
        for name, hint in hints.items()
        for part in (hint, *get_args(hint))
        if get_origin(part) is Annotated
    )


def _is_within(value: Any, meta: Meta) -> bool:  # noqa: ANN401 -- the type of a field
    if meta.min_length is not None:
        return len(value) >= meta.min_length
    above = meta.gt is None or value > meta.gt
    return math.isfinite(value) and above and (meta.ge is None or value >= meta.ge) and not value > (meta.le or value)


def _in_words(meta: Meta) -> str:
    if meta.min_length is not None:
        return "a name"
    if meta.le is not None:
        return f"between {meta.ge:g} and {meta.le:g}"
    return f"finite and {'above 0' if meta.gt is not None else f'{meta.ge:g} or more'}"
