"""A model's ``config.json`` where it lies on this machine: in the model's folder, or in Hugging Face's cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json, read_text

CONFIG_FILE = "config.json"
_OTHER_CONFIGS = ("params.json",)
"""Mistral's own format, which vLLM reads as well."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def local_config(
    model: str, *, revision: str | None = None, environment: Mapping[str, str]
) -> Mapping[str, Any] | None:
    """The parsed file of a folder or a name on the hub; None where this machine has none to read: vLLM then decides.

    ``revision`` is a branch, tag or commit of the hub's repository, None its main branch; ``environment`` says where
    Hugging Face's cache is.

    Raises:
        ConfigError: The model is a folder that holds no model, or whose file is no JSON object.
    """
    file, in_folder = _file_of(model, revision=revision, environment=environment), Path(model).is_dir()
    if file is None or not file.is_file():
        if in_folder and not any((Path(model) / name).is_file() for name in _OTHER_CONFIGS):
            raise ConfigError(f"the folder {model} holds no model: it has no {CONFIG_FILE}")
        return None
    try:
        values = parse_json(read_text(file))
        if not isinstance(values, dict):
            raise ConfigError("it is no JSON object")
    except ConfigError as error:
        if in_folder:
            raise ConfigError(f"{file} cannot be used: {error}") from error
        return None
    return values


def local_folder(model: str, *, revision: str | None, environment: Mapping[str, str]) -> Path | None:
    """The folder with a model's files; None where this machine has none. Arguments as those of ``local_config``."""
    file = _file_of(model, revision=revision, environment=environment)
    return file.parent if file is not None and file.parent.is_dir() else None


def _file_of(model: str, *, revision: str | None, environment: Mapping[str, str]) -> Path | None:
    folder = Path(model)
    if folder.is_dir():
        return folder / CONFIG_FILE
    if not _REPOSITORY.fullmatch(model) or environment.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return None
    repository = _hub_cache(environment) / f"models--{model.replace('/', '--')}"
    name = revision or "main"
    try:
        commit = (repository / "refs" / name).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = name  # a revision may be a commit
    return repository / "snapshots" / commit / CONFIG_FILE


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """Source: the environment variables of ``huggingface_hub``."""
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := environment.get(key):
            return Path(value).expanduser()
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"
