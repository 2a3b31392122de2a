"""``kv_connector_extra_config``, and what of it contradicts the engine."""

import json
from dataclasses import fields

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.stores.retention import Retention
from cacheflow.vllm.options import ConnectorOptions
from support.examples import examples

FLOATS = [field.name for field in fields(ConnectorOptions) if field.type in ("float", "float | None")]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "1", True, [1.0]], ids=str)
def test_a_number_that_is_none_is_refused_by_name(name: str, value: object):
    with pytest.raises(ConfigError, match=name):
        ConnectorOptions.parse({name: value})


@pytest.mark.parametrize("key", ["chunk_token", "cpu_bytes", "Store", ""])
def test_an_unknown_key_is_answered_with_those_there_are(key: str):
    with pytest.raises(ConfigError, match=r"unknown '.*; known are store, store_path, cpu_bytes_to_use, "):
        ConnectorOptions.parse({key: 1})


def test_a_password_in_a_url_is_not_repeated():
    for path in (None, "/kv"):
        with pytest.raises(ConfigError, match="store") as raised:
            ConnectorOptions(store="redis://me:hunter2@host/0", store_path=path)
        assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("name", ["store_path", "profile_dir"])
def test_an_empty_folder_is_not_the_folder_one_stands_in(name: str):
    with pytest.raises(ConfigError, match=f"{name} is empty"):
        ConnectorOptions.parse({"store": "file", "store_path": "/kv", name: ""})


def test_what_differs_from_the_defaults_survives_the_way_through_json():
    options = ConnectorOptions(store="file", store_path="/kv", chunk_tokens=256, itl_slo_ms=40.0, calibrate=False)
    assert ConnectorOptions.parse(json.loads(json.dumps(options.as_extra_config()))) == options


def test_chunks_must_end_where_kv_blocks_end():
    ConnectorOptions(chunk_tokens=384).for_engine().require_block_size(128)
    with pytest.raises(ConfigError, match="such as 384 or 512"):
        ConnectorOptions(chunk_tokens=400).for_engine().require_block_size(128)
    with pytest.raises(ConfigError, match="such as 128 or 256"):
        ConnectorOptions(chunk_tokens=100).for_engine().require_block_size(128)


def test_chunks_are_as_asked_for_or_as_suits_the_model():
    assert ConnectorOptions().for_engine().chunk_tokens == 512
    assert ConnectorOptions().for_engine(1088).chunk_tokens == 1088
    assert ConnectorOptions(chunk_tokens=512).for_engine(1088).chunk_tokens == 512


def test_a_chunk_that_no_prompt_has_is_refused():
    ConnectorOptions(chunk_tokens=512).for_engine().require_chunk_in_prompt(513)
    for max_tokens in (512, 256):  # the last token of a prompt is always computed
        with pytest.raises(
            ConfigError, match=f"chunk_tokens is 512, must be below vLLM's max_model_len of {max_tokens}"
        ):
            ConnectorOptions(chunk_tokens=512).for_engine().require_chunk_in_prompt(max_tokens)


def test_a_store_that_holds_no_chunk_is_refused():
    ConnectorOptions(cpu_bytes_to_use=1000).for_engine().require_room_for_chunk(1000)
    with pytest.raises(ConfigError, match="cpu_bytes_to_use is 1000, but one chunk of 512 tokens takes 1001 bytes"):
        ConnectorOptions(cpu_bytes_to_use=1000).for_engine().require_room_for_chunk(1001)


def test_a_quota_that_holds_no_chunk_is_refused():
    ConnectorOptions(cpu_bytes_to_use=1000, tenant_quota=0.5).for_engine().require_room_for_chunk(500)
    with pytest.raises(
        ConfigError, match="is 1000, of which a tenant may have 500, but one chunk of 512 tokens takes 501"
    ):
        ConnectorOptions(cpu_bytes_to_use=1000, tenant_quota=0.5).for_engine().require_room_for_chunk(501)


