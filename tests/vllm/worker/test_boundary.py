"""What a later pipeline stage is handed is kept by request and chunk, whatever else is in the batch; no vLLM needed."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from cacheflow.errors import ConfigError
from cacheflow.stores.keys import WHOLE, ObjectKind, Shard
from cacheflow.stores.memory import MemoryStore
from cacheflow.tensors.row_copy import HostRows
from cacheflow.vllm.compat import RunnerKind
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.models.boundary_states import BoundaryPart, BoundaryShape
from cacheflow.vllm.step import NOTHING, CaptureWork, SaveWork, StepWork
from cacheflow.vllm.worker import boundary
from cacheflow.vllm.worker.batch_rows import BatchRows
from cacheflow.vllm.worker.boundary import BoundaryCapture
from cacheflow.vllm.worker.layout import BlockLayout, LayerView
from cacheflow.vllm.worker.side import WorkerSide
from support.scheduler_cases import facts

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("way")]

CHUNK, HIDDEN, FIRST_LAYER = 8, 4, 3
SHAPE = BoundaryShape(tuple(BoundaryPart(name, (HIDDEN,), torch.bfloat16) for name in ("hidden_states", "residual")))


class Stage(torch.nn.Module):
    """A model that overwrites what it is handed, as vLLM's layers do."""

    def forward(self, *, input_ids, positions, intermediate_tensors, inputs_embeds=None):
        for states in intermediate_tensors.values():
            states.zero_()


def states(request_id, token, *, residual):
    """What a token of a request is handed: every token another."""
    base = hash((request_id, token, residual)) % 4099
    return torch.arange(base, base + HIDDEN, dtype=torch.float32).bfloat16()


class KeepsItsBatch:
    """What the first generation of vLLM's runner knows of its batch."""

    def __init__(self):
        self.input_batch, self.query_start_loc = SimpleNamespace(req_ids=[]), SimpleNamespace(np=np.zeros(64, np.int32))

    def begin_step(self, names, starts):
        self.input_batch.req_ids = names
        self.query_start_loc.np[: len(starts)] = starts


class MakesABatch:
    """The second generation's."""

    def prepare_inputs(self, names, *, starts):
        return SimpleNamespace(req_ids=names, query_start_loc_np=np.array(starts, np.int32))

    def begin_step(self, names, starts):
        assert self.prepare_inputs(names, starts=starts).req_ids == names


class LaterRows(HostRows):
    """Rows that are copied at once and come later, as on a device; ``may_come`` says when."""

    immediate = False
    may_come: ClassVar[bool] = False

    def __init__(self, device):
        self.device = device

    def copy_out(self, *tensors):
        rows = super().copy_out(*(tensor.clone() for tensor in tensors))
        return SimpleNamespace(arrived=lambda: self.may_come, take=rows.take)


WAYS = {
    "v1": (KeepsItsBatch, RunnerKind.V1, "cpu", False), "v2": (MakesABatch, RunnerKind.V2, "cpu", False),
    "later": (MakesABatch, RunnerKind.V2, "cpu", True), "cuda": (MakesABatch, RunnerKind.V2, "cuda", False),
}  # fmt: skip


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible to torch")
    monkeypatch.setattr(Case, "way", request.param)
    if WAYS[request.param][3]:
        monkeypatch.setattr(boundary, "row_copies", LaterRows)


