"""Servers that stores speak to, on this machine and for this test run: Redis, with and without TLS, S3, Mooncake."""

import importlib
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.lacking import lacking

PASSWORD = "hunter2"
WAIT_S = 60.0


@dataclass(frozen=True)
class RunningRedis:
    """A server of its own: its port, its certificates, its process."""

    port: int
    ca_certs: str | None
    process: subprocess.Popen

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0" if self.ca_certs is None else self.tls_url

    @property
    def tls_url(self):
        return f"rediss://keeper@127.0.0.1:{self.port}/0?ca_certs={self.ca_certs}"

    def client(self):
        """redis-py, to look behind the store."""
        import redis

        tls = {"ssl": True, "ssl_ca_certs": self.ca_certs, "password": PASSWORD} if self.ca_certs else {}
        return closing(redis.Redis(host="127.0.0.1", port=self.port, **tls))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require_packages(*names):
    for name in names:
        if importlib.util.find_spec(name) is None:
            lacking(f"needs the package {name}, which is not installed here")


def certificates(folder):
    """A certificate authority and a server's certificate by it, in files of ``folder``."""
    openssl = shutil.which("openssl") or lacking("needs openssl, which is not installed here")

    def make(*words):
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True)

    make("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test authority")  # fmt: skip
    make("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "server.key",
         "-out", "server.csr", "-subj", "/CN=127.0.0.1")  # fmt: skip
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    make("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
         "-out", "server.crt", "-extfile", "names")  # fmt: skip


@contextmanager
def running_redis(folder, *options, port=None, tls=False):
    """A real server on loopback; with ``tls`` it has a user ``keeper``, who may do what a store needs and no more."""
    require_packages("redis")
    program = shutil.which("redis-server") or lacking("needs redis-server, which is not installed here")
    port = port or free_port()
    words = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder), *options]
    if tls:
        certificates(folder)
        users = folder / "users.acl"
        allowed = "+@connection +get +getex +set +exists +unlink +scan +expire +pttl +object|idletime +memory|usage"
        users.write_text(f"user default on >{PASSWORD} ~* +@all\nuser keeper on >{PASSWORD} ~cacheflow1:* {allowed}\n")
        words += ["--port", "0", "--tls-port", str(port), "--tls-cert-file", str(folder / "server.crt"),
                  "--tls-key-file", str(folder / "server.key"), "--tls-ca-cert-file", str(folder / "ca.crt"),
                  "--tls-auth-clients", "no", "--aclfile", str(users)]  # fmt: skip
    else:
        words += ["--port", str(port)]
    process = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL)
    server = RunningRedis(port, str(folder / "ca.crt") if tls else None, process)
    try:
        wait_for(server)
        yield server
    finally:
        process.kill()
        process.wait()


def wait_for(server):
    import redis

    until_s = time.monotonic() + WAIT_S
    while True:
        try:
            with server.client() as client:
                client.ping()
            return
        except redis.RedisError:
            assert server.process.poll() is None, "redis-server ended"
            assert time.monotonic() < until_s, "redis-server does not answer"
            time.sleep(0.02)


@dataclass(frozen=True)
class RunningS3:
    """Moto in a process of its own."""

    endpoint: str
    process: subprocess.Popen


