import dataclasses
import json
import os
from importlib import metadata
from pathlib import Path

import pytest

from cacheflow.bench.vllm.policies import (
    OWN_POLICIES,
    QUICK_POLICIES,
    LinkSetup,
    link_note,
    transfer_config,
    vllm_policies,
)
from cacheflow.bench.vllm.random_weights import LOAD_FORMAT
from cacheflow.bench.vllm.server import ServerOptions, server_command, server_environment
from cacheflow.errors import ConfigError
from cacheflow.policies.registry import RESTORE_POLICIES
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.plugin import HYBRID_CONNECTOR

SETUP = LinkSetup(bytes_per_s=2e7, chunk_tokens=512, store_dir=Path("/s"), profile_dir=Path("/p"), side_port=5555)
SERVER = ServerOptions(
    python=Path("python"), model_dir=Path("/m"), dtype="bfloat16", chunk_tokens=512, max_tokens=4165, kv_cache_gib=1,
    compiled=False, log_dir=Path("/l"),
)  # fmt: skip


def test_a_kv_cache_given_in_bytes_is_not_overruled_by_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    sized = dataclasses.replace(SERVER, kv_cache_bytes=123_000)
    command = server_command(sized, port=1, transfer=None)
    assert command[command.index("--kv-cache-memory-bytes") + 1] == "123000"
    assert "VLLM_CPU_KVCACHE_SPACE" not in server_environment(sized)
    assert server_environment(SERVER)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "--kv-cache-memory-bytes" not in server_command(SERVER, port=1, transfer=None)


def test_the_latency_asked_for_reaches_our_connector_alone():
    asked = dataclasses.replace(SETUP, itl_slo_ms=60.0)
    for policy in vllm_policies():
        extra = (transfer_config(policy, asked) or {}).get("kv_connector_extra_config", {})
        assert extra.get("itl_slo_ms") == (60.0 if policy in OWN_POLICIES else None)
        assert "itl_slo_ms" not in str(transfer_config(policy, SETUP))


def test_a_hybrid_gets_its_own_connector_and_blocks_as_long_as_a_chunk():
    config = transfer_config("cacheflow", dataclasses.replace(SETUP, connector=HYBRID_CONNECTOR))
    assert config is not None
    assert config["kv_connector"] == "CacheFlowHybridConnector"
    assert config["kv_connector_module_path"] == "cacheflow.vllm.hybrid_connector"
    command = server_command(dataclasses.replace(SERVER, hybrid=True), port=1, transfer=None)
    assert command[command.index("--block-size") + 1] == "512"
    assert "--block-size" not in server_command(SERVER, port=1, transfer=None)


def test_a_store_is_files_or_the_servers_memory_and_as_large_as_asked():
    files = transfer_config("cacheflow", dataclasses.replace(SETUP, store_bytes=7_000_000_000))
    memory = transfer_config("cacheflow", dataclasses.replace(SETUP, store_dir=None))
    assert files is not None
    assert memory is not None
    extra = ConnectorOptions.parse(files["kv_connector_extra_config"])
    assert (extra.store, extra.store_path, extra.cpu_bytes_to_use) == ("file", "/s", 7_000_000_000)
    extra = ConnectorOptions.parse(memory["kv_connector_extra_config"])
    assert (extra.store, extra.store_path) == ("memory", None)


def test_random_weights_are_a_load_format():
    command = server_command(dataclasses.replace(SERVER, load_format=LOAD_FORMAT), port=1, transfer=None)
    assert command[command.index("--load-format") + 1] == LOAD_FORMAT
    assert "--load-format" not in server_command(SERVER, port=1, transfer=None)


def test_a_machine_without_a_network_is_found_at_its_loopback_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    assert server_environment(SERVER)["VLLM_HOST_IP"] == "127.0.0.1"
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.7")
    assert server_environment(SERVER)["VLLM_HOST_IP"] == "10.0.0.7"


def test_stock_vllm_gets_no_connector():
    assert transfer_config("vllm", SETUP) is None
    assert "--kv-transfer-config" not in server_command(SERVER, port=1, transfer=None)


