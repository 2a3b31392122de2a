"""What two requests share is restored once: waited for, then copied, never more than that."""

import pytest

pytest.importorskip("torch")

from cacheflow.restore.work import RestoreTarget
from cacheflow.vllm.scheduler.sharing import Following, Wanted, find_leader
from support.scheduler_cases import BLOCK, CHUNK, LAYERS, Case, Worker, tokens

pytestmark = pytest.mark.torch


def target(*, start=0, num_chunks=8, changed_from=99, namespace="n"):
    first = start // CHUNK
    ends = tuple(CHUNK * (index + 1) for index in range(first, num_chunks))
    return RestoreTarget(
        restore_id=0, request_id="r", start=start, object_start=first * CHUNK, chunk_ends=ends,
        tokens=(0,) * (ends[-1] - start), block_ids=tuple(range(500, 500 + ends[-1] // BLOCK)), namespace=namespace,
        chain_hashes=tuple(f"{'x' if index >= changed_from else 'c'}{index}" for index in range(first, num_chunks)),
    )  # fmt: skip


def find(other, *, resident, start=0, num_chunks=4, namespace="n"):
    hashes = tuple(f"c{index}" for index in range(start // CHUNK, num_chunks))
    wanted = Wanted(start=start, namespace=namespace, chain_hashes=hashes)
    return find_leader(wanted, [(other, lambda: resident)], chunk_tokens=CHUNK, block_size=BLOCK)


def test_the_shared_part_is_waited_for_and_copied_but_for_the_last_chunk_wanted():
    assert find(target(), resident=2 * CHUNK).following is Following.WAIT
    found = find(target(), resident=3 * CHUNK)
    assert found.following is Following.COPY
    assert found.end == 3 * CHUNK
    assert found.source_blocks == tuple(range(500, 500 + 3 * CHUNK // BLOCK))


def test_a_copy_starts_where_the_request_has_its_own():
    found = find(target(), resident=3 * CHUNK, start=CHUNK + BLOCK)
    assert found.source_blocks == tuple(range(500 + CHUNK // BLOCK + 1, 500 + 3 * CHUNK // BLOCK))


def test_texts_that_part_share_what_is_before():
    found = find(target(changed_from=2), resident=2 * CHUNK)
    assert (found.following, found.end) == (Following.COPY, 2 * CHUNK)
    assert find(target(changed_from=0), resident=8 * CHUNK).following is Following.NOBODY


def test_a_restoration_that_brings_nothing_else_is_waited_for():
    assert find(target(num_chunks=4), resident=4 * CHUNK).following is Following.WAIT
    assert find(target(num_chunks=2), resident=2 * CHUNK).following is Following.WAIT


def test_another_namespace_or_a_later_start_shares_nothing():
    assert find(target(namespace="other"), resident=8 * CHUNK).following is Following.NOBODY
    assert find(target(start=CHUNK), resident=8 * CHUNK).following is Following.NOBODY


def test_a_short_request_does_not_wait_for_the_whole_of_a_long_one():
    case = Case()
    prompt = case.saved_prompt(40 * CHUNK + 5, 40)
    case.arrive("long", prompt)
    case.arrive("short", [*prompt[: 6 * CHUNK], *tokens(20, seed=7)])
    case.begin("long")
    assert case.matched("short") is None
    worker = Worker(case)
    while case.side.num_matched("short", 0) is None:
        worker.carry_out(case.step())
    assert case.side.restorations.restoring("long"), "the long one is still under way"
    case.side.allocated("short", range(900, 900 + 6 * CHUNK // BLOCK), 6 * CHUNK)
    orders = case.step()
    (own,) = orders.targets
    assert own.start == 5 * CHUNK
    assert own.copied_from == tuple(range(100, 100 + 5 * CHUNK // BLOCK))
    assert own.block_ids == tuple(range(900, 900 + 6 * CHUNK // BLOCK))
    worker.carry_out(orders)
    worker.run()
    restored = [worker.restored[restore_id] for restore_id in worker.finished]
    assert worker.finished[0] == own.restore_id, "it ends first"
    assert [len(cells) for cells in restored] == [LAYERS, 40 * LAYERS]


def test_a_cancelled_restoration_is_no_source():
    case = Case()
    prompt = case.saved_prompt(40 * CHUNK + 5, 40)
    case.arrive("long", prompt)
    case.arrive("short", [*prompt[: 6 * CHUNK], *tokens(20, seed=7)])
    case.begin("long")
    assert case.matched("short") is None
    case.side.finished("long")
    assert case.side.num_matched("short", 0) == 6 * CHUNK
    case.side.allocated("short", range(900, 900 + 6 * CHUNK // BLOCK), 6 * CHUNK)
    assert case.step().targets[-1].copied_from == ()