@dataclass
class Case:
    """A later stage whose batches the test makes."""

    counts: Counts = field(default_factory=Counts)
    batch_tokens: int = 64
    way: ClassVar[str] = "v1"

    def __post_init__(self):
        self.model = Stage()
        make_runner, kind, device, _ = WAYS[self.way]
        self.runner, self.device = make_runner(), torch.device(device)
        handle = SimpleNamespace(
            model=self.model, runner=self.runner, boundary=SHAPE, start_layer=FIRST_LAYER,
            shard=Shard(tp_rank=0, tp_size=2, pp_rank=1, pp_size=2), device=self.device, runner_kind=kind,
        )  # fmt: skip
        self.capture = BoundaryCapture(handle, chunk_tokens=CHUNK, batch_tokens=self.batch_tokens, counts=self.counts)

    def forward(self, *spans, wanted=None, shift=0):
        """One forward over ``(request, first token, one past the last)``; keeps all of it unless told what."""
        orders = spans if wanted is None else wanted
        self.capture.expect([CaptureWork(request_id=name, start=start, end=end) for name, start, end in orders])
        self.run(*spans, shift=shift)

    def run(self, *spans, shift=0):
        tokens = [(name, token) for name, start, end in spans for token in range(start, end)]
        ends = np.cumsum([end - start for _, start, end in spans])
        self.runner.begin_step([name for name, _, _ in spans], [0, *ends])
        both = {
            key: torch.stack([states(*token, residual=key == "residual") for token in tokens]).to(self.device)
            for key in ("hidden_states", "residual")
        }
        positions = torch.tensor([token + shift for _, token in tokens], device=self.device)
        self.model(input_ids=None, positions=positions, intermediate_tensors=both)

    def object(self, name, chunk):
        """The object of a chunk, as tensors ``[2, tokens, C]``; None when there is none."""
        found = self.capture.put(save_of(name, chunk))()
        self.capture.expect(())  # what another thread found out is counted here
        if not found:
            return None
        return as_tensor(found)


def save_of(name, chunk):
    return SaveWork(namespace="a" * 32, chain_hash=f"{chunk:064x}", block_ids=(0,), request_id=name, chunk=chunk)


def as_tensor(found):
    """The one object of a chunk, as tensors ``[2, tokens, C]``."""
    (put,) = found
    assert (put.key.kind, put.key.layer_lo, put.key.layer_hi) == (ObjectKind.HIDDEN, FIRST_LAYER, FIRST_LAYER)
    assert put.key.shard == Shard(tp_rank=0, tp_size=2)
    assert put.shape == (CHUNK, SHAPE.token_bytes)
    return torch.from_numpy(np.concatenate(put.buffers)).view(torch.bfloat16).view(2, CHUNK, HIDDEN)


def expected(name, chunk):
    tokens = range(chunk * CHUNK, (chunk + 1) * CHUNK)
    return torch.stack([torch.stack([states(name, t, residual=r) for t in tokens]) for r in (False, True)])


def test_a_batch_of_several_requests_is_told_apart():
    """Prefill of one, the end of another's chunk, a decode token, and a request nobody wants, in one forward."""
    case = Case()
    case.forward(("b", 0, 5), ("d", 8, 15))
    case.forward(("a", 0, 16), ("off", 3, 9), ("b", 5, 11), ("d", 15, 16),
                 wanted=[("d", 15, 16), ("a", 0, 16), ("b", 5, 11)])  # fmt: skip
    for name, chunk in (("a", 0), ("a", 1), ("b", 0), ("d", 1)):
        assert torch.equal(case.object(name, chunk), expected(name, chunk))
    assert case.object("off", 0) is None
    assert case.object("b", 1) is None  # not complete
    assert case.counts.boundaries == {"captured": 4, "incomplete": 2}


def test_recomputation_through_the_same_model_is_not_looked_at():
    case = Case()
    case.forward(("a", 0, 8))
    case.run(("a", 0, 8), shift=0)
    assert torch.equal(case.object("a", 0), expected("a", 0))


def test_only_what_is_wanted_of_a_request():
    case = Case()
    case.forward(("a", 0, 24), wanted=[("a", 8, 16)])
    assert case.object("a", 0) is None
    assert torch.equal(case.object("a", 1), expected("a", 1))


def test_a_chunk_with_a_hole_is_not_saved_and_one_computed_again_is():
    case = Case()
    case.forward(("a", 4, 8))  # tokens 0 to 3 came from the prefix cache
    assert case.object("a", 0) is None
    case.forward(("b", 0, 6))
    case.forward(("b", 0, 4))  # preempted, computed again in other steps
    case.forward(("b", 4, 8))
    assert torch.equal(case.object("b", 0), expected("b", 0))


def test_rows_that_are_not_where_the_batch_says_are_not_saved():
    """Negative control: positions prove whose rows they are."""
    case = Case()
    case.forward(("a", 0, 8), shift=8)
    assert case.object("a", 0) is None
    assert case.counts.boundaries == {"missed": 1, "incomplete": 1}


