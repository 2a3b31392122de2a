"""Models with recurrent layers (Gated DeltaNet) in an engine: restored, and equal to never forgotten, bit for bit.

Keys, values, running states, tokens and log-probabilities are compared. The weights are random and the
recurrent layers forget slowly: an error in a state shows long after.
"""

from collections import Counter

import numpy as np
import pytest

from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.keys import ObjectKind
from support.hybrid_answers import (
    CHUNK,
    END,
    PROMPT,
    WISHES,
    assert_a_wrong_state_shows,
    assert_equal,
    prompt,
    restored,
)
from support.v2_runner import WANTED

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
first_runner = pytest.mark.skipif(WANTED, reason="the second runner's kernels are interpreted: a few tests show it")

ROWS = 3


def faulty_store(options):
    from cacheflow.stores.memory import MemoryStore
    from cacheflow.stores.throttled import ThrottledStore

    store = FaultyStore(MemoryStore(capacity_bytes=options.cpu_bytes_to_use), FaultPlan())
    return ThrottledStore(store, options.throttle_bytes_per_s)


@pytest.fixture(scope="module")
def started(tmp_path_factory, _single_process_vllm):
    from support.connector_engine import serving_engine
    from support.random_weights import model_folder, random_weights

    changes = {"num_hidden_layers": 4 * ROWS, "decoder_sparse_step": 4 * ROWS}
    folder = model_folder(tmp_path_factory.mktemp("hybrids") / "qwen3_next", "qwen3_next", **changes)
    options = {"self_test": True, "throttle_bytes_per_s": 1e8, "policy": "cake"}
    arguments = {"load_format": "dummy", "num_gpu_blocks_override": 96, "connector": "CacheFlowHybridConnector"}
    with pytest.MonkeyPatch.context() as patch, random_weights():
        patch.setattr("cacheflow.vllm.startup.open_store.open_store", faulty_store)
        with serving_engine(folder, dtype="bfloat16", chunk_tokens=CHUNK, options=options, **arguments) as engine:
            yield engine


@pytest.fixture
def engine(started):
    """The engine with nothing cached and no faults; afterwards no block of it is lost."""
    started.evict()
    free_blocks = started.free_blocks
    yield started
    inject(started)
    started.run()
    started.evict()
    assert started.free_blocks == free_blocks


def inject(engine, *rules):
    """From now on the store fails by these rules."""
    engine.store.inner.set_plan(FaultPlan(rules=rules))


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_both_ways_at_once(engine, ratio):
    tokens = prompt(1)
    own = engine.saved(tokens, **WISHES)
    again = restored(engine, tokens, ratio=ratio)
    assert again.record["end"] == END
    assert again.record["loaded_cells"] > 0
    assert again.record["recomputed_cells"] > 0
    assert_equal(again, own)


