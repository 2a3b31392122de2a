"""Records in Mooncake, memory that many hosts give to one pool, one object each."""

from __future__ import annotations

import errno
import http.client
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Unpack

from cacheflow.stores.base import PutOutcome
from cacheflow.stores.bounded import Bounds
from cacheflow.stores.keys import ObjectKey, namespace_of
from cacheflow.stores.record import HEADER_BYTES, RECORD_VERSION
from cacheflow.stores.shared import UNBOUNDED, FoundRecord, SharedStore
from cacheflow.stores.staging import StagingBuffers, copy_record, gather
from cacheflow.stores.timed_calls import TimedCalls, closes_in_time
from cacheflow.stores.url import host_and_port
from cacheflow.types import Bytes

os.environ.setdefault("GLOG_minloglevel", "1")  # or Mooncake writes a page to stderr for each client
os.environ.setdefault("MC_LOG_LEVEL", "WARNING")
from mooncake.store import MooncakeDistributedStore  # reads that when it is loaded

logger = logging.getLogger(__name__)

PREFIX = f"cacheflow{RECORD_VERSION}:"
"""Of our objects in the pool, so that it may hold others, and records of another version."""

PEER_TO_PEER = "P2PHANDSHAKE"
"""Clients find each other through the master alone: no metadata server."""

_BATCH = 256
"""Objects asked about in one round trip."""

_LOCAL_BUFFER_BYTES = 16 << 20
"""Of Mooncake's own; records go through ours."""

_GAUGE = re.compile(rb"^(master_allocated_bytes|master_total_capacity_bytes) ([0-9.e+]+)", re.MULTILINE)

# Error codes of Mooncake (mooncake-store/include/types.h).
_NO_ROOM = -200
_BAD_PARAMETER = -600
_NOT_THERE = frozenset({-703, -704, -712})
"""Still being written, not found, gone."""
_MASTER_GONE = -900


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakePool:
    """Which pool, and how this process takes part in it.

    Attributes:
        host: Of the master.
        port: Of the master's RPC.
        metrics_port: Of the master's HTTP server, which alone lists objects.
        segment_bytes: Memory that this process gives to the pool; what lies in it goes with the process.
        protocol: How bytes travel: ``tcp``, or ``rdma``.
        device: RDMA devices, separated by commas; empty for those that Mooncake picks.
        local_host: Address by which others reach this process; None for the one by which it reaches the master.
        timeout_s: Longest time for one request.
    """

    host: str
    port: int = 50051
    metrics_port: int = 9003
    segment_bytes: int = 0
    protocol: str = "tcp"
    device: str = ""
    local_host: str | None = None
    timeout_s: float = 10.0

    def __str__(self) -> str:
        """The pool's URL."""
        return f"mooncake://{host_and_port(self.host, self.port)}"

    def open(self) -> Any:  # noqa: ANN401 - an untyped package
        """Take part in the pool.

        Raises:
            OSError: The master does not answer or refuses.
        """
        with socket.create_connection((self.host, self.port), timeout=self.timeout_s) as probe:
            address = self.local_host or probe.getsockname()[0]
        self.ask_master("/metrics")  # a master that hangs: setting up would try for minutes, and hold the GIL
        client = MooncakeDistributedStore()
        code = client.setup(
            address, PEER_TO_PEER, self.segment_bytes, _LOCAL_BUFFER_BYTES, self.protocol, self.device,
            host_and_port(self.host, self.port),
        )  # fmt: skip
        if code != 0:
            raise OSError(errno.EIO, f"Mooncake refuses to set up a client, code {code}")
        return client

    def ask_master(self, path: str) -> bytes:
        """What the master's HTTP server answers.

        Raises:
            OSError: It does not answer, or not what was asked for.
        """
        url = f"http://{host_and_port(self.host, self.metrics_port)}{path}"
        connection = http.client.HTTPConnection(self.host, self.metrics_port, timeout=self.timeout_s)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        except http.client.HTTPException as error:
            raise OSError(errno.EPROTO, f"{url}: {error!r}") from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise OSError(errno.EPROTO, f"{url} answered {answer.status}")
        return body