def test_rows_that_end_with_another_token_are_not_saved():
    case = Case()
    case.capture.expect([CaptureWork(request_id="a", start=0, end=8)])
    case.runner.begin_step(["a"], [0, 8])
    both = {
        key: torch.ones(8, HIDDEN, dtype=torch.bfloat16, device=case.device) for key in ("hidden_states", "residual")
    }
    positions = torch.tensor([*range(7), 12], device=case.device)
    case.model(input_ids=None, positions=positions, intermediate_tensors=both)
    assert case.object("a", 0) is None
    assert case.counts.boundaries == {"missed": 1, "incomplete": 1}


def test_a_batch_is_told_for_one_forward_and_the_runner_left_as_it_was():
    runner = MakesABatch()
    rows = BatchRows(runner, RunnerKind.V2)
    runner.begin_step(["a", "b"], [0, 3, 8])
    assert rows.of_batch() == {"a": (0, 3), "b": (3, 8)}
    assert rows.of_batch() == {}
    rows.close()
    rows.close()
    assert not vars(runner).get("prepare_inputs")


def test_a_runner_that_does_not_tell_its_rows_is_refused():
    with pytest.raises(ConfigError, match=r"lacks prepare_inputs.*boundary_states=false"):
        BatchRows(SimpleNamespace(), RunnerKind.V2)


def test_a_failure_does_not_reach_the_forward():
    case = Case()
    case.capture.expect([CaptureWork(request_id="a", start=0, end=8)])
    case.runner.begin_step(["a"], [0, 8])
    alone = {"hidden_states": torch.ones(8, HIDDEN, dtype=torch.bfloat16)}  # no residual
    case.model(input_ids=None, positions=torch.arange(8), intermediate_tensors=alone)
    assert not alone["hidden_states"].any()  # the model ran


def test_a_forward_that_was_not_seen_is_missed_and_the_next_is_not_taken_for_it():
    """A replayed graph runs none of the model's Python code; recomputation behind it does."""
    case = Case()
    case.capture.expect([CaptureWork(request_id="a", start=0, end=8)])
    case.capture.forward_ended()
    case.run(("a", 0, 8))
    assert case.object("a", 0) is None
    assert case.counts.boundaries == {"unseen": 1, "incomplete": 1}


def test_a_worker_looks_at_no_forward_but_the_step_s_own():
    """Behind the forward it recomputes through the same model; a step that wants nothing takes the last one's back."""
    case = Case()
    engine = SimpleNamespace(
        handle=SimpleNamespace(shard=WHOLE, can_recompute=False),
        layout=BlockLayout([LayerView("0", torch.zeros(4, 2, 4))], block_size=4, layout_name=""),
        states=None,
        facts=facts(block_size=4),
    )
    state = SimpleNamespace(begin_step=lambda work: None)
    store = MemoryStore(capacity_bytes=1 << 20)
    worker = WorkerSide(store, engine, state, chunk_tokens=CHUNK, capture=case.capture, room=None, counts=case.counts)
    wanted = (CaptureWork(request_id="a", start=0, end=8),)
    worker.expect(StepWork(captures=wanted))
    worker.carry_out(StepWork())
    case.run(("a", 0, 8))
    assert case.object("a", 0) is None
    worker.expect(StepWork(captures=wanted))
    worker.expect(NOTHING)
    case.run(("a", 0, 8))
    assert case.object("a", 0) is None
    worker.expect(StepWork(captures=wanted))
    case.run(("a", 0, 8))
    worker.carry_out(StepWork())
    assert torch.equal(case.object("a", 0), expected("a", 0))


def test_a_failure_on_the_way_to_the_host_reaches_no_step(monkeypatch, caplog):
    """Of what went wrong nothing is kept, and no later step looks at rows that were overwritten meanwhile."""
    case = Case()
    monkeypatch.setattr(boundary.np, "empty", lambda shape, dtype: np.zeros((shape[0], 3), dtype))  # no room for a row
    case.forward(("a", 0, 8), ("b", 0, 8))
    case.capture.expect(())
    assert case.object("a", 0) is None
    assert case.object("b", 0) is None
    assert case.counts.boundaries["missed"] == 2
    assert "could not be copied" in caplog.text
    monkeypatch.undo()
    case.forward(("a", 8, 16), ("b", 8, 16))
    assert torch.equal(case.object("b", 1), expected("b", 1))


