"""Ranks that Ray starts restore one prefix as those of vLLM's multiprocessing do, bit for bit, from the same store."""

import importlib.util

import pytest

from support.lacking import lacking
from support.rank_cases import (
    AUTO,
    BYTES_PER_S,
    LAYERS,
    LOAD,
    NUM_CHUNKS,
    OFF,
    asked,
    both_ways,
    equal,
    llama_setting,
    loaded,
    record_of,
    request,
    saved,
)

PATIENCE_S = 300.0

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3 * PATIENCE_S)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory, rank_host):
    if importlib.util.find_spec("ray") is None:
        lacking("needs Ray, which `make setup-vllm` installs")
    return llama_setting(tmp_path_factory.mktemp("ray"), rank_host, patience_s=PATIENCE_S)


def ray_script(setting, **ranks):
    script = setting.script(**ranks)
    script.executor = "ray"
    return script


@pytest.fixture(scope="module")
def two_tensor_ranks(setting):
    """What two tensor-parallel ranks under Ray answered."""
    from support.rank_engine import break_reads

    script = ray_script(setting, tensor=2)
    saved(script, 1)
    script.do("free_blocks", "free before")
    asked(script, "restored", request(1, AUTO))
    loaded(script, "load", request(1, LOAD))
    for fault in ("hang", "error"):
        script.do("call", function=break_reads, args=((0, 1), fault, "kv"))
        asked(script, fault, request(1, AUTO))
    script.do("evict").do("free_blocks", "free after faults")
    return setting.run(script, "two-tensor-ranks")


@pytest.fixture(scope="module")
def two_stages(setting):
    """What two pipeline stages under Ray answered, until one was killed."""
    from support.rank_engine import break_reads, set_bandwidth, take_only

    script = ray_script(setting, pipeline=2)
    saved(script, 1)
    script.do("scheduler_side", function=take_only, args=("stored",))
    loaded(script, "load", request(1, LOAD))
    script.do("call", function=break_reads, args=((1, 0), "hang", "kv"))
    asked(script, "hang", request(1, AUTO))
    script.do("call", function=break_reads, args=((1, 0), "", "kv"))
    script.do("call", function=set_bandwidth, args=(BYTES_PER_S / 10,))  # so that the links leave something to compute
    for source in ("stored", "handed_over"):
        script.do("scheduler_side", function=take_only, args=(source,))
        asked(script, "", request(1, AUTO))  # learns how slow the links are now
        asked(script, source, request(1, AUTO))
    script.do("evict").do("killed", "killed", rank=1, request=request(1, AUTO))
    return setting.run(script, "two-stages")


@pytest.fixture(scope="module")
def multiprocessing_ranks(setting, two_tensor_ranks):
    """What two tensor-parallel ranks in processes of vLLM's own answered, which found what Ray's had saved."""
    script = setting.script(tensor=2)
    asked(script, "own", request(1, OFF))
    asked(script, "restored", request(1, AUTO))
    return setting.run(script, "multiprocessing")


@pytest.fixture(scope="module")
def one_rank(setting, two_stages):
    """What an engine of one rank answered, which found what Ray's stages had saved."""
    script = setting.script()
    asked(script, "own", request(1, OFF))
    asked(script, "restored", request(1, AUTO))
    return setting.run(script, "one-rank")


def test_two_tensor_ranks_restore_with_both_pointers(two_tensor_ranks, multiprocessing_ranks):
    record = record_of(two_tensor_ranks["restored"])
    assert record["outcome"] == "done"
    assert both_ways(record) == NUM_CHUNKS * LAYERS
    equal(two_tensor_ranks["restored"], multiprocessing_ranks["own"])


def test_two_tensor_ranks_load(two_tensor_ranks, multiprocessing_ranks):
    record = record_of(two_tensor_ranks["load"])
    assert (record["outcome"], record["loaded_cells"]) == ("done", NUM_CHUNKS * LAYERS)
    equal(two_tensor_ranks["load"], multiprocessing_ranks["own"])


@pytest.mark.parametrize("fault", ["hang", "error"])
def test_a_fault_on_one_tensor_rank_costs_time_only(two_tensor_ranks, multiprocessing_ranks, fault):
    assert record_of(two_tensor_ranks[fault])["recomputed_cells"] > 0
    assert two_tensor_ranks[fault][0]["tokens"] == multiprocessing_ranks["own"][0]["tokens"]
    assert two_tensor_ranks["free after faults"] == two_tensor_ranks["free before"]


@pytest.mark.parametrize("source", ["stored", "handed_over"])
def test_two_stages_restore_at_once(two_stages, one_rank, source):
    record = record_of(two_stages[source])
    assert record["outcome"] == "done"
    assert [stage["boundary_source"] for stage in record["stages"]] == ["first_stage", source]
    assert all(stage["recomputed_cells"] > 0 for stage in record["stages"])
    assert record["loaded_cells"] > 0
    equal(two_stages[source], one_rank["own"])


def test_two_stages_load_each_its_own_layers(two_stages, one_rank):
    record = record_of(two_stages["load"])
    assert [stage["loaded_cells"] for stage in record["stages"]] == [NUM_CHUNKS * LAYERS // 2] * 2
    equal(two_stages["load"], one_rank["own"])


def test_a_fault_on_one_stage_costs_time_only(two_stages, one_rank):
    assert record_of(two_stages["hang"])["stages"][1]["recomputed_cells"] > 0
    assert two_stages["hang"][0]["tokens"] == one_rank["own"][0]["tokens"]


def test_what_rays_ranks_saved_others_restore(multiprocessing_ranks, one_rank):
    for answers in (multiprocessing_ranks, one_rank):
        record = record_of(answers["restored"])
        assert record["outcome"] == "done"
        assert record["loaded_cells"] > 0
        equal(answers["restored"], answers["own"])


def test_a_rank_that_dies_ends_the_engine_with_an_error(two_stages):
    assert two_stages["killed"]
