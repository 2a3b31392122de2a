"""Faults through the whole stack: whatever a store does, the answer is right and the failure is counted."""

import shutil
import signal
from pathlib import Path

import pytest

from cacheflow.embedded import Engine
from cacheflow.plan.report import SpanKind
from cacheflow.policies.registry import RESTORE_POLICIES
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import ObjectKind
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.record import HEADER_BYTES
from support.embedded_cases import (
    answer,
    assert_nothing_runs,
    assert_same,
    make_engine,
    never_evicted,
    sampling_of,
    tiny,
    turns,
)
from support.servers import free_port, running_redis
from support.store_kinds import ALL, url_of

CAPACITY = 64 << 20
HASTY = ExecutorOptions(deadline=ReadDeadline(floor_s=0.03, factor=0.1))
SEEN_AS = {
    Fault.MISS: "miss",
    Fault.CORRUPT: "corrupt",
    Fault.ERROR: "error",
    Fault.LATE: "late",
    Fault.HANG: "late",
}


@pytest.fixture
def model():
    return tiny("llama", "bfloat16")


def is_cell(key):
    return key.kind is ObjectKind.KV


def play(engine: Engine):
    """Every turn from an evicted state, each compared with the session that never was; the replies."""
    session, replies = engine.session(), []
    for turn, tokens in enumerate(turns()):
        session.evict()
        played = answer(session, tokens, sampling=sampling_of(turn))
        assert_nothing_runs()
        assert_same(played, never_evicted(engine.model)[turn])
        replies.append(played.reply)
    return replies


def failed(replies):
    """Failed reads by outcome, over all turns."""
    counts: dict[str, int] = {}
    for reply in replies:
        for outcome, count in (reply.report.failed_loads if reply.report else {}).items():
            counts[outcome] = counts.get(outcome, 0) + count
    return counts


@pytest.fixture(params=ALL)
def url(request, tmp_path):
    return url_of(request.param, request, tmp_path / "store")


@pytest.mark.parametrize("policy", ["load", "layerwise_load", "cacheflow"])
@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.ERROR])
def test_a_read_that_fails_is_recomputed_and_counted(model, fault, policy, url):
    plan = FaultPlan(rules=(FaultRule(fault=fault, matches=is_cell, every=4),), seed=1)
    with FaultyStore(open_store(url, capacity_bytes=CAPACITY), plan) as store:
        replies = play(make_engine(model, store, policy=policy))
        injected = store.injected()[fault]
    counts = failed(replies)
    assert set(counts) <= {SEEN_AS[fault]}
    if policy != "cacheflow":  # which may be through before the fourth read
        assert 0 < counts[SEEN_AS[fault]] <= injected
    spans = [span for reply in replies if reply.report for span in reply.report.spans]
    assert sum(span.kind is SpanKind.FAILED for span in spans) == sum(counts.values())


@pytest.mark.parametrize("policy", ["load", "cacheflow"])
@pytest.mark.parametrize("fault", [Fault.LATE, Fault.HANG])
def test_a_read_that_never_says_it_is_done_is_late(model, fault, policy, url):
    plan = FaultPlan(rules=(FaultRule(fault=fault, matches=is_cell, every=3, limit=4),))
    with FaultyStore(open_store(url, capacity_bytes=CAPACITY), plan) as store:
        replies = play(make_engine(model, store, policy=policy, executor=HASTY))
    assert set(failed(replies)) <= {"late"}
    if policy == "load":
        assert failed(replies)["late"] > 0


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.ERROR])
@pytest.mark.parametrize("policy", ["load", "cacheflow"])
def test_a_store_that_only_fails_is_given_up_soon(model, fault, policy):
    plan = FaultPlan(rules=(FaultRule(fault=fault, matches=is_cell),))
    with FaultyStore(MemoryStore(capacity_bytes=CAPACITY), plan) as store:
        replies = play(make_engine(model, store, policy=policy))
    for reply in replies[1:]:
        assert reply.report.loaded_cells == 0
        assert sum(reply.report.failed_loads.values()) <= 4 + 3  # four in a row, and what was in flight
        assert reply.report.failed_loads or policy == "cacheflow"


