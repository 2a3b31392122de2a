"""A link between a store and its server that a test can slow down or cut."""

import socket
import threading
import time


class Proxy:
    """Passes bytes on to a server at its own pace, until it is told to pass on nothing more."""

    def __init__(self, port, *, up_bytes_per_s=float("inf")):
        """``up_bytes_per_s``: what it passes on to the server at most."""
        self.port, self.up_bytes_per_s, self.hangs, self.sockets = port, up_bytes_per_s, False, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                return
            self.sockets += [client, server]
            for source, sink, bytes_per_s in (client, server, self.up_bytes_per_s), (server, client, float("inf")):
                threading.Thread(target=self.pass_on, args=(source, sink, bytes_per_s), daemon=True).start()

    def pass_on(self, source, sink, bytes_per_s):
        try:
            while data := source.recv(1 << 18):
                time.sleep(len(data) / bytes_per_s)
                if not self.hangs:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        for each in (self.listener, *self.sockets):
            each.close()
