"""Profiles: measured costs of one model and one link, as one JSON file by device and model."""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheflow.cache_root import cache_root
from cacheflow.errors import ConfigError, ProfileError
from cacheflow.json_text import parse_json, read_text
from cacheflow.plan.costs import CostTable
from cacheflow.plan.problem import LinkCost

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
GREATEST = 1e12
"""No duration, no count of tokens and no latency of a profile is as great."""
IDENTITY_TEXTS = ("model", "fingerprint", "device_type", "device", "dtype", "attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What calibration found.

    Attributes:
        costs: Compute costs, with what they were measured on.
        link: The store's link.
        chunk_tokens: Chunk the crossover was computed for.
        crossover_tokens: ``L_delta``: up to this length layer-wise restoration is predicted faster than token-wise.
        break_even_tokens: Shortest prefix for which restoring beats recomputing; None when none in range does.
        big_pass_s: Seconds of a whole prefix in one pass, by its length, for comparison with chunks.
        busy: What calibration saw of other work on the machine, for people; empty where it saw none.
    """

    costs: CostTable
    link: LinkCost
    chunk_tokens: int
    crossover_tokens: int
    break_even_tokens: int | None
    big_pass_s: dict[int, float]
    busy: str = ""

    def to_json(self) -> str:
        """The profile as indented JSON."""
        values = {
            "format_version": FORMAT_VERSION,
            "costs": self.costs.to_dict(),
            "link": {"bytes_per_s": self.link.bytes_per_s, "latency_s": self.link.latency_s},
            "chunk_tokens": self.chunk_tokens,
            "crossover_tokens": self.crossover_tokens,
            "break_even_tokens": self.break_even_tokens,
            "big_pass_s": {str(length): seconds for length, seconds in self.big_pass_s.items()},
            "busy": self.busy,
        }
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Read a profile back.

        Raises:
            ProfileError: Not a profile of this format, or its golden points are missed.
        """
        try:
            values = _parse(text)
            _check_numbers("profile", values)
            if values["format_version"] != FORMAT_VERSION:
                raise ProfileError(
                    f"profile format_version is {values['format_version']!r}, this release reads {FORMAT_VERSION}"
                )
            return cls(
                costs=CostTable.from_dict(values["costs"]),
                link=LinkCost(**values["link"]),
                chunk_tokens=int(values["chunk_tokens"]),
                crossover_tokens=int(values["crossover_tokens"]),
                break_even_tokens=values["break_even_tokens"],
                big_pass_s={int(length): float(seconds) for length, seconds in values["big_pass_s"].items()},
                busy=_text("busy", values.get("busy", "")),
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ProfileError(f"malformed profile ({type(error).__name__}: {error})") from error


def profile_path(*, device: str, model: str, dtype: str) -> Path:
    """Where a profile lives: ``profiles/<device>/<model>-<dtype>.json`` in the cache folder."""
    return cache_root() / "profiles" / _safe(device) / f"{_safe(model)}-{dtype}.json"


def require_place(path: Path) -> None:
    """Refuse a place that no profile can be written to, before minutes of measuring.

    Raises:
        ProfileError: Its folder cannot be created or written, or ``path`` is a folder itself.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ProfileError(f"profile {path} cannot be written: {error}") from error
    if path.is_dir():
        raise ProfileError(f"profile {path} cannot be written: it is a folder")


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile so that a reader sees the old one or the new one, never a part.

    Raises:
        ProfileError: The folder cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(profile.to_json(), encoding="utf-8")
        staging.replace(path)
    except OSError as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        raise ProfileError(f"profile {path} cannot be written: {error}") from error


def load_profile(path: Path) -> Profile:
    """Read a profile; one that was measured on a busy machine is warned of in the log.

    Raises:
        ProfileError: The file is missing, unreadable or no profile; the message names it.
    """
    try:
        text = read_text(path)
    except ConfigError as error:
        raise ProfileError(f"profile {path} cannot be read: {error}; make one with `cacheflow calibrate`") from error
    try:
        profile = Profile.from_json(text)
    except ConfigError as error:
        raise ProfileError(f"profile {path}: {error}") from error
    if profile.busy:
        logger.warning("profile %s is not to be relied on (%s): calibrate again", path, profile.busy)
    return profile


def _parse(text: str) -> Any:  # noqa: ANN401 -- whatever the file holds
    try:
        return parse_json(text)
    except ConfigError as error:
        raise ProfileError(f"malformed profile ({error})") from error


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise ProfileError(f"profile.{key} is {value!r}, must be a text")
    return value


def _check_numbers(place: str, value: object) -> None:
    """Refuse numbers that no calculation survives, wherever they stand, and names that are no texts.

    Raises:
        ProfileError: The message names the place.
    """
    if isinstance(value, dict):
        for key, each in value.items():
            if key in IDENTITY_TEXTS and place.endswith(".identity") and not isinstance(each, str):
                raise ProfileError(f"{place}.{key} is {each!r}, must be a text")
            _check_numbers(f"{place}.{key}", each)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _check_numbers(f"{place}[{index}]", each)
    elif isinstance(value, int | float) and not abs(value) < GREATEST and place != "profile.link.bytes_per_s":
        raise ProfileError(f"{place} must be finite and below {GREATEST:g}")


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "unknown"
