"""Any text in the place of a store's URL: a store can be opened by it, or it is refused with a sentence."""

import tempfile
from pathlib import Path
from urllib.parse import quote

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.stores.base import PutOutcome
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.stores.url import StoreUrl, file_url
from cacheflow.types import LoadOutcome
from support.examples import examples
from support.store_objects import get, put

SCHEMES = st.sampled_from(["memory", "file", "shm", "redis", "rediss", "s3", "mooncake", "lmcache", "tape", ""])
ODD = st.sampled_from(["", "localhost", "..", "[::1]", "[", "%", "%00", "%ff", "9" * 5000, "²", "\ud800"])
WORDS = st.one_of(st.text(max_size=12), ODD)
OPTIONS = st.sampled_from([
    "capacity", "verify", "fsync", "keep", "timeout_s", "ca_certs", "certfile", "keyfile", "endpoint", "region",
    "segment", "protocol", "metrics", "host", "other",
])  # fmt: skip
VALUES = st.one_of(
    WORDS,
    st.sampled_from([
        "yes", "no", "always", "4GiB", "1", "-1", "nan", "inf", "1e999", "http://h:1", "http://h:x",
    ]),
)  # fmt: skip


@st.composite
def urls(draw: st.DrawFn) -> str:
    """What looks like a URL, and often is one."""
    user = draw(st.sampled_from(["", "", "me@", "me:hunter2@", "@"]))
    port = draw(st.sampled_from(["", "", ":6379", ":0", ":65536", ":x", ":" + "9" * 5000]))
    path = "".join("/" + word for word in draw(st.lists(WORDS, max_size=3)))
    options = "&".join(f"{draw(OPTIONS)}={draw(VALUES)}" for _ in range(draw(st.integers(0, 3))))
    text = f"{draw(SCHEMES)}://{user}{draw(WORDS)}{port}{path}" + f"?{options}" * bool(options)
    return text + draw(st.sampled_from(["", "", "", "#", "#hunter2"]))


@settings(max_examples=examples(500))
@given(text=st.one_of(st.text(), urls()))
@example(text="redis://host/" + "9" * 5000)
@example(text="file:///a%00b")
@example(text="file:///a%ffb")
@example(text="file:///\ud800")
def test_a_text_is_a_stores_url_or_refused(text):
    url, said = None, ""
    try:
        (url,) = check_store_url(text)
    except ConfigError as error:
        said = str(error)
    assert (url is None) == bool(said)
    assert "hunter2@" not in said
    if url is None:
        return
    assert isinstance(url, StoreUrl)
    assert url.text == text
    assert "hunter2@" not in text
    assert "\0" not in url.path
    url.path.encode()


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=examples(60))
@given(name=NAMES, fsync=st.sampled_from(["", "?fsync=yes"]))
def test_a_folder_of_any_name_holds_a_store(name, fsync):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        url = file_url(folder) + fsync
        assert [each.path for each in check_store_url(url)] == [str(folder)]
        with open_store(url, capacity_bytes=1 << 20) as store:
            assert put(store, 1) == (PutOutcome.STORED,)
            assert get(store, 1)[0] is LoadOutcome.OK
        assert quote(str(folder)) in url
