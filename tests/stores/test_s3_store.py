"""S3: a bucket that is not there, may not be used, is changed by others, or hangs."""

import http.server
import logging
import threading
import time
import traceback
from contextlib import closing

import numpy as np
import pytest

from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores.base import GetRequest, PutOutcome
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.types import LoadOutcome
from support.proxy import Proxy
from support.servers import PASSWORD, free_port, require_packages
from support.store_objects import TIMEOUT_S, get, key, payload, put

CAPACITY = 64 << 20
OK, MISS = LoadOutcome.OK, LoadOutcome.MISS


@pytest.fixture
def bucket(bucket_url, s3_endpoint):
    """boto3, to look behind the store."""
    import boto3

    resource = boto3.resource("s3", endpoint_url=s3_endpoint)
    with closing(resource.meta.client):
        yield resource.Bucket(bucket_url.removeprefix("s3://").partition("/")[0])


def path_of(number):
    return key(number).name.replace("_", "/")


def test_objects_survive_the_process_under_hierarchical_names(bucket_url, bucket):
    bucket.put_object(Key="kv/other", Body=b"somebody else's")
    with open_store(bucket_url, capacity_bytes=CAPACITY) as store:
        put(store, 1, 2)
    names = {each.key for each in bucket.objects.all()}
    assert names == {"kv/other", *(f"kv/v1/{path_of(number)}" for number in (1, 2))}
    with open_store(bucket_url, capacity_bytes=CAPACITY) as store:
        assert store.stats().num_objects == 2
        assert store.stats().used_bytes == 2 * 5096
        assert np.array_equal(get(store, 1)[1], payload(1))


def test_a_bucket_without_a_prefix(bucket_url, bucket):
    with open_store(bucket_url.replace("/kv?", "?"), capacity_bytes=CAPACITY) as store:
        put(store, 1)
        assert [each.key for each in bucket.objects.all()] == [f"v1/{path_of(1)}"]
        assert get(store, 1)[0] is OK


@pytest.mark.parametrize("num_bytes", [0, 100, 4095, 4096, 4097, 5095, 5097])
def test_an_object_cut_short_or_grown_is_corrupt(bucket_url, bucket, num_bytes):
    with open_store(bucket_url, capacity_bytes=CAPACITY) as store:
        put(store, 1)
        (found,) = bucket.objects.all()
        data = found.get()["Body"].read()
        bucket.put_object(Key=found.key, Body=data.ljust(num_bytes, b"x")[:num_bytes])
        assert get(store, 1)[0] is LoadOutcome.CORRUPT
        assert put(store, 1) == (PutOutcome.STORED,)
        assert get(store, 1)[0] is OK


def test_what_others_write_and_remove_is_found_out(bucket_url):
    with (
        open_store(bucket_url, capacity_bytes=CAPACITY) as mine,
        open_store(bucket_url, capacity_bytes=CAPACITY) as theirs,
    ):
        put(theirs, 1, 2)
        assert mine.contains([key(1), key(2), key(3)]) == (True, True, False)
        assert get(mine, 1)[0] is OK
        theirs.delete([key(1)])
        assert get(mine, 1)[0] is MISS
        assert mine.contains([key(1)]) == (False,)


def test_large_objects(bucket_url):
    with open_store(bucket_url, capacity_bytes=CAPACITY) as store:
        put(store, 1, num_bytes=16 << 20)
        outcome, buffer = get(store, 1, 16 << 20)
        assert outcome is OK
        assert np.array_equal(buffer, payload(1, 16 << 20))


def test_capacity_is_logged_at_start_and_no_secret_ever(bucket_url, caplog):
    with caplog.at_level(logging.DEBUG), open_store(bucket_url, capacity_bytes=54321) as store:
        put(store, 1)
        assert "capacity 54321 bytes" in caplog.text
    assert PASSWORD not in caplog.text


def test_a_bucket_that_is_not_there_is_refused(s3_endpoint, s3_environment):
    with pytest.raises(StoreError, match=r"s3://nowhere-at-all/ cannot be used: .*AWS_ACCESS_KEY_ID") as raised:
        open_store(f"s3://nowhere-at-all?endpoint={s3_endpoint}", capacity_bytes=CAPACITY)
    assert PASSWORD not in str(raised.value)


