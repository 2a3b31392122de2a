"""The result record: one restoration, timed and checked, as one line of ``results.jsonl``.

Tables and plots read only that file. A record cannot hold a time unless its run was checked for exactness, and nothing
prints a time whose check failed (``RestoreRecord.timed``).
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

from cacheflow.bench.results_file import append_line, read_lines
from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json

Environment = Mapping[str, str | int | float | None]

_TIMES = ("restore_s", "ttft_s", "bound_restore_s", "bound_ttft_s", "planning_s", "overhead_s")
_SHARES = ("compute_busy", "io_busy")
_POSITIVE_COUNTS = ("num_layers", "chunk_tokens", "layers_per_block")
_COUNTS = (
    "num_tokens",
    "suffix_tokens",
    "repeat",
    "recomputed_cells",
    "loaded_cells",
    "loaded_bytes",
    "wasted_bytes",
    "failed_loads",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardRecord:
    """What the never-slower guard chose for this run, and why."""

    choice: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRecord:
    """One restoration under one policy.

    Attributes:
        suite: Name of the study, such as ``"restore"`` or ``"perturbed"``.
        policy: Registered policy name.
        model: Name of the model or shape.
        device: ``"cpu"``, or the name of the accelerator.
        dtype: KV and weight dtype.
        num_tokens: Tokens of the prefix.
        suffix_tokens: New tokens behind it; 0 for a restoration alone.
        chunk_tokens: Tokens of a full chunk.
        num_layers: Decoder layers.
        link_bytes_per_s: Bandwidth of the link as configured; None when it was not throttled (``inf`` becomes None).
        load_compute_ratio: Time to load the whole prefix over the time to recompute it, as the study set it.
        repeat: Which alternation of the policies this run belongs to; runs with equal ``repeat`` ran side by side.
        restore_s: From the start of the restoration to the last prefix cell; None when the run was not timed.
        ttft_s: From the start of the restoration to the first token; None without a suffix or when not timed.
        bound_restore_s: The least possible ``restore_s``, from costs measured in the same process.
        bound_ttft_s: The least possible ``ttft_s``; None without a suffix.
        compute_busy: Share of ``restore_s`` in which compute worked on the prefix, 0 to 1.
        io_busy: Share of ``restore_s`` in which the link moved bytes, 0 to 1.
        recomputed_cells: Cells restored by compute.
        loaded_cells: Cells restored by I/O.
        wasted_bytes: Bytes moved for cells that were recomputed all the same.
        correct: Whether KV, logits and tokens of this run equalled the reference; None when nothing was checked.
        environment: Where it ran, see ``environment()``.
        loaded_bytes: Bytes moved over the link in all.
        failed_loads: Reads that were missing, corrupt, late or failing.
        planning_s: Time to make the plan; part of ``restore_s``.
        overhead_s: Executor time that was neither compute nor waiting for the link.
        perturbation: What was made wrong on purpose, such as ``{"cost_error": 2.0}``; empty for a clean run.
        guard: The guard's choice; None for policies without one.
        objective: What the plan minimised, ``"ttft"`` or ``"restore"``.
        fingerprint: Of the model's weights; two of one name are told apart by it. Empty in records that do not know it.
        layers_per_block: Layers of one block, which is one object of the store per chunk.
        store: Where the prefix was saved.
    """

    suite: str
    policy: str
    model: str
    device: str
    dtype: str
    num_tokens: int
    suffix_tokens: int
    chunk_tokens: int
    num_layers: int
    link_bytes_per_s: float | None
    load_compute_ratio: float
    repeat: int
    restore_s: float | None
    ttft_s: float | None
    bound_restore_s: float | None
    bound_ttft_s: float | None
    compute_busy: float | None
    io_busy: float | None
    recomputed_cells: int
    loaded_cells: int
    wasted_bytes: int
    correct: bool | None
    environment: Environment
    loaded_bytes: int = 0
    failed_loads: int = 0
    planning_s: float | None = None
    overhead_s: float | None = None
    perturbation: Mapping[str, float] = field(default_factory=dict)
    guard: GuardRecord | None = None
    objective: str = "ttft"
    fingerprint: str = ""
    layers_per_block: int = 1
    store: str = "memory"

    def __post_init__(self) -> None:
        """Refuse a time without a check, and numbers no run can have.

        Raises:
            ConfigError: ``restore_s`` or ``ttft_s`` is set but ``correct`` is no outcome of a check; a time is not
                above 0; a count is negative; a busy share is outside 0 to 1.
        """
        for key in ("suite", "policy", "model", "device", "dtype", "objective", "store"):
            _require(bool(getattr(self, key)), key, getattr(self, key), "a name")
        timed = self.restore_s is not None or self.ttft_s is not None
        if timed and not isinstance(self.correct, bool):
            raise ConfigError(f"a record cannot hold a time without a check: correct is {self.correct!r}")
        for key in _COUNTS:
            _require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        for key in _POSITIVE_COUNTS:
            _require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in _TIMES:
            value = getattr(self, key)
            _require(value is None or (math.isfinite(value) and value >= 0), key, value, "finite and 0 or more")
        for key in _SHARES:
            value = getattr(self, key)
            _require(value is None or 0 <= value <= 1, key, value, "between 0 and 1")
        if self.link_bytes_per_s == math.inf:  # JSON has no infinity
            object.__setattr__(self, "link_bytes_per_s", None)
        ratio, link = self.load_compute_ratio, self.link_bytes_per_s
        _require(math.isfinite(ratio) and ratio >= 0, "load_compute_ratio", ratio, "finite and 0 or more")
        _require(link is None or (math.isfinite(link) and link > 0), "link_bytes_per_s", link, "above 0, or None")

    @property
    def timed(self) -> bool:
        """Whether the times of this record may be shown."""
        return self.correct is True and self.restore_s is not None

    def to_json(self) -> str:
        """One line of ``results.jsonl``, without the newline."""
        return json.dumps(asdict(self), allow_nan=False, sort_keys=False)

    @classmethod
    def from_json(cls, line: str) -> RestoreRecord:
        """Read one line back.

        Raises:
            ConfigError: The line is no JSON object, lacks a field, has an unknown one, or holds an impossible value.
        """
        values = parse_json(line)
        if not isinstance(values, dict):
            raise ConfigError(f"a record is a JSON object, not {type(values).__name__}")
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise ConfigError(f"unknown fields {unknown}")
        try:
            if values.get("guard") is not None:
                values["guard"] = GuardRecord(**values["guard"])
            return cls(**values)
        except (TypeError, OverflowError) as error:
            raise ConfigError(str(error)) from error


def append_record(path: Path, record: RestoreRecord) -> None:
    """Append one record in one write, so that runs may share the file and a crash leaves whole lines.

    Raises:
        ConfigError: The folder does not exist or the file cannot be written.
    """
    append_line(path, record.to_json())


def read_records(path: Path) -> list[RestoreRecord]:
    """Every record of a results file, in the order they were written; blank lines are skipped.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed; the message names the line.
    """
    return read_lines(path, RestoreRecord.from_json)


def environment(*, accelerator: str | None = None, num_threads: int | None = None) -> dict[str, str | int | None]:
    """What a reader needs to judge a time: processor, threads, versions. Never a host name, user or path.

    Args:
        accelerator: Name of the device that computed, when it was not the CPU.
        num_threads: Compute threads; asked from torch when it is loaded and this is None.
    """
    torch = sys.modules.get("torch")
    if num_threads is None and torch is not None:
        num_threads = torch.get_num_threads()
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": num_threads,
        "accelerator": accelerator,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cacheflow": _version("cacheflow-kv"),
        "numpy": _version("numpy"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"record field {key} is {value!r}, must be {allowed}")