def test_by_loading_alone(engine):
    tokens = prompt(2)
    own = engine.saved(tokens, **WISHES)
    again = engine.ask(tokens, params={"cacheflow": "load"}, **WISHES)
    assert again.record["recomputed_cells"] == 0
    kv_bytes = engine.layout.num_bytes(0, ROWS, END // CHUNK)
    assert again.record["loaded_bytes"] == kv_bytes + engine.states.num_bytes(0, 1)
    assert_equal(again, own)


@first_runner
def test_all_recomputed(engine):
    """The store has lost all of it since it was asked."""
    tokens = prompt(3)
    own = engine.saved(tokens, **WISHES)
    inject(engine, FaultRule(fault=Fault.MISS))
    again = restored(engine, tokens, ratio=1.0)
    assert again.record["loaded_cells"] == 0
    assert again.record["outcome"] == "done"
    assert_equal(again, own)


def lost(engine, tokens, kind, *, chunk, row):
    """One object that cannot be read any more."""
    from cacheflow.stores.keys import RankKeys, chain_hashes

    hashes = chain_hashes(tokens, list(range(CHUNK, END + 1, CHUNK)))
    name = engine.side.identity.namespace(None), hashes[chunk].hex(), (row, row + 1)
    key = RankKeys().states(*name) if kind is ObjectKind.STATE else RankKeys().kv(*name)
    return FaultRule(fault=Fault.MISS, matches=lambda each: each == key)


LAST = END // CHUNK - 1


@first_runner
@pytest.mark.parametrize("row", range(ROWS))
def test_a_lost_state(engine, row):
    """Its row is recomputed to the end, with all below it."""
    tokens = prompt(4)
    own = engine.saved(tokens, **WISHES)
    inject(engine, lost(engine, tokens, ObjectKind.STATE, chunk=LAST, row=row))
    again = restored(engine, tokens, ratio=0.5)
    assert again.record["failed_loads"]["miss"] == 1
    assert again.record["outcome"] == "done"
    assert all("l" not in column[: row + 1] for column in again.record["cells"])
    assert_equal(again, own)


@first_runner
@pytest.mark.parametrize(("chunk", "row"), [(2, 1), (3, 0), (6, 2), (LAST, 1)])
def test_lost_keys_and_values(engine, chunk, row):
    tokens = prompt(5)
    own = engine.saved(tokens, **WISHES)
    inject(engine, lost(engine, tokens, ObjectKind.KV, chunk=chunk, row=row))
    again = restored(engine, tokens, ratio=0.5)
    assert again.record["outcome"] == "done"
    assert_equal(again, own)


@first_runner
def test_an_end_short_of_what_is_saved(engine):
    """Where two prompts part there is no state at first: the second leaves one, and the third is restored to it."""
    first, second, third = (prompt(6)[:900] + prompt(seed, 250) for seed in (6, 7, 8))
    engine.saved(first, **WISHES)
    seconds = engine.ask(second, **WISHES)
    assert seconds.records == []
    assert "running states are stored at the end of" in seconds.params["cacheflow_reason"]
    own = engine.own(third, **WISHES)
    again = restored(engine, third, ratio=1.0)
    assert again.record["end"] == 896
    assert_equal(again, own)


def test_what_vllm_has_itself_is_gone_on_from(engine):
    tokens = prompt(9)
    own = engine.saved(tokens, **WISHES)
    engine.ask(tokens[:800], params={"cacheflow": "off"}, num_tokens=1)
    again = restored(engine, tokens, ratio=1.0)
    assert again.record["start"] == 768
    assert again.record["recomputed_cells"] > 0
    assert again.record["loaded_cells"] > 0
    assert_equal(again, own)


def test_a_failure_in_the_middle_is_computed_by_vllm(engine, monkeypatch):
    tokens = prompt(10)
    own = engine.saved(tokens, **WISHES)
    engine.balance_link(PROMPT, ratio=4.0)
    from cacheflow.vllm.models.partial_forward import PartialForward

    run, calls = PartialForward.run, []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return run(*args, **kwargs)

    monkeypatch.setattr(PartialForward, "run", failing)
    again = engine.ask(tokens, **WISHES)
    assert len(calls) >= 2
    assert again.record["outcome"] == "failed"
    assert_equal(again, own)


@first_runner
def test_two_at_once(engine):
    prompts = [prompt(11), prompt(12)]
    owns = [engine.saved(tokens, **WISHES) for tokens in prompts]
    engine.balance_link(PROMPT, ratio=1.0)
    names = [engine.submit(tokens, **WISHES) for tokens in prompts]
    engine.run()
    for name, own in zip(names, owns, strict=True):
        assert engine.answers[name].record["recomputed_cells"] > 0
        assert_equal(engine.answers[name], own, alone=False)


@first_runner
def test_the_same_prompt_at_once_and_later_is_restored_once(engine):
    """VLLM's own cache keeps the states where a restored prefix ends, also within a prompt."""
    first = prompt(20)
    own = engine.saved(first, **WISHES)
    longer = first[:END] + prompt(21, 300)
    engine.balance_link(PROMPT, ratio=1.0)
    names = [engine.submit(tokens, **WISHES) for tokens in (longer, first)]
    engine.run()
    assert engine.answers[names[0]].record["end"] == END
    assert engine.answers[names[1]].records == []
    assert_equal(engine.answers[names[1]], own)
    later = engine.ask(first[:END] + prompt(22, 300), **WISHES)
    assert later.records == []
    assert "of 1324 tokens 1024 are in the KV cache" in later.params["cacheflow_reason"]


@first_runner
def test_beside_a_request_that_decodes(engine):
    tokens = prompt(13)
    own = engine.saved(tokens, **WISHES)
    others = engine.own(prompt(14, 300), num_tokens=64).tokens
    engine.balance_link(PROMPT, ratio=1.0)
    other = engine.submit(prompt(14, 300), num_tokens=64, params={"cacheflow": "off"})
    engine.run(until=lambda: len(engine.answers[other].tokens) > 4)
    again = engine.ask(tokens, **WISHES)
    assert again.record["recomputed_cells"] > 0
    assert_equal(again, own, alone=False)
    assert engine.answers[other].tokens == others


@first_runner
def test_preempted_and_restored_again(engine):
    tokens = prompt(15)
    own = engine.saved(tokens, num_tokens=24)
    engine.balance_link(PROMPT, ratio=1.0)
    name = engine.submit(tokens, num_tokens=24)
    engine.run(until=lambda: len(engine.answers[name].tokens) > 4)
    request = engine.request(name)
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request.num_preemptions == 1
    engine.poison()
    engine.run()
    assert len(engine.answers[name].records) == 2
    assert engine.answers[name].tokens == own.tokens


@first_runner
def test_preempted_after_its_answer_has_outgrown_the_prompt(engine):
    """It is restored to the last chunk that it decoded itself, of which the states are written as it is preempted."""
    end = 3 * CHUNK
    engine.balance_link(PROMPT, ratio=0.01)
    name = engine.submit(prompt(23, CHUNK + 100), num_tokens=2 * CHUNK)
    engine.run(until=lambda: engine.request(name).num_computed_tokens >= end)
    states = engine.gather_states(engine.state_blocks(name, end))
    kv = engine.gather(engine.block_ids(name)[:3])
    engine.run(until=lambda: len(engine.answers[name].tokens) > CHUNK + 60)
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.poison()
    engine.run(until=lambda: engine.request(name).num_computed_tokens > end)
    assert np.array_equal(engine.gather(engine.block_ids(name)[:3]), kv)
    assert np.array_equal(engine.gather_states(engine.state_blocks(name, end)), states)
    engine.run()
    assert engine.answers[name].record["end"] == end


def test_a_reply_is_restored_up_to_its_last_chunk(engine):
    """The next turn of a chat: states that only decoding passed are written when the reply ends."""
    first, end = prompt(16), 1280
    name = engine.submit(first, num_tokens=200)
    engine.run(until=lambda: engine.request(name).num_computed_tokens >= end)
    states = engine.gather_states(engine.state_blocks(name, end))
    kv = engine.gather(engine.block_ids(name)[: end // CHUNK])
    engine.run()
    turn = first + engine.answers[name].tokens + prompt(17, 60)
    engine.ask(prompt(18, 20), num_tokens=1, params={"cacheflow": "off"})  # vLLM tells workers of ends a step later
    engine.evict()
    again = engine.ask(turn, params={"cacheflow": "load"}, **WISHES)
    assert again.record["end"] == end == (len(turn) - 1) // CHUNK * CHUNK
    assert np.array_equal(again.kv, kv)
    assert np.array_equal(again.states, states)


@first_runner
@pytest.mark.parametrize("wrong", ["none", "of an earlier chunk", "a little"])
def test_a_wrong_state_shows(engine, wrong):
    tokens = prompt(19)
    own = engine.own(tokens, **WISHES)
    assert_a_wrong_state_shows(engine, tokens, own, wrong, end=END, step=2 * CHUNK)


@first_runner
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_soak(engine):
    """Prompts that part here and there come together, are aborted, preempted and read from a failing store."""
    engine.configure(save_decode_kv=False)  # decoding rounds in another way than the prefill that is compared with
    chances = np.random.default_rng(7)
    stems = [prompt(100 + stem, 1200) for stem in range(3)]
    asked = [stems[n % 3][: 150 + 80 * (n % 11)] + prompt(200 + n, 40 + 30 * (n % 5)) for n in range(24)]
    owns = [engine.own(tokens, num_tokens=6).tokens for tokens in asked]
    free_blocks, outcomes, met, wrong = engine.free_blocks, Counter(), Counter(), []
    faults = [FaultRule(fault=fault, probability=0.1) for fault in (Fault.MISS, Fault.CORRUPT, Fault.ERROR, Fault.LATE)]
    for _ in range(60):
        inject(engine, *(faults if chances.random() < 0.5 else ()))
        engine.balance_link(PROMPT, ratio=float(chances.choice([0.3, 1.0, 3.0])))
        chosen = [int(each) for each in chances.integers(0, len(asked), chances.integers(1, 5))]
        names = [engine.submit(asked[each], num_tokens=6) for each in chosen]
        for _ in range(int(chances.integers(0, 12))):
            if engine.busy:
                engine.step()
        fate = chances.random()
        if fate < 0.25 and engine.answers[names[0]].finish_reason is None:
            engine.abort(names[0])
        elif fate < 0.5 and not engine.side.has_work:  # vLLM preempts nobody who waits for a connector
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.run()
        for each, name in zip(chosen, names, strict=True):
            answer = engine.answers[name]
            outcomes.update(record["outcome"] for record in answer.records)
            met["after vLLM's own"] += sum(record["start"] > 0 for record in answer.records)
            met["reads failed"] += sum(bool(record["failed_loads"]) for record in answer.records)
            if answer.finish_reason != "abort" and answer.tokens != owns[each]:
                wrong.append((each, answer.records))
        if chances.random() < 0.7:
            inject(engine)
            engine.evict()
            assert engine.free_blocks == free_blocks
    assert wrong == []
    assert outcomes["done"] > 20
    assert min(met[each] for each in ("after vLLM's own", "reads failed")) > 0, met
    assert set(outcomes) <= {"done", "cancelled"}
