"""Records in a Redis or Valkey server, one string each."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar, Unpack

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cacheflow.errors import StoreError
from cacheflow.stores.base import PutOutcome
from cacheflow.stores.bounded import Bounds
from cacheflow.stores.breaker import Breaker
from cacheflow.stores.keys import ObjectKey, namespace_of
from cacheflow.stores.record import HEADER_BYTES, RECORD_VERSION
from cacheflow.stores.redis_connection import PlainConnection, RecordTransfers, RefusedCommand, TlsConnection
from cacheflow.stores.shared import UNBOUNDED, FoundRecord, SharedStore
from cacheflow.stores.url import host_and_port

PREFIX = f"cacheflow{RECORD_VERSION}:"
"""Of our keys in the server, so that it may hold others, and records of another version."""

_BATCH = 1000
"""Keys asked about in one round trip."""

_LIMITS = 10
"""A transfer may take so many of the server's timeouts in all."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisServer:
    """Where a server is and how it is spoken to.

    Attributes:
        host: Name or address.
        port: TCP port.
        database: Number of the database (``SELECT``).
        username: ACL user; None for the default user.
        password: Of the user; None without.
        tls: Speak TLS, and verify the server's certificate and name.
        ca_certs: File with the certificates to trust; None for the system's.
        certfile: File with the client's certificate, where the server asks for one.
        keyfile: File with its key.
        timeout_s: Longest wait for the server to say or take something.
    """

    host: str
    port: int = 6379
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    timeout_s: float = 2.0

    def __str__(self) -> str:
        """The server's URL, without user and password."""
        return f"redis{'s' * self.tls}://{host_and_port(self.host, self.port)}/{self.database}"

    def pool(self) -> Any:  # noqa: ANN401 - redis-py's types are not those of any one version
        """A pool of connections, none of which is open yet."""
        tls = {
            "ssl_ca_certs": self.ca_certs,
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_check_hostname": True,
        }
        return redis.ConnectionPool(
            connection_class=TlsConnection if self.tls else PlainConnection,
            host=self.host,
            port=self.port,
            db=self.database,
            username=self.username,
            password=self.password,
            socket_timeout=self.timeout_s,
            socket_connect_timeout=self.timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,  # the transfers read its answers
            **(tls if self.tls else {}),
        )