def test_what_stays_and_goes_is_for_the_store():
    options = ConnectorOptions.parse({"ttl_s": 60, "tenant_quota": 0.25, "pinned_share": 0})
    assert options.retention == Retention(ttl_s=60.0, tenant_quota=0.25, pinned_share=0.0)
    assert ConnectorOptions().retention == Retention()
    for values, said in (
        ({"ttl_s": 0.1}, "ttl_s is 0.1, must be at least 1"),
        ({"tenant_quota": 1.5}, "tenant_quota is 1.5, must be a share of the capacity"),
        ({"pinned_share": 1.5}, "pinned_share is 1.5, must be a share of the capacity"),
        ({"keep_tool_s": 4000}, "keep_tool_s is 4000 and max_keep_s 3600"),
    ):
        with pytest.raises(ConfigError, match=said):
            ConnectorOptions.parse(values)


def test_a_store_is_given_by_its_url_or_as_ever():
    assert ConnectorOptions().store_urls == ("memory",)
    assert ConnectorOptions(store="file", store_path="/k v").store_urls == ("file:///k%20v",)
    for url in ("file:///kv", "shm://kv"):
        options = ConnectorOptions.parse({"store": url})
        assert options.store_urls == (url,)
        options.require_reachable_store("mp")
    with pytest.raises(ConfigError, match="workers in other processes"):
        ConnectorOptions.parse({"store": "memory?verify=always"}).require_reachable_store("mp")
    with pytest.raises(ConfigError, match="holds a password") as raised:
        ConnectorOptions.parse({"store": "redis://me:hunter2@host"})
    assert "hunter2" not in str(raised.value)


def test_several_stores_are_tiers():
    urls = ["memory?capacity=64MiB", "file:///kv"]
    options = ConnectorOptions.parse({"store": urls})
    assert options.store_urls == tuple(urls)
    assert options.as_extra_config() == {"store": urls}
    assert ConnectorOptions.parse(options.as_extra_config()) == options
    assert ConnectorOptions.parse({"store": ["memory"]}) == ConnectorOptions()
    options.for_engine().require_room_for_chunk(64 << 20)
    with pytest.raises(ConfigError, match="the capacity of a store is 67108864, but one chunk"):
        options.for_engine().require_room_for_chunk((64 << 20) + 1)
    with pytest.raises(ConfigError, match="take shm://name instead of memory"):
        options.require_reachable_store("mp")


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ([], "no URL was given"),
        (["memory", "file"], "store is 'file', must be a URL"),
        (["memory", 7], "store is .* must be str or list of str"),
        (7, "store is 7, must be str or list of str"),
        (["file:///kv", "file:///kv"], "'file:///kv' and 'file:///kv' are one store"),
        (["memory", "redis://me:hunter2@host"], "holds a password"),
        (["memory?capacity=0", "file:///kv"], "capacity is '0'"),
    ],
)
def test_tiers_that_are_none_are_refused(store, said):
    with pytest.raises(ConfigError, match=said) as raised:
        ConnectorOptions.parse({"store": store})
    assert "hunter2" not in str(raised.value)


KEYS = [field.name for field in fields(ConnectorOptions)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
WORDS = [
    "memory",
    "file",
    "shm://kv",
    "/kv",
    "~/kv",
    "~nobody-at-all/kv",
    "a\0b",
    "\ud800",
    "",
    "load",
    "slo",
    "refuse",
]
LIKELY = st.sampled_from([*WORDS, 0, 1, 128, 0.5, 10**400, None, True, False])


@settings(max_examples=examples(500))
@given(config=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), LIKELY | JSON, max_size=4))
@example(config={"store": "file", "store_path": "~nobody-at-all/kv"})
@example(config={"store": "file", "store_path": "\ud800"})
@example(config={"store": "file", "store_path": "a\0b"})
@example(config={"profile_dir": "~nobody-at-all/kv"})
@example(config={"lookup_timeout_s": 10**400})
def test_any_configuration_is_one_or_refused(config):
    try:
        options = ConnectorOptions.parse(config)
    except ConfigError:
        return
    for name, value in config.items():
        several = tuple(value) if name == "store" and isinstance(value, list) else value
        assert getattr(options, name) in (several, several[0] if isinstance(several, tuple) else value)
    assert ConnectorOptions.parse(json.loads(json.dumps(options.as_extra_config()))) == options
    assert options.store_urls
    assert options.profile_path
