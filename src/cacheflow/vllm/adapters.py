"""Which LoRA adapter a request's KV was computed with: the digest of the adapter's files, on both sides of the engine.

A name or a path says nothing: a retrained adapter has both of its predecessor. The scheduler side names a request's KV
by the digest of the files as they are when the request comes (``AdapterFiles``). A worker notes the digest of what it
really loaded (``LoadedAdapters``), since vLLM keeps an adapter loaded while its files change, and loads it again when
it pleases; where the two differ, the worker neither saves nor lets a restoration stand.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PATTERNS = ("adapter_*", "new_embeddings*")
"""What vLLM reads of an adapter's folder is among these files; others, such as an optimizer's state, do not matter."""
SETTLED_S = 2.0
"""A file that changed less than this before it was hashed may change again within the resolution of its times: its
digest is not kept. (Git treats its index in the same way.)"""

_Signature = tuple[tuple[str, int, int, int, int], ...]
"""Name, size, inode and the two times of change of each file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What a request says of its adapter.

    Attributes:
        name: Its name; with ``path`` what vLLM's own prefix cache knows it by.
        number: vLLM's ``lora_int_id``.
        path: Folder, or name of a repository on the Hugging Face hub.
        stacked_experts: How vLLM is to read its experts (``is_3d_lora_weight``).
    """

    name: str
    number: int
    path: str
    stacked_experts: bool = False

    @classmethod
    def of(cls, lora: Any) -> Adapter:  # noqa: ANN401 -- vLLM's LoRARequest
        """What vLLM passes with a request."""
        return cls(
            name=lora.lora_name,
            number=lora.lora_int_id,
            path=lora.lora_path,
            stacked_experts=bool(getattr(lora, "is_3d_lora_weight", False)),
        )


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """An adapter by the content of its files: the one with which KV was, or is to be, computed.

    Attributes:
        number: vLLM's ``lora_int_id``.
        digest: Of its files.
        adapter: Where to load it from, for a worker that has not.
    """

    number: int
    digest: str
    adapter: Adapter | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """That a worker has loaded an adapter.

    Attributes:
        version: What it has loaded, with the adapter.
        replaced: Other files were loaded under the adapter's number, or its name and path, before.
        before_forward: Before the forward of the step that reports it: that computed nothing with the files before.
    """

    version: AdapterVersion
    replaced: bool
    before_forward: bool = False


class AdapterFiles:
    """Digests of adapters' files; files that did not change are not read again. One thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bool], tuple[_Signature, str]] = {}

    def version(self, adapter: Adapter) -> AdapterVersion | None:
        """The adapter by the content of its files as they are now; None where they cannot be read.

        Reads all of an adapter that is new or has changed, about a second a GB; otherwise asks for its files' times.
        """
        folder = local_folder(adapter.path)
        if folder is None:
            return None
        try:
            signature = _signature(folder)
            known = self._known.get((adapter.path, adapter.stacked_experts))
            if known is not None and known[0] == signature:
                return AdapterVersion(adapter.number, known[1], adapter)
            hashed_ns = time.time_ns()
            digest = _digest(folder, stacked_experts=adapter.stacked_experts)
            if not signature or _signature(folder) != signature:
                return None  # no adapter, or written while it was read
        except OSError:
            return None
        if max(max(times_ns) for _, _, _, *times_ns in signature) < hashed_ns - SETTLED_S * 1e9:
            self._known[adapter.path, adapter.stacked_experts] = signature, digest
        return AdapterVersion(adapter.number, digest, adapter)


class LoadedAdapters:
    """The adapters that a worker has loaded, by the content of the files they were loaded from. Worker's main thread.

    Attributes:
        known: Whether vLLM lets us see its loading; where it does not, no adapter's KV is saved or restored.
    """

    def __init__(self, runner: Any) -> None:  # noqa: ANN401 -- a vLLM model runner
        """Watch what the runner's adapter manager loads from now on; call before the first adapter is loaded."""
        self._files = AdapterFiles()
        self._loaded: dict[int, str] = {}
        self._loaded_from: dict[tuple[str, str], str] = {}
        self._loads: list[AdapterLoad] = []
        self._warned: set[int] = set()
        manager: Any = getattr(runner, "lora_manager", None)
        load = getattr(manager, "_load_adapter", None)
        self.known = load is not None
        if load is not None:
            manager._load_adapter = functools.partial(self._load, load)  # noqa: SLF001 -- its one place that reads files

    def _load(self, load: Any, request: Any) -> Any:  # noqa: ANN401 -- vLLM's LoRARequest in, its LoRAModel out
        adapter = Adapter.of(request)
        before = self._files.version(adapter)
        loaded = load(request)
        after = self._files.version(adapter)
        same = before is not None and before == after
        # Files that changed while they were read, or cannot be hashed: a version that nobody asks for.
        digest = after.digest if same and after is not None else secrets.token_hex(16)
        place = adapter.name, adapter.path
        known = {self._loaded.get(adapter.number, digest), self._loaded_from.get(place, digest)}
        self._loaded[adapter.number] = self._loaded_from[place] = digest
        version = AdapterVersion(adapter.number, digest, adapter)
        self._loads.append(AdapterLoad(version, replaced=known != {digest}))
        self._warned.discard(adapter.number)
        return loaded

    def take_loads(self) -> list[AdapterLoad]:
        """What was loaded since the last call."""
        loads, self._loads = self._loads, []
        return loads

    def contradicts(self, version: AdapterVersion | None) -> bool:
        """Whether what is loaded under the adapter's number is another version; an adapter not loaded yet is not."""
        if version is None:
            return False
        loaded = self._loaded.get(version.number)
        if self.known and loaded in (None, version.digest):
            return False
        if version.number not in self._warned:
            self._warned.add(version.number)
            logger.warning(
                "adapter %d is loaded from files that have changed since, or that cannot be read: its KV is neither "
                "saved nor restored until it is loaded again (load_inplace, or a restart)", version.number,
            )  # fmt: skip
        return True


def local_folder(path: str) -> Path | None:
    """Where vLLM reads an adapter from, without downloading anything; None where it is not on this machine."""
    folder = Path(path).expanduser()
    if folder.is_absolute() or folder.exists():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo_id=path, local_files_only=True))
    except (OSError, HFValidationError):  # LocalEntryNotFoundError is a FileNotFoundError
        return None


def _files(folder: Path) -> Iterator[Path]:
    for pattern in PATTERNS:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def _signature(folder: Path) -> _Signature:
    return tuple(
        (path.name, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        for path in _files(folder)
        for status in [path.stat()]
    )


def _digest(folder: Path, *, stacked_experts: bool) -> str:
    """SHA-256 over the names and contents of an adapter's files, 32 hex digits."""
    contents = []
    for path in _files(folder):
        with path.open("rb") as file:
            contents.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return hashlib.sha256(json.dumps([stacked_experts, contents]).encode()).hexdigest()[:32]
