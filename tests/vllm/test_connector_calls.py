"""The connector's part of vLLM's calls, in the orders in which vLLM makes them; a recorder stands in for the worker."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from cacheflow.vllm.scheduler.side import SchedulerSide
from cacheflow.vllm.scheduler.view import RequestView, ScheduledRequest
from cacheflow.vllm.worker.side import WorkerSide
from support.scheduler_cases import BLOCK, CHUNK, Case, tokens
from support.side_start import SideStart

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("_single_process_vllm")]

BEFORE, AFTER, AFTER_DRAFTING = "before the forward", "after the forward", "after drafting"


class Recorder(WorkerSide):
    """A worker side that notes what it is asked and when."""

    drafts = False
    facts = None

    def __init__(self):
        self.now, self.calls = "", []

    def expect(self, captures):
        self.calls.append(("expect", self.now))

    def carry_out(self, orders):
        self.calls.append(("carry out", self.now))

    def save(self, saves):
        self.calls.append(("save", self.now))

    def forget(self, request_ids):
        pass

    def take_finished(self):
        return set()


@pytest.fixture
def connector():
    from cacheflow.vllm.connector import CacheFlowConnector

    made = CacheFlowConnector.__new__(CacheFlowConnector)
    made.begin(SideStart(Recorder()))
    made.get_handshake_metadata()
    return made


def step(connector, *, loads_first=False, saves_late=False, never_saves=False):
    """One step of a worker, as vLLM's runner makes it."""
    from cacheflow.vllm.connector import CacheFlowMetadata
    from cacheflow.vllm.step import StepWork

    worker = connector.worker_side
    worker.now, worker.calls = BEFORE, []
    connector.bind_connector_metadata(CacheFlowMetadata(StepWork(), loads_first=loads_first))
    if loads_first:
        connector.start_load_kv(None)
    worker.now = AFTER
    if not loads_first:
        connector.start_load_kv(None)
    if not (saves_late or never_saves):
        connector.wait_for_save()
    connector.get_finished(set())
    if saves_late:
        worker.now = AFTER_DRAFTING
        connector.wait_for_save()
    if not never_saves:
        connector.clear_connector_metadata()
    return worker.calls


@pytest.mark.parametrize("how", [{}, {"loads_first": True}, {"saves_late": True}, {"never_saves": True}])
def test_orders_are_carried_out_and_saved_once_after_the_forward(connector, how):
    """Also where another connector's loads come first, and where drafts put the save off, or vLLM forgets it."""
    for _ in range(2):
        calls = step(connector, **how)
        assert sorted(calls) == [("carry out", AFTER), ("expect", BEFORE), ("save", AFTER)]


def test_what_a_drafter_writes_after_the_forward_is_saved_with_the_rest(connector):
    connector.worker_side.drafts = True
    calls = step(connector, saves_late=True)
    assert sorted(calls) == [("carry out", AFTER), ("expect", BEFORE), ("save", AFTER_DRAFTING)]


def scheduler_output(**changes):
    """A step of four requests: new, running, running with drafts, resumed."""
    made = {
        "scheduled_new_reqs": [SimpleNamespace(req_id="new", num_computed_tokens=0)],
        "scheduled_cached_reqs": SimpleNamespace(
            req_ids=["runs", "drafts", "resumed"], num_computed_tokens=[100, 200, 0], resumed_req_ids={"resumed"}
        ),
        "num_scheduled_tokens": {"new": 64, "runs": 1, "drafts": 4, "resumed": 50},
        "scheduled_spec_decode_tokens": {"drafts": [7, 8, 9]},
        "has_sync_kv_loads": False,
    }
    return SimpleNamespace(**{**made, **changes})


def test_drafts_are_no_tokens_of_a_request():
    assert list(ScheduledRequest.of_step(scheduler_output())) == [
        ScheduledRequest("new", 64, 64),
        ScheduledRequest("runs", 101, 1),
        ScheduledRequest("drafts", 201, 1),
        ScheduledRequest("resumed", 50, 50),
    ]