def test_what_is_never_completed_is_forgotten(monkeypatch):
    case = Case()
    case.forward(("a", 0, 4), ("b", 0, 4))
    case.capture.forget({"a"})
    case.forward(("a", 4, 8), ("b", 4, 8))
    assert case.object("a", 0) is None
    assert torch.equal(case.object("b", 0), expected("b", 0))


def test_there_is_room_for_two_batches_and_whole_chunks_go_last(monkeypatch):
    monkeypatch.setattr(boundary, "MAX_CAPTURED_BYTES", 1)
    case = Case(batch_tokens=CHUNK)  # room for two chunks
    case.forward(("a", 0, 8), ("b", 0, 4))
    case.forward(("c", 0, 4))
    case.forward(("a", 8, 12), ("b", 4, 8), ("c", 4, 8))
    case.capture._settle(at_most=0)  # noqa: SLF001 -- rows take a chunk's room once they are on the host
    assert torch.equal(case.object("a", 0), expected("a", 0))
    assert case.object("b", 0) is None  # touched longer ago than c, and not complete
    case.forward(("d", 0, 8), ("e", 0, 8))
    assert torch.equal(case.object("e", 0), expected("e", 0))


def test_rows_behind_a_hole_take_no_room(monkeypatch):
    """Decoding behind a replayed graph: what cannot become whole drives out nothing that can."""
    monkeypatch.setattr(boundary, "MAX_CAPTURED_BYTES", 1)
    case = Case(batch_tokens=CHUNK)
    case.forward(("a", 0, 8), *((name, 5, 6) for name in "bcdefgh"))
    assert torch.equal(case.object("a", 0), expected("a", 0))
    assert case.object("b", 0) is None


def test_only_so_many_steps_are_under_way(monkeypatch):
    case = Case()
    for step in range(boundary.MAX_STEPS_UNDER_WAY + 3):
        case.forward(("a", step, step + 1))
    under_way = case.capture._under_way  # noqa: SLF001 -- memory shows nowhere else
    assert len(under_way) <= boundary.MAX_STEPS_UNDER_WAY + 1
    monkeypatch.setattr(LaterRows, "may_come", True)
    case.forward(("a", step + 1, 8))
    case.capture.forget({"b"})
    assert torch.equal(case.object("a", 0), expected("a", 0))


class GatedRows(LaterRows):
    """Rows that fail the test where somebody waits for them before they may come."""

    def copy_out(self, *tensors):
        rows = super().copy_out(*(tensor.cpu() for tensor in tensors))

        def take():
            assert self.may_come, "the rows of a chunk that is saved were waited for"
            return rows.take()

        return SimpleNamespace(arrived=rows.arrived, take=take)


def test_a_chunk_that_is_saved_is_waited_for_by_its_writer_alone(monkeypatch):
    """Its rows are its own from then on; those of its neighbours in the same forwards are sorted as ever."""
    monkeypatch.setattr(boundary, "row_copies", GatedRows)
    case = Case()
    case.forward(("a", 0, 5), ("b", 0, 3))
    case.forward(("a", 5, 20), ("b", 3, 8))
    first, second = (case.capture.put(save_of("a", chunk)) for chunk in (0, 1))
    case.forward(("a", 20, 24), ("b", 8, 9))
    case.capture.forget({"a"})
    monkeypatch.setattr(LaterRows, "may_come", True)
    assert torch.equal(as_tensor(second()), expected("a", 1))  # in any sequence
    assert torch.equal(as_tensor(first()), expected("a", 0))
    assert torch.equal(case.object("b", 0), expected("b", 0))
    assert case.object("a", 2) is None  # forgotten
    assert case.counts.boundaries == {"captured": 3, "incomplete": 1}


def test_a_chunk_whose_late_rows_are_another_s_is_not_saved(monkeypatch):
    """Negative control of the one above: its writer looks at positions too."""
    monkeypatch.setattr(boundary, "row_copies", GatedRows)
    case = Case()
    case.forward(("a", 0, 5))
    case.forward(("a", 5, 8), shift=1)
    put = case.capture.put(save_of("a", 0))
    monkeypatch.setattr(LaterRows, "may_come", True)
    assert put() == []
    case.capture.expect(())
    assert case.counts.boundaries == {"missed": 1, "incomplete": 1}


def test_the_hook_goes_with_the_capture():
    case = Case()
    case.capture.close()
    case.forward(("a", 0, 8))
    assert case.object("a", 0) is None