@pytest.mark.parametrize(("seed", "policy"), list(enumerate(RESTORE_POLICIES)))
def test_everything_goes_wrong_at_once(model, seed, policy):
    """Notes of partial chunks and writes fail too."""
    rules = tuple(FaultRule(fault=fault, probability=0.12) for fault in Fault if fault is not Fault.HANG)
    hang = FaultRule(fault=Fault.HANG, matches=is_cell, probability=0.1)
    with FaultyStore(MemoryStore(capacity_bytes=CAPACITY), FaultPlan(rules=(*rules, hang), seed=seed)) as store:
        engine = make_engine(model, store, policy=policy, executor=HASTY, lookup_deadline_s=0.2)
        replies = play(engine)
        assert sum(store.injected().values()) > 0
    assert any(reply.saved.num_failed for reply in replies)


def test_failed_writes_are_counted_and_only_cost_hits(model, url):
    plan = FaultPlan(rules=(FaultRule(fault=Fault.PUT_ERROR, matches=is_cell, every=5),))
    with FaultyStore(open_store(url, capacity_bytes=CAPACITY), plan) as store:
        replies = play(make_engine(model, store, policy="load"))
    assert not replies[0].saved.complete
    assert replies[0].saved.num_failed == 2  # the fifth and tenth of twelve cells
    assert replies[1].restored_tokens == 32  # the second chunk lacks its middle layer
    assert failed(replies) == {}


# Files on disk


def cells(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and "_kv_" in path.name)


def notes(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and "_next_" in path.name)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_into_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: HEADER_BYTES // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_in(position: int):
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 0x10
        path.write_bytes(content)

    return flip


DAMAGES = {
    "truncated by a byte": truncate,
    "truncated in the header": cut_into_header,
    "emptied": empty,
    "grown": grow,
    "bit flipped in the header": flip_in(20),
    "bit flipped in the checksum": flip_in(140),
    "bit flipped in the payload": flip_in(HEADER_BYTES + 100),
    "last bit flipped": flip_in(-1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_file_is_recomputed_counted_and_written_again(model, tmp_path, damage):
    with FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False) as store:
        session = make_engine(model, store, policy="load").session()
        answer(session, turns()[0])
        victim = cells(tmp_path)[5]
        intact = victim.read_bytes()
        damage(victim)
        session.evict()
        played = answer(session, turns()[1], sampling=sampling_of(1))
        assert_same(played, never_evicted(model)[1])
        assert played.reply.report.failed_loads == {"corrupt": 1}
        assert played.reply.report.recomputed_cells > 0
        assert victim.read_bytes() == intact
        session.evict()
        again = answer(session, turns()[2])
        assert_same(again, never_evicted(model)[2])
        assert again.reply.report.failed_loads == {}


def cells_of_chunks(root: Path) -> list[list[Path]]:
    """The files of each chunk, layers ascending."""
    by_chunk: dict[str, list[Path]] = {}
    for path in cells(root):
        by_chunk.setdefault(path.name.split("_")[1], []).append(path)
    return list(by_chunk.values())


@pytest.mark.parametrize("between", ["layers", "chunks"])
def test_swapped_files_are_not_taken_for_each_other(model, tmp_path, between):
    with FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False) as store:
        session = make_engine(model, store, policy="load").session()
        answer(session, turns()[0])
        full = [
            chunk for chunk in cells_of_chunks(tmp_path) if chunk[0].stat().st_size == cells(tmp_path)[0].stat().st_size
        ]
        one, other = (full[0][0], full[0][1]) if between == "layers" else (full[0][1], full[1][1])
        mine, theirs = one.read_bytes(), other.read_bytes()
        assert len(mine) == len(theirs)
        one.write_bytes(theirs)
        other.write_bytes(mine)
        session.evict()
        played = answer(session, turns()[1], sampling=sampling_of(1))
        assert_same(played, never_evicted(model)[1])
        failed = played.reply.report.failed_loads
        # The one that fails first has its chunk recomputed; a read of the other that has not ended by then is let go.
        assert failed in ({"corrupt": 1}, {"corrupt": 2})
        session.evict()
        assert_same(answer(session, turns()[2]), never_evicted(model)[2])


