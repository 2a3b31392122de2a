"""Secrets come from the environment and are never said: not in logs, errors, tables or representations."""

import logging

import pytest

from cacheflow import cli
from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.stores.retention import Retention
from support.servers import PASSWORD
from support.store_kinds import SHARED, url_of
from support.store_objects import get, key, put

SCHEMES = ("memory", "file", "shm", "redis", "rediss", "s3", "mooncake", "lmcache", "tape")


@pytest.mark.parametrize("kind", SHARED)
def test_no_store_says_a_secret_whatever_it_does(kind, request, tmp_path, monkeypatch, caplog, capsys):
    url = url_of(kind, request, tmp_path / "store")
    if kind == "rediss":
        monkeypatch.setenv("CACHEFLOW_REDIS_PASSWORD", PASSWORD)
    retention = Retention(ttl_s=3600.0, tenant_quota=0.5)
    with caplog.at_level(logging.DEBUG), open_store(url, capacity_bytes=1 << 16, retention=retention) as store:
        store.claim([key(1).chain_hash], tenant="the tenant")
        put(store, *range(10))
        get(store, 1)
        store.pin([key(9)], ttl_s=60.0)
        store.unpin([key(9)])
        store.sweep()
        store.contains([key(1)])
        assert cli.main(["store", "stat", url]) == 0
        said = f"{store} {store!r} {store.capabilities()} {store.stats()}"
    get(store, 1)  # closed: fails
    output = capsys.readouterr()
    for text in (caplog.text, said, output.out, output.err):
        assert PASSWORD not in text
        assert "the tenant" not in text


@pytest.mark.parametrize("kind", ["rediss", "s3"])
def test_a_store_that_refuses_its_secret_does_not_repeat_it(kind, request, tmp_path, monkeypatch, caplog):
    url = url_of(kind, request, tmp_path / "store")
    for name in ("CACHEFLOW_REDIS_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "wrong-and-secret")
    text = ""
    with caplog.at_level(logging.DEBUG):
        try:
            open_store(url, capacity_bytes=1 << 16).close()
        except StoreError as error:  # moto takes any
            text = f"{error!r} {error} {error.__cause__!r}"
    assert "wrong-and-secret" not in text + caplog.text


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "form", ["{}://me:hunter2@host/0", "{}://:hunter2@host", "{}://hunter2:x/y@host", "{}://me:hunter2/x@host?y=1"]
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(scheme, form, caplog, capsys):
    url = form.format(scheme)
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(ValueError, match="store") as raised:
            check_store_url(url)
        assert cli.main(["store", "stat", url]) == 2
    output = capsys.readouterr()
    for text in (str(raised.value), caplog.text, output.out, output.err):
        assert "hunter2" not in text


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
@pytest.mark.parametrize("value", ["http://me:hunter2@127.0.0.1:1", "hunter2"])
def test_a_server_of_the_environment_is_refused_like_one_of_the_url(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable} must be http://host:port or https://host:port") as raised:
        check_store_url("s3://bucket")
    assert "hunter2" not in str(raised.value)
    check_store_url("file:///kv")


def test_a_password_may_stand_in_a_file(tmp_path, monkeypatch, request):
    url = url_of("rediss", request, tmp_path / "store")
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    monkeypatch.delenv("CACHEFLOW_REDIS_PASSWORD")
    monkeypatch.setenv("CACHEFLOW_REDIS_PASSWORD_FILE", str(file))
    open_store(url, capacity_bytes=1 << 16).close()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b"\n", "holds no password"), (b"hunter2\xff", "must be a file of UTF-8")],
)
def test_a_file_without_a_password_is_refused(tmp_path, monkeypatch, content, message):
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.delenv("CACHEFLOW_REDIS_PASSWORD", raising=False)
    monkeypatch.setenv("CACHEFLOW_REDIS_PASSWORD_FILE", str(file))
    with pytest.raises(ConfigError, match=message) as raised:
        check_store_url("redis://127.0.0.1:1")
    assert str(file) in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_a_password_and_a_file_of_it_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEFLOW_REDIS_PASSWORD", "hunter2")
    monkeypatch.setenv("CACHEFLOW_REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    with pytest.raises(ConfigError, match="CACHEFLOW_REDIS_PASSWORD is set too") as raised:
        check_store_url("redis://127.0.0.1:1")
    assert "hunter2" not in str(raised.value)


def test_a_password_that_is_no_text_is_refused(monkeypatch):
    monkeypatch.setenv("CACHEFLOW_REDIS_PASSWORD", "hunter2\udcff")
    with pytest.raises(ConfigError, match="CACHEFLOW_REDIS_PASSWORD is no UTF-8 text") as raised:
        check_store_url("redis://host")
    assert "hunter2" not in str(raised.value)
