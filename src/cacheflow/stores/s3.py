"""Records in a bucket of S3, or of what speaks its protocol, one object each."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, Unpack

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

from cacheflow.stores.base import PutOutcome
from cacheflow.stores.bounded import Bounds
from cacheflow.stores.breaker import Breaker
from cacheflow.stores.keys import ObjectKey, namespace_of
from cacheflow.stores.record import RECORD_VERSION
from cacheflow.stores.shared import FoundRecord, SharedStore
from cacheflow.stores.staging import copy_record

_LISTED = 1000
_PARALLEL_QUESTIONS = 16
_CONNECT_TIMEOUT_S = 2.0
_MAX_ERROR_CHARS = 300
_SECRET = re.compile(r"<Token[^>]*>[^<]*")
"""S3 repeats a session token that it does not accept."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Which bucket, and where; credentials come from the environment (``AWS_*``) or the machine's role.

    Attributes:
        name: Of the bucket.
        prefix: Of its objects' names, without slashes at the ends; empty for none.
        endpoint: URL of a server that is not Amazon's; None for Amazon's, or ``AWS_ENDPOINT_URL``.
        region: None for ``AWS_REGION``.
        timeout_s: Longest time for one request.
    """

    name: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    timeout_s: float = 10.0

    def __str__(self) -> str:
        """The bucket's URL."""
        return f"s3://{self.name}/{self.prefix}"

    def open(self) -> S3Store:
        """A client of the bucket; asks nothing yet."""
        where = {"endpoint": self.endpoint, "region": self.region}
        endpoint = self.endpoint or os.environ.get("AWS_ENDPOINT_URL", "")
        return S3Store(
            self.name,
            client_options={
                "timeout": timedelta(seconds=self.timeout_s),
                "connect_timeout": timedelta(seconds=min(self.timeout_s, _CONNECT_TIMEOUT_S)),
                **({"allow_http": True} if endpoint.startswith("http://") else {}),
            },
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=self.timeout_s)},
            **{key: value for key, value in where.items() if value is not None},
        )


class BucketStore(SharedStore):
    """A bounded store in a bucket that any number of hosts may share.

    A read does not change an object, so across processes the order of use is the order of writing. A bucket has no
    bound of its own; where no process runs, ``cacheflow store gc`` keeps it.

    ``contains`` answers from what this process knows, and asks for the rest with one listing for each chunk. An object
    that another process removed meanwhile is found out by reading it.
    """

    name, default_threads = "s3", 16

    def __init__(self, bucket: Bucket, **bounds: Unpack[Bounds]) -> None:
        """Reach the bucket and list what it holds.

        Raises:
            ConfigError: A count is below 1.
            StoreError: The bucket cannot be reached, does not exist, or may not be listed.
        """
        super().__init__(str(bucket), **bounds)
        self._breaker = Breaker(str(bucket), clock=self._clock)
        self._root = "/".join(part for part in (bucket.prefix, f"v{RECORD_VERSION}") if part)
        self._questions = ThreadPoolExecutor(_PARALLEL_QUESTIONS, thread_name_prefix="cacheflow-bucket")
        server = bucket.endpoint or "that of AWS_ENDPOINT_URL, or Amazon's"
        with self.opening(
            f"is the endpoint right ({server}), is the bucket there, and may the credentials in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) list, read, write and delete in it?"
        ):
            self._client = self._ask(bucket.open)
        self.log_opened()

    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """See ``ThreadedStore.read_record``.

        Raises:
            OSError: The bucket refused, is gone, or is too slow.
        """
        try:
            record = self._ask(lambda: obstore.get(self._client, self._path(key.name)).bytes())
        except FileNotFoundError:
            self.note_gone(key.name)
            return None
        self.note_read(key.name, len(record))
        return copy_record(record, header, payload)

    def holds(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """See ``ThreadedStore.holds``; what this process knows of is not asked for."""
        with self._lock:
            known = {key.name for key in keys if key.name in self._index}
        unknown = [key.name for key in keys if key.name not in known]
        there = dict(zip(unknown, self.are_there(unknown), strict=True))
        return tuple(there.get(key.name, True) for key in keys)

    def scan(self, known: Mapping[str, int]) -> list[FoundRecord]:
        """See ``SharedStore.scan``."""
        del known
        return self._listed(self._root)

    def are_there(self, names: Sequence[str]) -> tuple[bool, ...]:
        """See ``SharedStore.are_there``; one listing for all objects at one chain hash."""
        found = {each.name for each in self.look_up(names)}
        return tuple(name in found for name in names)

    def look_up(self, names: Sequence[str]) -> list[FoundRecord]:
        """See ``SharedStore.look_up``; one listing for all objects at one chain hash."""
        self.require_open()
        chains = sorted({"_".join(name.split("_", 2)[:2]) for name in names})
        listings = self._questions.map(lambda chain: self._listed(self._path(chain)), chains)
        wanted = set(names)
        return [each for listing in listings for each in listing if each.name in wanted]

    def write_whole(self, name: str, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``SharedStore.write_whole``; of two writers the last stays.

        Raises:
            OSError: The bucket refused, is gone, or is too slow; the object may be there.
        """
        del replace  # a put replaces; existing keys were sorted out before
        record = b"".join(parts)
        self._ask(lambda: obstore.put(self._client, self._path(name), record, use_multipart=False))
        return PutOutcome.STORED

    def erase(self, name: str) -> bool:
        """See ``SharedStore.erase``."""
        (was_there,) = self.are_there([name])  # S3 does not say
        if was_there:
            self._ask(lambda: obstore.delete(self._client, self._path(name)))
        return was_there

    def close(self) -> None:
        """See ``Store.close``."""
        super().close()
        self._questions.shutdown(wait=False, cancel_futures=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name.replace('_', '/')}"

    def _listed(self, prefix: str) -> list[FoundRecord]:
        listing: list[Mapping[str, Any]] = self._ask(
            lambda: [each for part in obstore.list(self._client, prefix, chunk_size=_LISTED) for each in part]
        )
        found = []
        for each in listing:
            name = each["path"].removeprefix(f"{self._root}/").replace("/", "_")
            if namespace_of(name) is not None:
                found.append(FoundRecord(name, each["size"], each["last_modified"].timestamp()))
        return found

    def _ask(self, call: Callable[[], T]) -> T:
        """Speak with the bucket; what went wrong is an ``OSError``, ``FileNotFoundError`` for what is not there."""
        self.require_open()
        self._breaker.check()
        try:
            return call()
        except (NotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(errno.ENOENT, _short(error)) from None
        except (BaseError, OSError) as error:
            self._breaker.trip()
            raise OSError(errno.EIO, _short(error)) from None  # its own message is not cleared of secrets
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            # obstore's bug, which would end the thread that reads; Python has no name for its class
            raise OSError(errno.EIO, f"obstore panicked: {_short(error)}") from None


def _short(error: BaseException) -> str:
    """The start of a message, without secrets; obstore's go on for screens."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = _SECRET.sub("", text.partition("Debug source:")[0])
    return " ".join(text.split())[:_MAX_ERROR_CHARS]