def test_who_begins_beside_another_connectors_loads_is_unproven():
    scheduled = ScheduledRequest.of_step(scheduler_output(has_sync_kv_loads=True))
    assert [each.request_id for each in scheduled if each.unproven] == ["new", "resumed"]


def test_sleep_mode_is_declined_however_vllm_asks():
    """0.33 asks the class, with the configuration; 0.32 does not ask, but a subclass or a tool may ask an object."""
    from cacheflow.vllm.connector import CacheFlowConnector

    assert CacheFlowConnector.supports_sleep_mode(SimpleNamespace()) is False
    assert CacheFlowConnector.supports_sleep_mode() is False
    assert CacheFlowConnector.__new__(CacheFlowConnector).supports_sleep_mode(SimpleNamespace()) is False


class PassesOver(SchedulerSide):
    """A scheduler side that notes what it is told of loads that are not its own."""

    def __init__(self):
        self.told = []

    def passed_over(self, request_id, *, num_loaded):
        self.told.append(num_loaded)


@pytest.mark.parametrize(
    ("num_external", "changes", "told"),
    [
        (0, {}, 0),
        (128, {}, 128),
        (0, {"num_preemptions": 1}, None),  # what vLLM counted before the preemption
        (None, {}, None),  # vLLM counts until the first token
        (None, {"skip_reading_prefix_cache": True}, 0),
        (0, {"skip_reading_prefix_cache": True}, 0),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_that_a_request_begins_is_told_with_what_vllm_knows_to_be_loaded_now(num_external, changes, told, alone):
    """Also of one that vLLM computes all of: it queues no longer, and its place is another's."""
    from cacheflow.vllm.connector import CacheFlowConnector, CacheFlowHandshake

    connector, side = CacheFlowConnector.__new__(CacheFlowConnector), PassesOver()
    connector.begin(SideStart(side))
    connector.set_xfer_handshake_metadata_pp_aware({(0, 0): CacheFlowHandshake(None, alone=alone)})
    stats = None if num_external is None else SimpleNamespace(num_external_cached_tokens=num_external)
    made = {"request_id": "a", "skip_reading_prefix_cache": False, "num_preemptions": 0, "prefill_stats": stats}
    connector.update_state_after_alloc(SimpleNamespace(**made | changes), None, 0)
    assert side.told == [0 if alone else told]


# Sessions whose input streams


def part_of_a_session(prompt, image=None):
    """What vLLM's frontend sends of one: a part of its input, with an image of a chunk's length."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    place = PlaceholderRange(offset=0, length=CHUNK)
    features = [MultiModalFeatureSpec(data=None, modality="image", identifier=image, mm_position=place)]
    return Request(
        request_id="", prompt_token_ids=list(prompt), sampling_params=SamplingParams(max_tokens=1), pooling_params=None,
        mm_features=features if image else None, resumable=True,
    )  # fmt: skip


def test_a_session_whose_input_streams_is_neither_restored_nor_saved():
    """A later part brings an image, which nobody hands the connector: what two sessions saved had one name."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import StreamingUpdate

    case, scheduler = Case(), SimpleNamespace(hash_block_size=BLOCK, num_waiting_for_streaming_input=1, log_stats=False)
    first, later = tokens(CHUNK, seed=1), tokens(CHUNK, seed=2)
    for name, image in (("a", "a" * 64), ("b", "b" * 64)):
        request = part_of_a_session(first)
        request.request_id = name
        case.side.new_request(RequestView.of(request))
        assert case.matched_now(name) == 0
        assert case.step(ScheduledRequest(name, CHUNK, CHUNK), busy=1).saves == ()
        request.num_computed_tokens = CHUNK
        request.append_output_token_ids(5)
        update = part_of_a_session([7] * CHUNK + later, image)
        Scheduler._update_request_as_session(scheduler, request, StreamingUpdate.from_request(update))  # noqa: SLF001
        assert len(request.all_token_ids) == 3 * CHUNK
        assert case.step(ScheduledRequest(name, 3 * CHUNK, 2 * CHUNK), busy=1).saves == ()
        assert case.side.num_matched(name, 0, num_preemptions=1) == 0
        assert "its input streams" in case.side.finished(name)["cacheflow_reason"]
