"""Cost profiles of vLLM workers as JSON files, one for each identity."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from cacheflow.errors import ProfileError
from cacheflow.plan.costs import CostIdentity, CostTable
from cacheflow.vllm.startup.agreement import of_all_ranks


def profile_path(directory: Path, identity: CostIdentity, *, chunk_tokens: int, pass_tokens: int) -> Path:
    """Where a profile lives: ``<directory>/<device>/<model>-<digest of identity, chunk and pass>.json``."""
    text = json.dumps([asdict(identity), chunk_tokens, pass_tokens], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return directory / _safe(identity.device) / f"{_safe(identity.model)}-{digest}.json"


def save_costs(costs: CostTable, path: Path) -> None:
    """Write a profile so that a reader sees the old one or the new one, never a part.

    Raises:
        OSError: The folder cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        staging.write_text(json.dumps(costs.to_dict(), indent=1), encoding="utf-8")
        staging.replace(path)
    finally:
        with suppress(OSError):
            staging.unlink(missing_ok=True)


def load_costs(path: Path, identity: CostIdentity) -> CostTable:
    """Read a profile measured for exactly this identity; call on every tensor-parallel rank.

    Raises:
        ProfileError: The file is missing, malformed or of another identity, here or on another rank of the stage (all
            of them must calibrate then, since measuring holds collectives).
    """
    problem = ""
    try:
        costs = CostTable.from_dict(json.loads(path.read_text(encoding="utf-8")))
        costs.identity.require(identity)
    except (OSError, ValueError) as error:  # a ProfileError is a ValueError
        problem = str(error)
    if any(of_all_ranks(bool(problem))):
        raise ProfileError(f"profile {path}: {problem or 'another tensor-parallel rank has none'}")
    return costs


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "unknown"
