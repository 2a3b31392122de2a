"""Pipeline stages and tensor-parallel ranks in processes of their own restore one prefix together, bit for bit.

One store outlives all engines of this file: what two stages saved one engine restores, and nobody takes another rank's
heads for its own. Engines start once each; what they are asked is a script, and the tests look at what came of it.
"""

import os

import numpy as np
import pytest

from support.rank_cases import (
    AUTO,
    BYTES_PER_S,
    CHUNK,
    LAYERS,
    LOAD,
    NUM_CHUNKS,
    OFF,
    SAVE,
    Setting,
    asked,
    both_ways,
    equal,
    llama_setting,
    loaded,
    record_of,
    request,
    saved,
)
from support.v2_runner import first_runner

BYTES_PER_LAYER = NUM_CHUNKS * CHUNK * 2 * 2 * 32 * 4  # two KV heads, keys and values, float32
NUM_RESTORATIONS = int(os.environ.get("CACHEFLOW_SOAK_REQUESTS", "60"))
PATIENCE_S = 450.0 + 2.0 * NUM_RESTORATIONS
MIXED = (700, 517, 300)
"""Lengths of prompts that are prefilled together, beside one that decodes."""

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3 * PATIENCE_S)]


FAULTS = (("hang", "kv"), ("error", "kv"), ("miss", "hidden"), ("hang", "hidden"), ("corrupt", "hidden"))
SOAKED = (request(1, AUTO, num_tokens=8), *(request(10 + i, AUTO, count=n, num_tokens=8) for i, n in enumerate(MIXED)))


@pytest.fixture(scope="module")
def setting(tmp_path_factory, rank_host):
    return llama_setting(tmp_path_factory.mktemp("ranks"), rank_host, patience_s=PATIENCE_S)


@pytest.fixture(scope="module")
def soaks(request):
    """Whether restorations are soaked too, for minutes."""
    return request.config.getoption("--long")


