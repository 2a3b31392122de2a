"""Zeroes, in a shared library, the machine code for other GPUs than sm_90, so that the library compresses well.

usage: prune_cubins.py LIBRARY (changed in place)

The sections ``.nv_fatbin`` and ``__nv_relfatbin`` hold containers, each with the code of one source file for several
architectures. Source of their layout: the headers that ``cuobjdump`` reads (magic number, sizes, kind, architecture).
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEPT_ARCH = 90
MAGIC = 0xBA55ED50
PTX, CUBIN = 1, 2
SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
ELF64_LITTLE = b"\x7fELF\x02\x01"


class MalformedLibraryError(ValueError):
    """A file is no ELF library, or holds no code for GPUs where it should."""


@dataclass(frozen=True)
class Entry:
    """The code of one architecture: where its bytes stand in the file."""

    kind: int
    arch: int
    start: int
    num_bytes: int


def prune(data: bytearray) -> tuple[Counter[str], int]:
    """Zero what is not for ``KEPT_ARCH``, in place; a container without code for it keeps its PTX.

    Returns:
        Bytes of code by architecture as they were, and how many of them are left.

    Raises:
        MalformedLibraryError: There is no code for ``KEPT_ARCH`` at all: the library would be of no use.
    """
    found: Counter[str] = Counter()
    kept = 0
    cubins = 0
    for start, end in _sections(data):
        for container in _containers(data, start, end):
            has_cubin = any((entry.kind, entry.arch) == (CUBIN, KEPT_ARCH) for entry in container)
            cubins += has_cubin
            for entry in container:
                found[f"{'PTX' if entry.kind == PTX else 'sm'}_{entry.arch}"] += entry.num_bytes
                if (entry.kind, entry.arch) == (CUBIN, KEPT_ARCH) if has_cubin else entry.kind == PTX:
                    kept += entry.num_bytes
                else:
                    data[entry.start : entry.start + entry.num_bytes] = bytes(entry.num_bytes)
    if not cubins:
        raise MalformedLibraryError(f"no code for sm_{KEPT_ARCH} found; there is {dict(found) or 'none at all'}")
    return found, kept


def _sections(data: bytearray) -> Iterator[tuple[int, int]]:
    if data[:6] != ELF64_LITTLE:
        raise MalformedLibraryError("no 64-bit little-endian ELF file")
    (headers,) = struct.unpack_from("<Q", data, 40)
    size, number, names_index = struct.unpack_from("<HHH", data, 58)
    names = struct.unpack_from("<Q", data, headers + names_index * size + 24)[0]
    for index in range(number):
        at = headers + index * size
        (name,) = struct.unpack_from("<I", data, at)
        start, num_bytes = struct.unpack_from("<QQ", data, at + 24)
        if bytes(data[names + name : data.index(0, names + name)]) in SECTIONS:
            yield start, start + num_bytes


def _containers(data: bytearray, start: int, end: int) -> Iterator[list[Entry]]:
    while start + 16 <= end:
        magic, _, header_bytes, body_bytes = struct.unpack_from("<IHHQ", data, start)
        if magic != MAGIC:
            start += 8  # between two containers
            continue
        at, start = start + header_bytes, start + header_bytes + body_bytes
        entries = []
        while at < start:
            kind, _, header, num_bytes = struct.unpack_from("<HHIQ", data, at)
            (arch,) = struct.unpack_from("<I", data, at + 28)
            entries.append(Entry(kind, arch, at + header, num_bytes))
            at += header + num_bytes
        yield entries


def main(path: Path) -> int:
    """Prune a library in place, and say what was in it."""
    data = bytearray(path.read_bytes())
    try:
        found, kept = prune(data)
    except MalformedLibraryError as error:
        sys.stderr.write(f"prune_cubins: {path.name}: {error}\n")
        return 1
    path.write_bytes(data)
    shown = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sorted(found.items()))
    sys.stdout.write(f"{path.name}: {shown} MiB; {kept / 2**20:.1f} MiB are left\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