def test_a_damaged_note_on_disk_costs_the_partial_chunk(model, tmp_path):
    with FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False) as store:
        session = make_engine(model, store).session()
        answer(session, turns()[0])
        (note,) = notes(tmp_path)
        truncate(note)
        session.evict()
        played = answer(session, turns()[1], sampling=sampling_of(1))
    assert played.reply.restored_tokens == 96
    assert_same(played, never_evicted(model)[1])


def test_missing_files_shorten_what_is_restored(model, tmp_path):
    with FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False) as store:
        session = make_engine(model, store).session()
        answer(session, turns()[0])
        for path in cells(tmp_path):
            path.unlink()
        session.evict()
        played = answer(session, turns()[1], sampling=sampling_of(1))
        assert played.reply.restored_tokens == 0
        assert_same(played, never_evicted(model)[1])
        assert played.reply.saved.complete
        session.evict()
        again = answer(session, turns()[2])
        assert again.reply.restored_tokens == played.chunk_ends[-1]  # everything was written again
        assert_same(again, never_evicted(model)[2])


def test_a_store_that_was_deleted_is_made_anew_and_filled_again(model, tmp_path):
    with FileStore(tmp_path / "store", capacity_bytes=CAPACITY, fsync=False) as store:
        session = make_engine(model, store).session()
        answer(session, turns()[0])
        shutil.rmtree(tmp_path / "store")
        saved_ends = ()
        for turn in (1, 2):
            session.evict()
            played = answer(session, turns()[turn], sampling=sampling_of(turn))
            assert_same(played, never_evicted(model)[turn])
            assert played.reply.restored_tokens == (saved_ends[-1] if saved_ends else 0)
            assert played.reply.saved.complete
            saved_ends = played.chunk_ends


def test_a_store_that_is_closed_costs_time_and_writes_only(model, tmp_path):
    with FileStore(tmp_path / "store", capacity_bytes=CAPACITY, fsync=False) as store:
        session = make_engine(model, store).session()
        answer(session, turns()[0])
        store.close()
        for turn in (1, 2):
            session.evict()
            played = answer(session, turns()[turn], sampling=sampling_of(turn))
            assert_same(played, never_evicted(model)[turn])
            assert played.reply.saved.num_written == 0
            assert not played.reply.saved.complete
            # The files are still there, reading them is over.
            assert played.reply.report.loaded_cells == 0
            assert set(played.reply.report.failed_loads) == {"error"}


def test_a_store_deleted_between_lookup_and_reads(model, tmp_path):
    """The reads miss, four in a row, and compute restores everything."""

    def delete_at_first_read(key):
        if is_cell(key):
            shutil.rmtree(tmp_path / "store", ignore_errors=True)
        return False

    inner = FileStore(tmp_path / "store", capacity_bytes=CAPACITY, fsync=False)
    rule = FaultRule(fault=Fault.MISS, matches=delete_at_first_read)
    with FaultyStore(inner, FaultPlan(rules=(rule,))) as store:
        session = make_engine(model, store, policy="load").session()
        answer(session, turns()[0])
        session.evict()
        played = answer(session, turns()[1], sampling=sampling_of(1))
    assert_same(played, never_evicted(model)[1])
    assert played.reply.restored_tokens == 118
    assert played.reply.report.loaded_cells == 0
    assert set(played.reply.report.failed_loads) == {"miss"}


# A server that goes


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("policy", ["load", "cacheflow"])
def test_a_server_that_dies_or_hangs_between_lookup_and_reads(model, tmp_path, blow, policy):
    port = free_port()
    struck = []

    def strike_at_first_read(key):
        if is_cell(key) and not struck:
            server.process.send_signal(blow)
            struck.append(key)
        return False

    plan = FaultPlan(rules=(FaultRule(fault=Fault.MISS, matches=strike_at_first_read),))
    with running_redis(tmp_path, port=port) as server:
        inner = open_store(f"{server.url}?timeout_s=0.3", capacity_bytes=CAPACITY)
        with FaultyStore(inner, plan) as store:
            session = make_engine(model, store, policy=policy, executor=HASTY).session()
            answer(session, turns()[0])
            for turn in (1, 2):
                session.evict()
                assert_same(answer(session, turns()[turn], sampling=sampling_of(turn)), never_evicted(model)[turn])
            assert struck
            server.process.kill()
    assert_nothing_runs()