class MooncakeStore(SharedStore):
    """A bounded store in a pool of memory that any number of hosts may share.

    The master's own eviction holds beside the capacity: what it evicts is a miss. It tells nobody when an object was
    used, so for each process what others wrote was last used when it was first seen.

    Bytes travel through buffers of the store's own, since a transfer that Mooncake has given up may still write: no
    caller's buffer is ever Mooncake's. A call that does not return costs its thread and its buffer until it does.
    """

    name, default_threads = "mooncake", 4

    def __init__(self, pool: MooncakePool, **bounds: Unpack[Bounds]) -> None:
        """Join the pool and list what it holds.

        Raises:
            ConfigError: A count is below 1.
            StoreError: The master cannot be reached, or refuses this process.
        """
        super().__init__(str(pool), **bounds)
        self._pool = pool
        self._client: Any = None
        self._staging = StagingBuffers(
            register=self._register, unregister=lambda each: self._client.unregister_buffer(each.ctypes.data)
        )
        self._calls = TimedCalls(
            "Mooncake", num_threads=2 * self._num_threads, timeout_s=pool.timeout_s, clock=self._clock
        )
        with self.opening(
            f"is mooncake_master running, and are its rpc_port ({pool.port}) and metrics_port ({pool.metrics_port}) "
            "those of the URL?"
        ):
            self._client = self._calls.call(pool.open)
        self.log_opened(f"this process gives {pool.segment_bytes} bytes to the pool, whose size is {self._room()[1]}")

    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """See ``ThreadedStore.read_record``.

        Raises:
            OSError: The pool refused, is gone, or is too slow.
        """
        found = self._get_into(key.name, HEADER_BYTES + payload.nbytes, header, payload)
        if found == _BAD_PARAMETER:  # the object is longer
            found = self._calls.call(partial(self._client.get_size, PREFIX + key.name))
            if found >= 0:
                found = self._get_into(key.name, found, header, payload)
        if found in _NOT_THERE:
            self.note_gone(key.name)
            return None
        num_bytes = self._checked(found, "read")
        self.note_read(key.name, num_bytes)
        return num_bytes - HEADER_BYTES

    def scan(self, known: Mapping[str, int]) -> list[FoundRecord]:
        """See ``SharedStore.scan``; asks the master's HTTP server, the only one to list."""
        listing = self._calls.call(partial(self._pool.ask_master, "/get_all_keys")).decode(errors="replace")
        names = [each.removeprefix(PREFIX) for each in listing.splitlines() if each.startswith(PREFIX)]
        names = [each for each in names if namespace_of(each) is not None]
        sizes = {each: known[each] for each in names if each in known}
        sizes |= self._sizes([each for each in names if each not in known])
        return self.first_seen(sizes)

    def are_there(self, names: Sequence[str]) -> tuple[bool, ...]:
        """See ``SharedStore.are_there``; for some seconds the master does not evict what it was asked for."""
        asked = [PREFIX + name for name in names]
        return tuple(
            self._checked(each, "ask") == 1 for each in self._calls.call(partial(self._client.batch_is_exist, asked))
        )

    def look_up(self, names: Sequence[str]) -> list[FoundRecord]:
        """See ``SharedStore.look_up``."""
        now_s = time.time()
        return [FoundRecord(name, num_bytes, now_s) for name, num_bytes in self._sizes(names).items()]

    def write_whole(self, name: str, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``SharedStore.write_whole``; Mooncake shows an object when all of it has arrived.

        Raises:
            OSError: The pool refused, is gone, or is too slow; unless it refused, the record may be there.
        """
        if replace:
            self.erase(name)  # Mooncake overwrites no object that somebody may be reading
        num_bytes = sum(part.nbytes for part in parts)
        with self._staging.lend(num_bytes) as (staging, give_back):
            gather(parts, staging)
            written = self._calls.call(
                partial(self._client.put_from, PREFIX + name, staging.ctypes.data, num_bytes), given_up=give_back
            )
        if written == _NO_ROOM and not self._room()[1]:  # not full: where a master starts anew, for a moment
            raise OSError(errno.EIO, "nobody gives memory to the pool: start mooncake_client, or give a segment")
        self._checked(written, "write")
        if not self.are_there([name])[0]:  # Mooncake says nothing of a writer that began this object and died
            raise OSError(errno.EBUSY, "an object is not there after it was written")
        return PutOutcome.STORED

    def erase(self, name: str) -> bool:
        """See ``SharedStore.erase``; also what was asked for or read a moment ago."""
        (removed,) = self._calls.call(partial(self._client.batch_remove, [PREFIX + name], True))
        return removed not in _NOT_THERE and self._checked(removed, "remove") == 0

    def free_bytes(self) -> int:
        """See ``SharedStore.free_bytes``."""
        used_bytes, all_bytes = self._room()
        return max(0, all_bytes - used_bytes)

    def close(self) -> None:
        """See ``Store.close``; what this process gave to the pool goes with it."""
        super().close()
        client, self._client = self._client, None
        if not self._calls.close() or not (client is None or closes_in_time(client.close)):
            logger.warning("%s: a call is hung in Mooncake, so that its client was left behind", self)

    def _room(self) -> tuple[int, int]:
        """Bytes used of the whole pool, by whomever, and its size."""
        text = self._calls.call(partial(self._pool.ask_master, "/metrics"))
        gauges = {name: int(float(value)) for name, value in _GAUGE.findall(text)}
        return gauges.get(b"master_allocated_bytes", 0), gauges.get(b"master_total_capacity_bytes", UNBOUNDED)

    def _sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of the records that are there."""
        sizes: dict[str, int] = {}
        left = iter(names)
        while batch := list(islice(left, _BATCH)):
            found = self._calls.call(partial(self._sizes_of, batch))
            sizes |= {name: num_bytes for name, num_bytes in zip(batch, found, strict=True) if num_bytes > 0}
        return sizes

    def _sizes_of(self, names: Sequence[str]) -> list[int]:
        return [self._client.get_size(PREFIX + name) for name in names]

    def _get_into(self, name: str, num_bytes: int, header: memoryview, payload: memoryview) -> int:
        """Copy a record of at most so many bytes into both buffers; returns what Mooncake answered."""
        with self._staging.lend(num_bytes) as (staging, give_back):
            found: int = self._calls.call(
                partial(self._client.get_into, PREFIX + name, staging.ctypes.data, num_bytes), given_up=give_back
            )
            if found >= 0:
                copy_record(staging[:found], header, payload)
        return found

    def _register(self, staging: Bytes) -> None:
        code = self._client.register_buffer(staging.ctypes.data, staging.nbytes)
        if code != 0:
            raise OSError(errno.ENOMEM, f"Mooncake does not register a buffer of {staging.nbytes} bytes, code {code}")

    def _checked(self, code: int, what: str) -> int:
        """An answer of Mooncake that is no error.

        Raises:
            OSError: It is one; ``ENOSPC`` where the pool has no room.
        """
        if code >= 0:
            return code
        if code == _MASTER_GONE:
            self._calls.trip()
        number = errno.ENOSPC if code == _NO_ROOM else errno.EIO
        raise OSError(number, f"Mooncake could not {what}, code {code}")
