"""What else reads the same bytes: the system call by itself, and clients of a Redis server.

None of them looks at a byte that it reads, has a deadline, or can be cancelled.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cacheflow.bench.stores.objects import Objects
from cacheflow.bench.stores.ways import ReadWay, ThreadsWay
from cacheflow.stores.base import ByteBuffer, byte_view
from cacheflow.stores.directory import RecordDirectory, drop_front
from cacheflow.stores.record import HEADER_BYTES
from cacheflow.stores.shm import shm_folder
from cacheflow.stores.url import StoreUrl

_REDIS_PORT = 6379
_TIMEOUT_S = 30.0
_LINE_BYTES = 64
"""Received at once until the line before a value has ended."""


def rivals_of(url: StoreUrl, objects: Objects, *, num_reads: int) -> Iterator[tuple[str, ReadWay]]:
    """What is compared with a store, with its name, each opened when it is asked for; none where nothing else is.

    Args:
        url: Of the store, which holds the objects.
        objects: What is read.
        num_reads: Reads under way at once in the store.

    Raises:
        OSError: One cannot connect.
    """
    if url.scheme in ("file", "shm"):
        folder = Path(url.path) if url.scheme == "file" else shm_folder(url.host)
        yield "preadv", PreadvWay(folder, objects, num_reads=num_reads)
    if url.scheme == "redis":
        redis_py = "redis-py + hiredis" if find_spec("hiredis") else "redis-py"
        for num_connections in sorted({num_reads, 1}):
            yield "RESP", RespWay(url, objects, num_reads=num_connections)
            yield redis_py, RedisPyWay(url, objects, num_reads=num_connections)


class PreadvWay(ThreadsWay):
    """``os.preadv`` of the files of a file store, header and payload."""

    def __init__(self, folder: Path, objects: Objects, *, num_reads: int) -> None:
        """Look where the files are."""
        super().__init__(objects, num_reads=num_reads)
        directory = RecordDirectory(folder)
        self._paths = [directory.path(key) for key in objects.keys]
        self._headers = [memoryview(bytearray(HEADER_BYTES)) for _ in range(num_reads)]

    def read_one(self, index: int, thread: int) -> ByteBuffer:
        """See ``ThreadsWay.read_one``.

        Raises:
            OSError: The file is gone, or shorter than it was.
        """
        payload = byte_view(self._buffers[thread], writable=True)
        parts, offset = [self._headers[thread], payload], 0
        descriptor = os.open(self._paths[index], os.O_RDONLY | os.O_CLOEXEC)
        try:
            while parts:
                num_read = os.preadv(descriptor, parts, offset)
                if not num_read:
                    raise OSError(f"{self._paths[index]} ends after {offset} bytes")
                offset += num_read
                parts = drop_front(parts, num_read)
        finally:
            os.close(descriptor)
        return payload


def _names(objects: Objects) -> Sequence[bytes]:
    from cacheflow.stores.redis import PREFIX

    return [f"{PREFIX}{key.name}".encode() for key in objects.keys]


class RespWay(ThreadsWay):
    """``GET`` in Redis' protocol over plain sockets, received straight into the buffer: the least a client can do."""

    def __init__(self, url: StoreUrl, objects: Objects, *, num_reads: int) -> None:
        """Connect so many times; the password is that of the store.

        Raises:
            OSError: The server is not there, or refuses the user.
        """
        super().__init__(objects, num_reads=num_reads)
        self._keys = _names(objects)
        self._scratch = [bytearray(HEADER_BYTES + 2) for _ in range(num_reads)]
        address = url.host, url.port or _REDIS_PORT
        self._sockets: list[socket.socket] = []
        try:
            for _ in range(num_reads):
                self._sockets.append(socket.create_connection(address, timeout=_TIMEOUT_S))
                self._sockets[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.introduce(self._sockets[-1], url)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def introduce(connection: socket.socket, url: StoreUrl) -> None:
        """Say who asks, and of which database.

        Raises:
            OSError: The server refuses that.
        """
        password = os.environ.get("CACHEFLOW_REDIS_PASSWORD")
        orders: list[tuple[bytes, ...]] = [(b"SELECT", (url.path.strip("/") or "0").encode())]
        if password is not None:
            orders.insert(0, (b"AUTH", (url.username or "default").encode(), password.encode()))
        for order in orders:
            connection.sendall(_command(*order))
            line, _ = _answer(connection)
            if line != b"+OK":
                raise OSError(f"the server answered {line[:80]!r} to {order[0].decode()}")

    def read_one(self, index: int, thread: int) -> ByteBuffer:
        """See ``ThreadsWay.read_one``.

        Raises:
            OSError: The server has something else, or nothing.
        """
        connection, payload = self._sockets[thread], byte_view(self._buffers[thread], writable=True)
        connection.sendall(_command(b"GET", self._keys[index]))
        line, early = _answer(connection)
        if line != b"$%d" % (HEADER_BYTES + payload.nbytes):
            raise OSError(f"the server answered {line[:80]!r} to GET")
        scratch = memoryview(self._scratch[thread])
        scratch[: len(early)] = early
        for part in (scratch[len(early) : HEADER_BYTES], payload, scratch[HEADER_BYTES:]):
            _fill(connection, part)
        return payload

    def close(self) -> None:
        """See ``ReadWay.close``."""
        super().close()
        for each in self._sockets:
            each.close()


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def _answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """The first line of an answer, and what was received after it: less than a record's header."""
    received = b""
    while b"\r\n" not in received:
        more = connection.recv(_LINE_BYTES)
        if not more:
            raise ConnectionResetError("the server closed the connection")
        received += more
    line, _, early = received.partition(b"\r\n")
    return line, early


def _fill(connection: socket.socket, part: memoryview) -> None:
    while part.nbytes:
        num_received = connection.recv_into(part)
        if not num_received:
            raise ConnectionResetError("the server closed the connection")
        part = part[num_received:]


class RedisPyWay(ThreadsWay):
    """``get`` of redis-py, which returns bytes of its own."""

    def __init__(self, url: StoreUrl, objects: Objects, *, num_reads: int) -> None:
        """Make a client; it connects with the first read."""
        import redis

        super().__init__(objects, num_reads=num_reads)
        self._keys = _names(objects)
        self._client: Any = redis.Redis(
            host=url.host,
            port=url.port or _REDIS_PORT,
            db=int(url.path.strip("/") or "0"),
            username=url.username,
            password=os.environ.get("CACHEFLOW_REDIS_PASSWORD"),
            socket_timeout=_TIMEOUT_S,
        )

    def read_one(self, index: int, thread: int) -> ByteBuffer:
        """See ``ThreadsWay.read_one``.

        Raises:
            OSError: The server has nothing, or is gone.
        """
        import redis

        del thread
        try:
            record = self._client.get(self._keys[index])
        except redis.RedisError as error:
            raise OSError(str(error)) from error
        if record is None:
            raise OSError(f"{self._keys[index]!r} is not there")
        return memoryview(record)[HEADER_BYTES:]

    def close(self) -> None:
        """See ``ReadWay.close``."""
        super().close()
        self._client.close()
