"""Activations between two pipeline stages, over a real process group of two processes; no vLLM needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from cacheflow.vllm.models.boundary_states import BoundaryPart, BoundaryShape, States
from cacheflow.vllm.worker.stage_link import StageLink

SENT = [(7, 0, 3), (8, 0, 3), (7, 1, 5), (8, 5, 2), (9, 0, 3)]
"""Restoration, chunk, tokens; in the order sent."""
HIDDEN = 4
SHAPE = BoundaryShape(
    (
        BoundaryPart("hidden_states", (HIDDEN,), torch.bfloat16),
        BoundaryPart("per_layer_inputs", (3, 2), torch.float32),
        BoundaryPart("residual", (HIDDEN,), torch.bfloat16),
    )
)


def activations(restore_id: int, chunk: int, num_tokens: int) -> States:
    hidden = torch.full((num_tokens, HIDDEN), 100.0 * restore_id + chunk, dtype=torch.bfloat16)
    more = torch.arange(6.0).view(3, 2).repeat(num_tokens, 1, 1) + chunk
    return {"residual": -hidden, "hidden_states": hidden, "per_layer_inputs": more}


def work(rank: int, rendezvous: str, answers: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    group = SimpleNamespace(
        next_rank=1 - rank, prev_rank=1 - rank, cpu_group=torch.distributed.group.WORLD, world_size=2,
        is_last_rank=rank == 1,
    )  # fmt: skip
    link = StageLink(group, device=torch.device("cpu"), shape=SHAPE)
    if rank == 0:
        for restore_id, chunk, num_tokens in SENT:
            given = None if restore_id == 9 else activations(restore_id, chunk, num_tokens)
            link.send(given, restore_id=restore_id, chunk=chunk, num_tokens=num_tokens)
        for _ in range(5):
            link.begin_step()  # frees what the other has received by then, and waits for it
        torch.save(sum(map(len, link._sent)), answers)  # noqa: SLF001 -- memory shows nowhere else
    else:
        got = {}
        for restore_id, chunk, num_tokens in reversed(SENT):
            taken = link.receive(restore_id=restore_id, chunk=chunk, num_tokens=num_tokens)
            got[restore_id, chunk] = taken
        torch.save(got, answers)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("link")
    spawn = torch.multiprocessing.get_context("spawn")
    files = [str(folder / f"answer-{rank}") for rank in range(2)]
    workers = [spawn.Process(target=work, args=(rank, str(folder / "meet"), files[rank])) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return [torch.load(file) for file in files]


def test_every_chunk_arrives_as_itself_whatever_the_order_of_the_receives(answers):
    for restore_id, chunk, num_tokens in SENT[:-1]:
        expected = activations(restore_id, chunk, num_tokens)
        taken = answers[1][restore_id, chunk]
        assert taken.keys() == expected.keys()
        assert all(torch.equal(taken[name], expected[name]) for name in expected)


def test_word_that_there_is_nothing_arrives_too(answers):
    assert answers[1][9, 0] is None


def test_what_was_received_is_freed(answers):
    assert answers[0] == 0
