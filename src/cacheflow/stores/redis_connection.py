"""Connections to a Redis server that move one record without a copy of their own.

redis-py opens them, with TLS and authentication, and sends every other command. Its own way of reading a value costs
two more copies of it.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Sequence

import redis

_LINE_BYTES = 64
"""Read at a time until the line before the value has ended; what comes along of the value is copied."""

_MAX_LINE_BYTES = 4096
_SCRATCH_BYTES = 1 << 16


class RefusedCommand(OSError):
    """The server answered with an error; the connection can be used on."""


class RecordTransfers:
    """What is mixed into the connections of redis-py: one exchange at a time, on the socket they opened.

    A socket's timeout bounds each wait for the server; ``limit_s`` bounds the whole exchange, so that a server that
    trickles does not hold a buffer for ever, and one behind a slow link has more time than for a single wait. After any
    other error than ``RefusedCommand`` the connection must be dropped: part of an answer may be left in it.
    """

    _sock: socket.socket

    def get_record(
        self, name: bytes, header: memoryview, payload: memoryview, *, limit_s: float, expires_s: int | None = None
    ) -> int | None:
        """Receive a value into two buffers; with ``expires_s`` the server removes it that long from now.

        Returns:
            Bytes of the value after ``header``; None where there is none. A value longer than the buffers fills
            ``header`` alone, one shorter than ``header`` nothing.

        Raises:
            OSError: The server refused, is gone, or is too slow.
        """
        until_s = time.monotonic() + limit_s
        words = (b"GET", name) if expires_s is None else (b"GETEX", name, b"EX", b"%d" % expires_s)
        self._send(b"*%d\r\n" % len(words) + b"".join(map(_bulk, words)), until_s)
        line, early = self._reply(until_s)
        if line == b"$-1":
            return None
        if not (line.startswith(b"$") and line[1:].isdigit()):
            raise OSError(errno.EPROTO, f"the server answered {line[:80]!r} to {words[0].decode()}")
        num_bytes = int(line[1:])
        num_rest = num_bytes - header.nbytes
        if num_rest < 0:
            self._skip(num_bytes + 2 - len(early), until_s)
        elif num_rest <= payload.nbytes:
            self._fill((header, payload[:num_rest], memoryview(bytearray(2))), early, until_s)
        else:
            self._fill((header,), early, until_s)
            self._skip(num_rest + 2, until_s)
        return num_rest

    def set_record(
        self,
        name: bytes,
        parts: Sequence[memoryview],
        *,
        only_new: bool,
        limit_s: float,
        expires_s: int | None = None,
    ) -> bool:
        """Send a value in parts; with ``expires_s`` the server removes it that long from now.

        Returns:
            Whether it was set; with ``only_new`` it is not where there is one already.

        Raises:
            OSError: The server refused (``ENOSPC``: it is full), is gone, or is too slow. Unless it refused, the value
                may have been set.
        """
        until_s = time.monotonic() + limit_s
        after = [b"NX"] if only_new else []
        after += [] if expires_s is None else [b"EX", b"%d" % expires_s]
        before = [b"*%d\r\n" % (3 + len(after)), _bulk(b"SET"), _bulk(name)]
        before.append(b"$%d\r\n" % sum(part.nbytes for part in parts))
        self._send(b"".join((*before, parts[0])), until_s)  # the header: one packet less for a copy of 4,096 bytes
        for part in parts[1:]:
            self._send(part, until_s)
        self._send(b"\r\n" + b"".join(map(_bulk, after)), until_s)
        line, _ = self._reply(until_s)
        if line not in (b"+OK", b"$-1"):
            raise OSError(errno.EPROTO, f"the server answered {line[:80]!r} to SET")
        return line == b"+OK"

    def _send(self, data: bytes | memoryview, until_s: float) -> None:
        """Not ``sendall``, which gives the whole of it no more time than one wait."""
        left = memoryview(data)
        while left.nbytes:
            left = left[self._counted(self._sock.send(left), until_s) :]

    def _reply(self, until_s: float) -> tuple[bytes, bytes]:
        """The first line of an answer, and what was received after it."""
        received = b""
        while (end := received.find(b"\r\n")) < 0:
            if len(received) > _MAX_LINE_BYTES:
                raise OSError(errno.EPROTO, f"the server answered {received[:80]!r}...")
            more = self._sock.recv(_LINE_BYTES)
            self._counted(len(more), until_s)
            received += more
        line = received[:end]
        if line.startswith(b"-"):
            text = line[1:].decode(errors="replace")
            raise RefusedCommand(errno.ENOSPC if text.startswith("OOM") else errno.EIO, text)
        return line, received[end + 2 :]

    def _fill(self, parts: Sequence[memoryview], early: bytes, until_s: float) -> None:
        """Fill buffers with ``early``, which is shorter than the first, and what the server sends."""
        parts[0][: len(early)] = early
        for part in (parts[0][len(early) :], *parts[1:]):
            left = part
            while left.nbytes:
                left = left[self._counted(self._sock.recv_into(left), until_s) :]

    def _skip(self, num_bytes: int, until_s: float) -> None:
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        while num_bytes > 0:
            num_bytes -= self._counted(self._sock.recv_into(scratch[:num_bytes]), until_s)

    @staticmethod
    def _counted(num_bytes: int, until_s: float) -> int:
        """What one call moved, if that was in time and anything."""
        if not num_bytes:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if time.monotonic() > until_s:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return num_bytes


def _bulk(word: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(word), word)


class PlainConnection(RecordTransfers, redis.Connection):
    """Over TCP."""


class TlsConnection(RecordTransfers, redis.SSLConnection):
    """Over TLS."""
