"""A chunk is ordered once for all who asked before; who asked after the order knows better."""

from hypothesis import given
from hypothesis import strategies as st

from cacheflow.vllm.scheduler import saves as module
from cacheflow.vllm.scheduler.saves import SaveLog
from cacheflow.vllm.step import SaveWork


def order(chunk, namespace="n"):
    return SaveWork(namespace=namespace, chain_hash=f"{chunk:064x}", block_ids=(chunk,))


def test_those_who_asked_before_the_order_do_not_order_again():
    saves = SaveLog()
    assert saves.new([order(1), order(2)], asked_after_saves=0) == [order(1), order(2)]
    assert saves.new([order(1), order(2), order(3)], asked_after_saves=0) == [order(3)]
    assert saves.new([order(1, "other")], asked_after_saves=0) == [order(1, "other")]


def test_who_asked_after_the_order_and_heard_that_it_is_missing_orders_again():
    saves = SaveLog()
    saves.new([order(1)], asked_after_saves=0)
    num_saves = saves.num_saves
    assert saves.new([order(1)], asked_after_saves=num_saves) == [order(1)]
    assert saves.new([order(1)], asked_after_saves=num_saves) == []


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=60))
def test_what_is_remembered_is_bounded_and_what_is_forgotten_is_ordered_again(steps):
    with_bound, saves = 3, SaveLog()
    full, module.MAX_REMEMBERED = module.MAX_REMEMBERED, with_bound
    last: list[int] = []
    try:
        for chunk, ask_now in steps:
            ordered = saves.new([order(chunk)], asked_after_saves=saves.num_saves if ask_now else 0)
            assert bool(ordered) == (ask_now or chunk not in last[-with_bound:])
            if ordered:
                last = [*(each for each in last if each != chunk), chunk]
            assert len(saves._last_save_of) <= with_bound  # noqa: SLF001 -- memory shows nowhere else
    finally:
        module.MAX_REMEMBERED = full
