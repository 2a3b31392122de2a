"""A TCP relay that paces one direction: a slow link in front of a server that has no bandwidth option."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import suppress

from cacheflow.bench.vllm.rivals.pacing import Pacer

PIECE_BYTES = 64 * 1024
"""Of a pass; at 10 MB/s a piece takes 6.5 ms, so small messages are not held up by the pace for long."""


class Relay:
    """Listens on a free local port and passes every byte on to a server, its answers at the speed of a link.

    What clients send passes at once: only the server's bytes (loads) are slowed down, by one pace for all
    connections. Threads: one accepts, two a connection; all end with ``close``.
    """

    def __init__(self, server_port: int, *, bytes_per_s: float) -> None:
        """Start to listen.

        Raises:
            ConfigError: The bandwidth is not above 0.
        """
        self._pacer = Pacer(bytes_per_s)
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        self._start(self._accept)

    @property
    def num_open(self) -> int:
        """Connections that are open, counted at both ends."""
        with self._lock:
            return len(self._open)

    @property
    def port(self) -> int:
        """Where clients connect."""
        return int(self._listener.getsockname()[1])

    @property
    def answered_bytes(self) -> int:
        """Bytes passed from the server to its clients so far."""
        return self._pacer.passed_bytes

    def close(self) -> None:
        """Stop listening, cut every connection and wait for the threads."""
        with self._lock:
            self._closed = True
            ends = [self._listener, *self._open]
        for end in ends:
            _shut(end)
            end.close()
        for thread in self._threads:
            thread.join()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="relay", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                server = socket.create_connection(("127.0.0.1", self._server_port))
            except OSError:
                client.close()  # as a server that is not there would
                continue
            with self._lock:
                if self._closed:
                    client.close()
                    server.close()
                    return
                self._open |= {client, server}
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._pump, client, server, None)
            self._start(self._pump, server, client, self._pacer)

    def _pump(self, source: socket.socket, sink: socket.socket, pacer: Pacer | None) -> None:
        try:
            while True:
                waiting = bool(select.select([source], [], [], 0)[0])  # it queued after the piece before
                piece = source.recv(PIECE_BYTES)
                if not piece:
                    break
                if pacer is not None:
                    there_since_s = float("-inf") if waiting else time.perf_counter()
                    pacer.pass_bytes(len(piece), there_since_s=there_since_s)
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)  # the other direction may go on
        except (OSError, ValueError):  # ValueError: closed while it was polled
            _shut(source)
            _shut(sink)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):  # never connected, or the peer was first
        end.shutdown(socket.SHUT_RDWR)