@contextmanager
def running_s3():
    """Moto on loopback."""
    require_packages("obstore", "moto", "flask")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until_it_listens(port, process, "moto")
        yield RunningS3(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.wait()


def wait_until_it_listens(port, process, name):
    until_s = time.monotonic() + WAIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            assert process.poll() is None, f"{name} ended"
            assert time.monotonic() < until_s, f"{name} does not listen"
            time.sleep(0.05)


@dataclass(frozen=True)
class RunningMooncake:
    """A master, and a process that gives the pool its memory."""

    port: int
    metrics_port: int
    master: subprocess.Popen
    giver: subprocess.Popen

    @property
    def url(self):
        return f"mooncake://127.0.0.1:{self.port}?metrics={self.metrics_port}"


@contextmanager
def running_mooncake(*options, pool_bytes=256 << 20):
    """A pool on loopback: Mooncake's own programs; with None nobody gives it memory."""
    require_mooncake()
    port, metrics_port, client_port = free_port(), free_port(), free_port()
    master = mooncake_master(port, metrics_port, *options)
    giver = None
    try:
        wait_until_it_listens(port, master, "mooncake_master")
        wait_until_it_listens(metrics_port, master, "mooncake_master")
        if pool_bytes:
            giver = subprocess.Popen(
                [mooncake_program("mooncake_client"), "--host=127.0.0.1", f"--port={client_port}",
                 f"--master_server_address=127.0.0.1:{port}", "--metadata_server=P2PHANDSHAKE",
                 f"--global_segment_size={pool_bytes}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            wait_until_it_listens(client_port, giver, "mooncake_client")
        yield RunningMooncake(port, metrics_port, master, giver)
    finally:
        for process in filter(None, (giver, master)):
            process.kill()
            process.wait()


@contextmanager
def new_mooncake_client(server):
    """Mooncake's own client."""
    from mooncake.store import MooncakeDistributedStore

    with closing(MooncakeDistributedStore()) as client:
        assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", f"127.0.0.1:{server.port}") == 0
        yield client


def mooncake_master(port, metrics_port, *options):
    """A master's process; the caller ends it."""
    return subprocess.Popen(
        [mooncake_program("mooncake_master"), "--rpc_address=127.0.0.1", f"--rpc_port={port}",
         f"--metrics_port={metrics_port}", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def require_mooncake():
    require_packages("mooncake")
    try:
        importlib.import_module("cacheflow.stores.mooncake")
    except ImportError as error:
        lacking(f"needs Mooncake, which cannot be loaded here ({error}; make test-servers)")


def mooncake_program(name):
    """One of the programs that the package brings."""
    beside = Path(sys.executable).with_name(name)
    return (
        str(beside) if beside.exists() else shutil.which(name) or lacking(f"needs {name}, which is not installed here")
    )


@pytest.fixture(scope="session")
def mooncake_server():
    with running_mooncake() as server:
        yield server


@pytest.fixture(scope="session")
def mooncake_client(mooncake_server):
    """To look behind a store; one, since closing it takes a second."""
    with new_mooncake_client(mooncake_server) as client:
        yield client


class LentClient:
    """Mooncake's client as a store's own, which goes on when the store is closed."""

    def __init__(self, client):
        self._client, self._registered = client, set()

    def __getattr__(self, name):
        return getattr(self._client, name)

    def register_buffer(self, address, num_bytes):
        self._registered.add(address)
        return self._client.register_buffer(address, num_bytes)

    def unregister_buffer(self, address):
        self._registered.discard(address)
        return self._client.unregister_buffer(address)

    def close(self):
        for address in sorted(self._registered):
            self.unregister_buffer(address)


@pytest.fixture
def mooncake_url(mooncake_server, mooncake_client, monkeypatch):
    """The URL of a store in an empty pool, which every opening of it reaches by one client: to end one takes a second.

    In ``test_mooncake_store.py`` each has its own.
    """
    from cacheflow.stores.mooncake import MooncakePool

    join = MooncakePool.open

    def lend(pool):
        is_there = mooncake_server.url.startswith(f"{pool}?") and not pool.segment_bytes
        return LentClient(mooncake_client) if is_there else join(pool)

    monkeypatch.setattr(MooncakePool, "open", lend)
    mooncake_client.remove_all(True)
    return mooncake_server.url


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def tls_redis_server(tmp_path_factory):
    with running_redis(tmp_path_factory.mktemp("tls-redis"), tls=True) as server:
        yield server


@pytest.fixture
def redis_password(monkeypatch):
    monkeypatch.setenv("CACHEFLOW_REDIS_PASSWORD", PASSWORD)


@pytest.fixture(scope="session")
def s3_endpoint():
    with running_s3() as server:
        yield server.endpoint


@pytest.fixture
def s3_environment(monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": PASSWORD,
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket_url(s3_endpoint, s3_environment):
    """The URL of a store in an empty bucket."""
    return new_bucket_url(s3_endpoint)


def new_bucket_url(endpoint):
    """The URL of a store in an empty bucket; the credentials are those of ``s3_environment``."""
    import boto3

    name = f"bucket-{time.monotonic_ns()}"
    with closing(boto3.client("s3", endpoint_url=endpoint)) as client:
        client.create_bucket(Bucket=name)
    return f"s3://{name}/kv?endpoint={endpoint}"
