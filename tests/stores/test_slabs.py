"""Memory cut out of slabs: pieces are apart, what is given back is used again, and never before its copies are done."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.stores.slabs import SlabMemory
from support.lending import Copy, Reader

KIB = 1 << 10


def new_memory(reader=None, *, capacity_bytes=64 * KIB, slab_bytes=16 * KIB):
    return SlabMemory((reader or Reader()).new_memory, capacity_bytes=capacity_bytes, slab_bytes=slab_bytes)


def take_all(memory, num_bytes):
    pieces = []
    try:
        while True:
            pieces.append(memory.take(num_bytes))
    except MemoryError:
        return pieces


def test_slabs_come_one_by_one_up_to_the_bound():
    reader = Reader()
    memory = new_memory(reader, capacity_bytes=40 * KIB)
    assert [slab.nbytes for slab in reader.slabs] == [16 * KIB]
    assert len(take_all(memory, 3 * KIB)) == 20, "five in each, which is less than a slab and a hole each too many"
    assert [slab.nbytes for slab in reader.slabs] == [16 * KIB] * 4


def test_a_small_bound_has_a_small_slab_and_a_large_record_one_of_its_own():
    reader = Reader()
    memory = new_memory(reader, capacity_bytes=5 * KIB)
    assert [slab.nbytes for slab in reader.slabs] == [8 * KIB]
    memory = new_memory(reader)
    assert memory.take(20 * KIB).bytes.nbytes == 20 * KIB
    assert reader.slabs[-1].nbytes == 20 * KIB


def test_neighbours_that_are_given_back_make_one_hole():
    memory = new_memory(capacity_bytes=16 * KIB)
    pieces = take_all(memory, 4 * KIB)
    for index in (0, 2, 1):
        memory.give(pieces[index], [])
    assert memory.take(12 * KIB).bytes.nbytes == 12 * KIB
    with pytest.raises(MemoryError):
        memory.take(1)


def test_the_smallest_hole_that_fits_is_taken():
    memory = new_memory(capacity_bytes=16 * KIB)
    pieces = [memory.take(size * KIB) for size in (6, 2, 3, 2, 3)]
    memory.give(pieces[0], [])
    memory.give(pieces[2], [])
    memory.take(3 * KIB)
    assert memory.take(6 * KIB).bytes.nbytes == 6 * KIB


def test_memory_whose_copies_are_under_way_is_not_used_again():
    memory, copies = new_memory(capacity_bytes=16 * KIB), [Copy(), Copy()]
    [piece] = take_all(memory, 16 * KIB)
    memory.give(piece, copies)
    for copy in copies:
        assert set(memory.copies) == set(copies)
        with pytest.raises(MemoryError):
            memory.take(KIB)
        copy.is_done = True
    assert memory.take(16 * KIB).bytes.nbytes == 16 * KIB


def test_without_a_first_slab_there_is_no_such_memory():
    with pytest.raises(MemoryError):
        new_memory(Reader(most_bytes=KIB))


def test_where_no_more_can_be_page_locked_it_stays_at_that_and_says_so(caplog):
    reader = Reader(most_bytes=32 * KIB)
    with caplog.at_level(logging.WARNING):
        pieces = take_all(new_memory(reader), 4 * KIB)
    assert len(pieces) == 8
    assert "no more page-locked memory after 32768 bytes" in caplog.text


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 6 * KIB), st.booleans()), max_size=60),
    picks=st.randoms(use_true_random=False),
)
def test_pieces_never_overlap_and_no_memory_is_lost(steps, picks):
    reader = Reader(most_bytes=32 * KIB)
    memory = new_memory(reader)
    held, copies, number = [], [], 0
    for is_take, num_bytes, is_copied in steps:
        if is_take:
            number = number % 255 + 1
            try:
                piece = memory.take(num_bytes)
            except MemoryError:
                continue
            piece.bytes[:] = number
            held.append((piece, number))
        elif held:
            piece, written = held.pop(picks.randrange(len(held)))
            copy = Copy()
            copies += [(copy, piece, written)] * is_copied
            memory.give(piece, [copy] * is_copied)
        for piece, written in held:
            assert (piece.bytes == written).all()
        for _, piece, written in copies:
            assert (piece.bytes == written).all(), "it is still being copied"
        if copies and picks.random() < 0.5:
            copies.pop(picks.randrange(len(copies)))[0].is_done = True
    for piece, _ in held:
        memory.give(piece, [])
    for copy, *_ in copies:
        copy.is_done = True
    whole = [memory.take(16 * KIB) for _ in range(2)]
    assert not np.shares_memory(whole[0].bytes, whole[1].bytes)