class RedisStore(SharedStore):
    """A bounded store in a server that any number of hosts may share.

    The server's own bound (``maxmemory``) holds beside the capacity: what it evicts is a miss, and a server that
    refuses writes instead lowers the bound. The order of use is the server's (``OBJECT IDLETIME``).

    A server that is gone, or hangs, costs time: each read or write at most ten timeouts of the server, and for a second
    after a failure the next ones fail at once. Connections are opened anew as they are needed.
    """

    name, default_threads = "redis", 8

    def __init__(self, server: RedisServer, **bounds: Unpack[Bounds]) -> None:
        """Reach the server and scan what it holds; each of the ``num_threads`` has a connection of its own.

        Raises:
            ConfigError: A count is below 1.
            StoreError: The server cannot be reached, refuses the user or a command, or is one of a cluster.
        """
        super().__init__(str(server), **bounds)
        self._limit_s = _LIMITS * server.timeout_s
        self._pool = server.pool()
        self._client = redis.Redis(connection_pool=self._pool)
        self._breaker = Breaker("the server", clock=self._clock)
        with self.opening("is it running, and are user, password (CACHEFLOW_REDIS_PASSWORD) and certificates right?"):
            self._ask(self._client.ping)
            memory, cluster = self._info("memory"), self._info("cluster")
        if cluster.get("cluster_enabled"):
            self.close()
            raise StoreError(
                f"{self} cannot be used: it is one server of a cluster and refuses keys that belong to others; "
                "take one that stands alone"
            )
        self.log_opened(
            f"the server has maxmemory {memory.get('maxmemory', 'unknown') or 'unlimited'}, "
            f"policy {memory.get('maxmemory_policy', 'unknown')}"
        )

    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """See ``ThreadedStore.read_record``.

        Raises:
            OSError: The server refused, is gone, or is too slow.
        """
        name, expires_s = _key(key.name), self._expires_s(key.name)
        found = self._transfer(
            lambda connection: connection.get_record(name, header, payload, limit_s=self._limit_s, expires_s=expires_s)
        )
        if found is None:
            self.note_gone(key.name)
        else:
            self.note_read(key.name, HEADER_BYTES + found)
        return found

    def scan(self, known: Mapping[str, int]) -> list[FoundRecord]:
        """See ``SharedStore.scan``.

        A record that is not known counts with the memory it takes in the server, a little more than its bytes: asking
        for its length would count as using it.
        """
        found: list[FoundRecord] = []
        names = self._ask(lambda: iter(set(self._names())))
        while batch := list(islice(names, _BATCH)):
            found.extend(self._ask(partial(self._described, batch, known)))
        return found

    def are_there(self, names: Sequence[str]) -> tuple[bool, ...]:
        """See ``SharedStore.are_there``."""

        def ask() -> tuple[bool, ...]:
            with self._client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.exists(_key(name))
                return tuple(map(bool, pipeline.execute()))

        return self._ask(ask)

    def look_up(self, names: Sequence[str]) -> list[FoundRecord]:
        """See ``SharedStore.look_up``."""
        return self._ask(partial(self._described, names, {}))

    def mark_kept(self, names: Sequence[str], *, for_s: float) -> None:
        """See ``SharedStore.mark_kept``: only that the server does not let it expire; other processes may evict it."""
        ttl_s = self._retention.ttl_s
        if ttl_s is None:
            return

        def ask() -> None:
            with self._client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.expire(_key(name), math.ceil(max(for_s, ttl_s)))
                pipeline.execute()

        self._ask(ask)

    def lives_s(self, names: Sequence[str]) -> list[float | None]:
        """See ``SharedStore.lives_s``."""

        def ask(batch: Sequence[str]) -> list[int]:
            with self._client.pipeline(transaction=False) as pipeline:
                for name in batch:
                    pipeline.pttl(_key(name))
                answers: list[int] = pipeline.execute()
            return answers

        left_ms: list[int] = []
        try:
            for start in range(0, len(names), _BATCH):
                left_ms += self._ask(partial(ask, names[start : start + _BATCH]))
        except RefusedCommand:  # the user may not ask
            return [None] * len(names)
        return [each / 1000 if each >= 0 else None for each in left_ms]

    def _expires_s(self, name: str) -> int | None:
        """Seconds after which the server removes a record that is used now, unless it is used again; None for never."""
        if self._retention.ttl_s is None:
            return None
        with self._lock:
            pin_left_s = self._index.pin_left_s(name, now_s=self._clock())
        return math.ceil(max(self._retention.ttl_s, pin_left_s))

    def write_whole(self, name: str, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``SharedStore.write_whole``; a value is there whole or not at all.

        Raises:
            OSError: The server refused, is gone, or is too slow; unless it refused, the record may be there.
        """

        def send(connection: RecordTransfers) -> bool:
            return connection.set_record(
                _key(name), parts, only_new=not replace, limit_s=self._limit_s, expires_s=self._expires_s(name)
            )

        written = self._transfer(send)
        return PutOutcome.STORED if written else PutOutcome.EXISTS

    def erase(self, name: str) -> bool:
        """See ``SharedStore.erase``."""
        return bool(self._ask(lambda: self._client.unlink(_key(name))))

    def free_bytes(self) -> int:
        """See ``SharedStore.free_bytes``; what ``maxmemory`` leaves."""
        memory = self._info("memory")
        bound = int(memory.get("maxmemory", 0))
        return max(0, bound - int(memory.get("used_memory", 0))) if bound else UNBOUNDED

    def close(self) -> None:
        """See ``Store.close``."""
        super().close()
        self._pool.disconnect()

    def _info(self, section: str) -> dict[str, Any]:
        """What the server says of itself; nothing where the user may not ask."""
        try:
            info: dict[str, Any] = self._ask(lambda: self._client.info(section))
        except RefusedCommand:
            return {}
        return info

    def _names(self) -> Iterator[str]:
        for key in self._client.scan_iter(match=PREFIX + "*", count=_BATCH):
            name = key.decode(errors="replace").removeprefix(PREFIX)
            if namespace_of(name) is not None:
                yield name

    def _described(self, names: Sequence[str], known: Mapping[str, int]) -> list[FoundRecord]:
        with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.object("IDLETIME", _key(name))
                pipeline.memory_usage(_key(name))
            answers = pipeline.execute(raise_on_error=False)
        now_s = time.time()
        found = []
        for name, idle_s, num_bytes in zip(names, answers[::2], answers[1::2], strict=True):
            if isinstance(num_bytes, int):  # it is still there
                # Whole seconds, rounded down: not later than this process knows of its own uses. An error under a
                # policy that counts uses instead: all were used equally long ago.
                used_s = now_s - idle_s - 1.0 if isinstance(idle_s, int) else 0.0
                found.append(FoundRecord(name, known.get(name, num_bytes), used_s))
        return found

    def _transfer(self, exchange: Callable[[RecordTransfers], T]) -> T:
        def call() -> T:
            connection = self._pool.get_connection()
            try:
                return exchange(connection)
            except RefusedCommand:
                raise
            except BaseException:
                connection.disconnect()
                raise
            finally:
                self._pool.release(connection)

        return self._ask(call)

    def _ask(self, call: Callable[[], T]) -> T:
        """Speak with the server; what went wrong is an ``OSError``, ``RefusedCommand`` where the server answered."""
        self.require_open()
        self._breaker.check()
        try:
            return call()
        except RefusedCommand:
            raise
        except redis.ResponseError as error:
            raise RefusedCommand(errno.EIO, str(error)) from error
        except (redis.RedisError, OSError) as error:
            self._breaker.trip()
            raise OSError(errno.EIO, _reason(error)) from error


def _reason(error: Exception) -> str:
    """What went wrong, without the address that redis-py puts into it: the messages that quote it begin with that."""
    for each in (error, error.__context__):
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
    return str(error)


def _key(name: str) -> bytes:
    return (PREFIX + name).encode()