def test_an_endpoint_that_is_not_there_is_refused(s3_environment):
    require_packages("obstore")
    with pytest.raises(StoreError, match="cannot be used"):
        open_store(f"s3://bucket?endpoint=http://127.0.0.1:{free_port()}&timeout_s=1", capacity_bytes=CAPACITY)


def test_the_endpoint_of_the_environment_may_be_without_tls(bucket_url, s3_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    with open_store(bucket_url.partition("?")[0], capacity_bytes=CAPACITY) as store:
        assert put(store, 1) == (PutOutcome.STORED,)
        assert get(store, 1)[0] is OK


def test_a_bug_of_obstore_is_an_error_of_the_store(s3_environment):
    """It panics at this address, with what is no ``Exception``."""
    require_packages("obstore")
    with pytest.raises(StoreError, match="cannot be used"):
        open_store("s3://bucket?endpoint=http://a{b}&timeout_s=1", capacity_bytes=CAPACITY)


class RefusesTokens(http.server.BaseHTTPRequestHandler):
    """Answers as S3 does when a session token is no longer good: with the token."""

    def do_GET(self):
        text = (
            "<Error><Code>InvalidToken</Code><Message>The provided token is malformed.</Message>"
            f"<Token-0>{self.headers['x-amz-security-token']}</Token-0></Error>"
        ).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words):
        pass


def test_a_token_that_s3_refuses_is_not_repeated(s3_environment, monkeypatch):
    require_packages("obstore")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-hunter2")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RefusesTokens) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"s3://bucket?endpoint=http://127.0.0.1:{server.server_port}&timeout_s=5"
        with pytest.raises(StoreError, match="InvalidToken") as raised:
            open_store(url, capacity_bytes=CAPACITY)
        server.shutdown()
    assert "token-hunter2" not in "".join(traceback.format_exception(raised.value))


def test_a_bucket_that_hangs_costs_time_and_no_buffer_is_touched_after_cancel(bucket_url, s3_endpoint):
    with closing(Proxy(int(s3_endpoint.rpartition(":")[2]))) as proxy:
        url = bucket_url.replace(s3_endpoint, "http://{}:{}".format(*proxy.address)) + "&timeout_s=1"
        with open_store(url, capacity_bytes=CAPACITY) as store:
            put(store, *range(4))
            proxy.hangs = True
            buffers = [np.zeros(1000, np.uint8) for _ in range(4)]
            requests = [GetRequest(key(number), buffer) for number, buffer in enumerate(buffers)]
            handle = store.submit_get(requests, deadline_s=0.1)
            assert handle.wait(TIMEOUT_S) == (LoadOutcome.LATE,) * 4
            handle.cancel()
            assert store.contains([key(99)]) == (False,)
            proxy.hangs = False
            assert not any(buffer.any() for buffer in buffers)
            outcome = get(store, 1)[0]
            for _ in range(1000):
                if outcome is not LoadOutcome.ERROR:
                    break
                time.sleep(0.01)
                outcome = get(store, 1)[0]
            assert outcome is OK


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "must be s3://bucket/prefix"),
        ("s3://key@bucket/x", "credentials come from the environment"),
        ("s3://key:hunter2@bucket/x", "holds a password"),
        ("s3://bucket:90/x", "must be s3://bucket/prefix"),
        ("s3://bucket?endpoint=host:90", "endpoint must be http"),
        ("s3://bucket?endpoint=http://", "endpoint must be http"),
        ("s3://bucket?endpoint=http://host:port", "endpoint must be http"),
        ("s3://bucket/a//b", "between two / of a prefix must be a name"),
        ("s3://bucket/a/../b", "between two / of a prefix must be a name"),
        ("s3://key:hunter2/hunter2@bucket", "not a URL"),
        ("s3://bucket?endpoint=http://me:hunter2@host", "endpoint must be http"),
        ("s3://bucket?secret_access_key=hunter2", "unknown option secret_access_key of a s3 store"),
        ("s3://bucket?timeout_s=never", "timeout_s is 'never', must be seconds"),
    ],
)
def test_a_bad_url_is_refused_and_no_secret_repeated(url, said):
    with pytest.raises(ConfigError) as raised:
        check_store_url(url)
    assert said in str(raised.value)
    assert "hunter2" not in str(raised.value)