@pytest.fixture(scope="module")
def two_stages(setting, soaks):
    """What an engine of two stages answered; its first stage held the lower half of the layers."""
    from support.rank_engine import break_reads, set_bandwidth, take_only

    script = setting.script(pipeline=2)
    saved(script, 1)
    script.do("free_blocks", "free before")
    asked(script, "sooner way", request(1, AUTO))
    script.do("scheduler_side", function=take_only, args=("stored",))
    asked(script, "both pointers", request(1, AUTO))
    loaded(script, "load", request(1, LOAD))
    mixed = [request(10 + index, SAVE, count=count) for index, count in enumerate(MIXED)]
    script.do("evict").do("ask", requests=[request(20, OFF, count=40, num_tokens=60), *mixed], kv=False).do("settle")
    for index, count in enumerate(MIXED[:2]):
        asked(script, f"mixed {index}", request(10 + index, AUTO, count=count))
    for fault, kind in FAULTS:
        script.do("call", function=break_reads, args=((1, 0), fault, kind))
        asked(script, f"{fault} {kind}", request(1, AUTO))
    script.do("call", function=break_reads, args=((1, 0), "", "kv"))
    script.do("evict").do("free_blocks", "free after faults")
    if soaks:
        script.do("soak", "soak", requests=list(SOAKED), num_restorations=NUM_RESTORATIONS)
        script.do("evict").do("free_blocks", "free after")
    script.do("forget", "forgotten", kind="hidden", store=str(setting.store))
    script.do("scheduler_side", function=take_only, args=("handed_over",))
    script.do("call", function=set_bandwidth, args=(BYTES_PER_S / 10,))  # so that the links leave something to compute
    asked(script, "", request(1, AUTO))  # learns how slow the links are now
    asked(script, "handed over", request(1, AUTO))
    script.do("call", function=set_bandwidth, args=(BYTES_PER_S,))
    if soaks:
        script.do("evict").do("soak", "soak in order", requests=list(SOAKED), num_restorations=NUM_RESTORATIONS // 3)
    script.do("evict").do("killed", "killed", rank=1, request=request(1, AUTO))
    return setting.run(script, "two-stages")


@pytest.fixture(scope="module")
def two_tensor_ranks(setting, two_stages, soaks):
    """What an engine of two tensor-parallel ranks answered, which found in the store what others had saved."""
    from support.rank_engine import break_reads

    script = setting.script(tensor=2)
    asked(script, "own", request(1, OFF))
    asked(script, "first", request(1, AUTO))
    script.do("settle")
    asked(script, "restored", request(1, AUTO))
    loaded(script, "load", request(1, LOAD))
    script.do("call", function=break_reads, args=((0, 1), "hang", "kv"))
    asked(script, "hang", request(1, AUTO))
    script.do("call", function=break_reads, args=((0, 1), "", "kv"))
    if soaks:
        script.do("soak", "soak", requests=list(SOAKED[:1]), num_restorations=NUM_RESTORATIONS // 2)
    script.do("evict").do("ask", requests=[request(1, LOAD | {"keep": 600}, num_tokens=2)])
    script.do("kept", "kept", num_chunks=NUM_CHUNKS, store=str(setting.store))
    return setting.run(script, "two-tensor-ranks")


@pytest.fixture(scope="module")
def one_rank(setting, two_stages, two_tensor_ranks):
    """What an engine of one rank answered, which runs last."""
    script = setting.script()
    asked(script, "own", request(1, OFF))
    for index, count in enumerate(MIXED):
        asked(script, f"own {index}", request(10 + index, OFF, count=count))
    asked(script, "restored", request(1, AUTO))
    return setting.run(script, "one-rank")


@pytest.fixture(scope="module")
def plain(setting):
    """The same vLLM without the connector."""
    script = setting.script()
    script.options = None
    return setting.run(asked(script, "own", request(1, None)), "plain")["own"][0]


def test_without_the_connector_vllm_answers_the_same(one_rank, plain):
    assert np.array_equal(plain["kv"], one_rank["own"][0]["kv"])
    assert plain["tokens"] == one_rank["own"][0]["tokens"]


def test_two_stages_restore_at_once_each_with_both_pointers(two_stages, one_rank):
    record = record_of(two_stages["both pointers"])
    assert record["outcome"] == "done"
    assert [stage["boundary_source"] for stage in record["stages"]] == ["first_stage", "stored"]
    for stage in record["stages"]:
        assert both_ways(stage) == NUM_CHUNKS * LAYERS // 2
    assert record["stages"][1]["boundary_bytes"] > 0
    assert record["bound_restore_s"] == max(stage["bound_restore_s"] for stage in record["stages"])
    equal(two_stages["both pointers"], one_rank["own"])


def test_two_stages_take_the_sooner_way_to_their_activations(two_stages, one_rank):
    record = record_of(two_stages["sooner way"])
    assert record["outcome"] == "done"
    assert record["stages"][1]["boundary_source"] in ("stored", "handed_over")
    equal(two_stages["sooner way"], one_rank["own"])


def test_two_stages_load_each_its_own_layers(two_stages, one_rank):
    record = record_of(two_stages["load"])
    assert [stage["loaded_cells"] for stage in record["stages"]] == [NUM_CHUNKS * LAYERS // 2] * 2
    assert record["loaded_bytes"] == LAYERS * BYTES_PER_LAYER
    equal(two_stages["load"], one_rank["own"])


def test_boundary_states_of_a_mixed_batch_are_those_of_each_request(two_stages, one_rank):
    """Prefills that shared their steps with each other and with a decoding request, cut where vLLM cut them."""
    for index in range(2):
        record = record_of(two_stages[f"mixed {index}"])
        assert record["outcome"] == "done"
        assert record["stages"][1]["boundary_bytes"] > 0
        answer, own = two_stages[f"mixed {index}"][0], one_rank[f"own {index}"][0]
        # Another chunk grid rounds differently in the last bits; a boundary of another request is another world.
        ours, theirs = (each["kv"].view(np.float32) for each in (answer, own))
        assert np.allclose(ours, theirs, atol=1e-3)
        assert answer["tokens"] == own["tokens"]


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_a_store_that_one_rank_cannot_read_costs_time_only(two_stages, one_rank, fault, kind):
    answers = two_stages[f"{fault} {kind}"]
    records = answers[0]["params"]["cacheflow"]
    assert len(records) == 1
    assert two_stages["free after faults"] == two_stages["free before"]
    if kind == "hidden":
        assert records[0]["stages"][1]["recomputed_cells"] == 0  # nothing to start from: the stage loads
        assert records[0]["outcome"] == "done"
        equal(answers, one_rank["own"])
    else:
        assert answers[0]["tokens"] == one_rank["own"][0]["tokens"]


def test_without_boundary_states_activations_are_handed_over_in_order(two_stages, one_rank):
    assert two_stages["forgotten"] >= NUM_CHUNKS
    record = record_of(two_stages["handed over"])
    assert record["stages"][1]["boundary_source"] == "handed_over"
    assert record["stages"][1]["boundary_bytes"] == 0
    assert record["stages"][1]["recomputed_cells"] > 0
    equal(two_stages["handed over"], one_rank["own"])


@pytest.mark.long
def test_a_soak_of_restorations_leaves_nothing_behind(two_stages, two_tensor_ranks, one_rank):
    """Several at a time, decoding beside restoring, some aborted: from stored states, in order, and tensor-parallel."""
    owns = [one_rank["own"], *(one_rank[f"own {index}"] for index in range(len(MIXED)))]
    soaks = (
        (two_stages["soak"], owns, NUM_RESTORATIONS),
        (two_stages["soak in order"], owns, NUM_RESTORATIONS // 3),
        (two_tensor_ranks["soak"], [two_tensor_ranks["own"]], NUM_RESTORATIONS // 2),
    )
    for soak, own, least in soaks:
        assert all(ended["tokens"] == own[ended["index"]][0]["tokens"][:8] for ended in soak)
        assert sum(record["outcome"] == "done" for ended in soak for record in ended["records"]) >= least
    sources = {
        record["stages"][1]["boundary_source"] for ended in two_stages["soak in order"] for record in ended["records"]
    }
    assert sources == {"handed_over"}
    assert two_stages["free after"] == two_stages["free before"]


def test_a_rank_that_dies_ends_the_engine_with_an_error(two_stages):
    assert two_stages["killed"]


def test_another_split_into_stages_restores_what_two_stages_saved(one_rank):
    record = record_of(one_rank["restored"])
    assert record["outcome"] == "done"
    assert record["loaded_cells"] > 0
    assert "stages" not in record
    equal(one_rank["restored"], one_rank["own"])


def test_nobody_takes_another_ranks_heads_for_its_own(two_tensor_ranks, one_rank):
    """One store for one rank, two ranks, and one again: each split finds what its own kind of rank saved, only."""
    assert two_tensor_ranks["first"][0]["params"]["cacheflow"] == []
    equal(two_tensor_ranks["restored"], two_tensor_ranks["own"])
    assert not np.array_equal(two_tensor_ranks["own"][0]["kv"].reshape(-1), one_rank["own"][0]["kv"].reshape(-1))


def test_two_tensor_ranks_restore_with_both_pointers_at_work(two_tensor_ranks):
    record = record_of(two_tensor_ranks["restored"])
    assert record["outcome"] == "done"
    assert record["recomputed_cells"] >= LAYERS
    assert record["loaded_cells"] >= LAYERS
    assert record["recomputed_cells"] + record["loaded_cells"] == NUM_CHUNKS * LAYERS
    assert 0 < record["loaded_bytes"] < LAYERS * BYTES_PER_LAYER // 2
    record = record_of(two_tensor_ranks["load"])
    assert (record["outcome"], record["loaded_cells"]) == ("done", NUM_CHUNKS * LAYERS)
    equal(two_tensor_ranks["load"], two_tensor_ranks["own"])


def test_every_rank_keeps_the_objects_of_all(two_tensor_ranks):
    assert two_tensor_ranks["kept"] == {"pinned": NUM_CHUNKS, "files": 2 * NUM_CHUNKS * LAYERS}


def test_a_link_that_stalls_on_one_tensor_rank_costs_time_only(two_tensor_ranks):
    (record,) = two_tensor_ranks["hang"][0]["params"]["cacheflow"]
    assert record["recomputed_cells"] > 0
    assert two_tensor_ranks["hang"][0]["tokens"] == two_tensor_ranks["own"][0]["tokens"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "pipeline", "tensor", "eager"), [("pp4", 4, 1, True), ("pp2-tp2", 2, 2, True), ("compiled", 2, 1, False)]
)
def test_more_ranks_and_compiled_stages(setting, name, pipeline, tensor, eager):
    """Against what the same engine answers when the connector leaves a request alone."""
    from support.rank_engine import take_only

    script = setting.script(pipeline=pipeline, tensor=tensor, store_path=str(setting.folder / name))
    script.eager = eager
    saved(script, 1)
    asked(script, "own", request(1, OFF))
    for source in ("stored", "handed_over"):
        script.do("scheduler_side", function=take_only, args=(source,))
        asked(script, source, request(1, AUTO))
    loaded(script, "load", request(1, LOAD))
    answers = setting.run(script, name)
    for source in ("stored", "handed_over"):
        record = record_of(answers[source])
        assert record["outcome"] == "done"
        assert [stage["boundary_source"] for stage in record["stages"]] == ["first_stage", *[source] * (pipeline - 1)]
        assert record["recomputed_cells"] > 0
        equal(answers[source], answers["own"])
    equal(answers["load"], answers["own"])


@first_runner  # what stages hand over is the model's
@pytest.mark.parametrize("source", ["stored", "handed_over"])
def test_stages_that_hand_over_one_tensor(one_tensor, source):
    """Granite's stages hand over no residual."""
    record = record_of(one_tensor[source])
    assert record["outcome"] == "done"
    assert [stage["boundary_source"] for stage in record["stages"]] == ["first_stage", source]
    assert record["recomputed_cells"] > 0
    equal(one_tensor[source], one_tensor["own"])


@pytest.fixture(scope="module")
def one_tensor(tmp_path_factory, rank_host):
    from support.rank_engine import take_only
    from support.vllm_models import write_model

    folder = tmp_path_factory.mktemp("granite")
    model = write_model(folder / "model", "granite", num_hidden_layers=LAYERS, embedding_multiplier=3.0, pad_token_id=0)
    setting = Setting(str(model), folder, rank_host, PATIENCE_S)
    script = setting.script(pipeline=2)
    saved(script, 1)
    asked(script, "own", request(1, OFF))
    for source in ("stored", "handed_over"):
        script.do("scheduler_side", function=take_only, args=(source,))
        asked(script, source, request(1, AUTO))
    return setting.run(script, "granite")


def with_other_heads(folder, host):
    """A model whose layers without a window have fewer and wider heads; the lower half of the layers are alike."""
    from support.vllm_models import write_model

    types = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention", "full_attention"]
    model = write_model(
        folder / "model", "gemma4_text", num_hidden_layers=LAYERS, layer_types=types, sliding_window=100,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, global_head_dim=64, num_global_key_value_heads=1,
        attention_k_eq_v=True, hidden_size_per_layer_input=0, vocab_size_per_layer_input=512, pad_token_id=0,
    )  # fmt: skip
    return Setting(str(model), folder, host, PATIENCE_S)


@pytest.mark.long
@pytest.mark.parametrize(("pipeline", "tensor"), [(2, 1), (1, 2)])
def test_ranks_of_layers_with_other_heads(tmp_path, rank_host, pipeline, tensor):
    """Two tensor-parallel ranks share four heads of some layers, and each have the one head of the others."""
    from support.rank_engine import take_only

    setting = with_other_heads(tmp_path, rank_host)
    script = setting.script(pipeline=pipeline, tensor=tensor)
    saved(script, 1)
    asked(script, "own", request(1, OFF))
    script.do("scheduler_side", function=take_only, args=("stored",))
    asked(script, "restored", request(1, AUTO))
    loaded(script, "load", request(1, LOAD))
    answers = setting.run(script, "ranks")
    assert record_of(answers["restored"])["recomputed_cells"] > 0
    restored = [answers["restored"], answers["load"]]
    if tensor == 1:  # one engine loads what both stages saved, of whatever shape
        restored += [setting.run(asked(setting.script(), "load", request(1, LOAD)), "one-rank")["load"]]
    for each in restored:
        assert record_of(each)["outcome"] == "done"
        assert record_of(each)["loaded_cells"] > 0
        equal(each, answers["own"])
    window_bytes, full_bytes = 2 * (4 // tensor) * 32 * 4, 2 * 1 * 64 * 4
    loaded_bytes = NUM_CHUNKS * CHUNK * (4 * window_bytes + 2 * full_bytes)
    assert record_of(answers["load"])["loaded_bytes"] == loaded_bytes


LATENT_BYTES = CHUNK * (512 + 64) * 4  # of a chunk in a layer: latents and rotated keys, float32


@pytest.fixture(scope="module")
def latent(tmp_path_factory, rank_host):
    """What two tensor-parallel ranks of latent attention answered, and what an engine that started after them did."""
    from transformers import AutoConfig

    from support.random_weights import model_folder
    from support.rank_engine import written_bytes
    from support.vllm_models import write_weights

    folder = tmp_path_factory.mktemp("latent")
    config = AutoConfig.from_pretrained(model_folder(folder / "config", "deepseek_v3", num_hidden_layers=LAYERS))
    setting = Setting(str(write_weights(folder / "model", config)), folder, rank_host, PATIENCE_S)
    first, later = (setting.script(tensor=2, throttle_bytes_per_s=9 * BYTES_PER_S) for _ in range(2))
    for script in (first, later):
        script.num_kv_blocks = 40 * 128 // 16  # KV blocks of latent attention hold 16 tokens
        script.do("hold_to_chunks")
    first.do("call", "written before", function=written_bytes)
    first.do("ask", "own", requests=[request(1, SAVE)]).do("settle")
    first.do("call", "written", function=written_bytes).do("stored", "stored", kind="kv", store=str(setting.store))
    for script in (first, later):
        asked(script, "restored", request(1, AUTO))
        loaded(script, "load", request(1, LOAD))
    later.do("settle").do("stored", "stored", kind="kv", store=str(setting.store))
    asked(later, "own", request(1, OFF))
    return setting.run(first, "first"), setting.run(later, "later")


@first_runner  # who stores what all ranks keep is decided by the kind of cache
def test_of_latents_that_all_ranks_keep_one_object_is_stored(latent):
    from cacheflow.stores.record import HEADER_BYTES

    first, later = latent
    own = first["own"][0]["kv"]
    assert np.array_equal(own[:, 0], own[:, 1])
    written = [after - before for after, before in zip(first["written"], first["written before"], strict=True)]
    assert written == [NUM_CHUNKS * LAYERS * LATENT_BYTES, 0]
    assert len(first["stored"]) == NUM_CHUNKS * LAYERS
    assert set(first["stored"].values()) == {HEADER_BYTES + LATENT_BYTES}
    assert later["stored"] == first["stored"]


@first_runner
@pytest.mark.parametrize("engine", ["the one that saved", "one that started later"])
def test_all_ranks_restore_from_the_one_object_of_latents(latent, engine):
    answers = latent[engine == "one that started later"]
    record = record_of(answers["restored"])
    assert record["outcome"] == "done"
    assert both_ways(record) == NUM_CHUNKS * LAYERS
    equal(answers["restored"], latent[0]["own"])
    record = record_of(answers["load"])
    assert (record["outcome"], record["loaded_cells"]) == ("done", NUM_CHUNKS * LAYERS)
    equal(answers["load"], latent[0]["own"])
    equal(answers["own"], latent[0]["own"])