@pytest.mark.parametrize("policy", ["load", "cake", "cacheflow"])
def test_our_policies_differ_in_the_policy_alone(policy: str):
    config = transfer_config(policy, SETUP)
    assert config is not None
    assert config["kv_connector_module_path"] == "cacheflow.vllm.connector"
    extra = config["kv_connector_extra_config"]
    assert extra.pop("policy") == policy
    assert policy in RESTORE_POLICIES
    other = transfer_config("load", SETUP)
    assert other is not None
    assert {**other["kv_connector_extra_config"], "policy": None} == {**extra, "policy": None}


def test_every_policy_that_loads_is_told_the_bandwidth_or_has_a_relay():
    for policy in set(vllm_policies()) - {"vllm", "lmcache"}:
        config = transfer_config(policy, SETUP)
        assert config is not None
        assert config["kv_connector_extra_config"]["throttle_bytes_per_s"] == 2e7
    lmcache = transfer_config("lmcache", SETUP)
    assert lmcache is not None
    assert lmcache["kv_connector_extra_config"]["lmcache.mp.port"] == 5555
    assert "relay" in link_note("lmcache")


def test_lmcache_without_a_server_is_refused():
    alone = LinkSetup(bytes_per_s=1.0, chunk_tokens=512, store_dir=Path("/s"), profile_dir=Path("/p"))
    with pytest.raises(ConfigError, match="port of LMCache"):
        transfer_config("lmcache", alone)


def test_failed_loads_are_recomputed_not_failed():
    for policy in set(vllm_policies()) - {"vllm"}:
        config = transfer_config(policy, SETUP)
        assert config is not None
        assert config["kv_load_failure_policy"] == "recompute"


def test_the_configuration_reaches_the_command_line_as_json():
    config = transfer_config("cacheflow", SETUP)
    command = server_command(SERVER, port=81, transfer=config)
    assert json.loads(command[command.index("--kv-transfer-config") + 1]) == config
    assert command[command.index("--max-num-batched-tokens") + 1] == "512"
    assert "--enforce-eager" in command


def test_vllm_can_import_what_the_configuration_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    ours, entry_points, theirs = server_environment(SERVER)["PYTHONPATH"].split(":")
    found = [point for each in metadata.distributions(path=[entry_points]) for point in each.entry_points]
    assert {(point.group, point.name) for point in found} == {
        ("vllm.general_plugins", "cacheflow"), ("vllm.general_plugins", "cacheflow_random")
    }  # fmt: skip
    assert all(callable(point.load()) for point in found)
    assert (Path(ours) / "cacheflow" / "bench" / "vllm" / "rivals" / "offloading_spec.py").is_file()
    assert theirs == "/theirs"


def test_every_policy_says_how_its_link_is_slowed_down():
    assert all(map(link_note, vllm_policies()))
    assert set(QUICK_POLICIES) < set(vllm_policies())


def test_unknown_policies_are_refused():
    with pytest.raises(ConfigError, match="known are vllm, load"):
        transfer_config("magic", SETUP)


def test_without_its_folder_there_are_no_rivals_and_ours_run_all_the_same(monkeypatch: pytest.MonkeyPatch):
    from cacheflow.bench.vllm import policies

    monkeypatch.setattr(policies, "find_spec", lambda name: None)
    policies.rivals.cache_clear()
    try:
        assert policies.rivals() == {}
        with pytest.raises(ConfigError, match="'lmcache' is not known"):
            transfer_config("lmcache", SETUP)
        assert transfer_config("cake", SETUP) is not None
    finally:
        policies.rivals.cache_clear()


def test_all_servers_compute_on_the_same_cores_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    cores = server_environment(SERVER)["VLLM_CPU_OMP_THREADS_BIND"].split(",")
    assert {int(core) for core in cores} == os.sched_getaffinity(0)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert server_environment(SERVER)["VLLM_CPU_OMP_THREADS_BIND"] == "0"
