"""Every store there is, by name, empty and opened by its URL: for tests of what all of them promise."""

import json
import shutil
import uuid

import pytest

from cacheflow.stores.opening import opener_of
from cacheflow.stores.shm import SHARED_MEMORY, shm_folder
from cacheflow.stores.url import StoreUrl, file_url
from support.lacking import lacking

BASIC = ("memory", "file")
SHARED = ("file", "shm", "redis", "rediss", "s3", "mooncake")
ALL = ("memory", *SHARED)
LMCACHE = tuple(
    pytest.param(f"lmcache {adapter}", marks=pytest.mark.lmcache) for adapter in ("fs_native", "fs", "resp")
)
"""Adapters of LMCache, which has an environment of its own: for lists of parameters."""


def url_of(kind, request, folder):
    """The URL of an empty store, to be opened any number of times; ``request`` is pytest's."""
    fixture = request.getfixturevalue
    if kind == "memory":
        return "memory"
    if kind == "file":
        return file_url(folder)
    if kind == "shm":
        return shm_url(request)
    if kind == "s3":
        return fixture("bucket_url")
    if kind in ("lmcache fs_native", "lmcache fs"):
        return lmcache_url(kind.split()[1], base_path=str(folder))
    if kind == "mooncake":
        return fixture("mooncake_url")
    if kind == "rediss":
        fixture("redis_password")
    server = fixture("tls_redis_server" if kind == "rediss" else "redis_server")
    with server.client() as client:
        client.flushall()
    return lmcache_url("resp", host="127.0.0.1", port=server.port) if kind == "lmcache resp" else server.url


def lmcache_url(adapter, **settings):
    """Of one of LMCache's adapters."""
    return "lmcache:" + json.dumps({"type": adapter, **settings})


def shm_url(request):
    """Of a store in shared memory that is removed after the test, whatever it leaves."""
    if not SHARED_MEMORY.is_dir():
        lacking("needs /dev/shm, which is not here")
    name = f"test-{uuid.uuid4().hex}"
    request.addfinalizer(lambda: shutil.rmtree(shm_folder(name), ignore_errors=True))
    return f"shm://{name}"


def left_behind(url):
    """The URL by which a store is made that its last user leaves, as one does that is killed."""
    return url + "?keep=yes" * url.startswith("shm:")


def opened(url, *, capacity_bytes, **options):
    """The store, with options of its class that no URL has, such as a clock."""
    parsed = StoreUrl.parse(url)
    return opener_of(parsed.scheme)(parsed)(capacity_bytes=capacity_bytes, **options)
