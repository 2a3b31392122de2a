"""The connector's part of vLLM's calls, in the orders in which vLLM makes them; a recorder stands in for the worker."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from cacheflow.vllm.worker.side import WorkerSide
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
    from cacheflow.vllm.scheduler.view import ScheduledRequest

    assert list(ScheduledRequest.of_step(scheduler_output())) == [
        ScheduledRequest("new", 64, 64),
        ScheduledRequest("runs", 101, 1),
        ScheduledRequest("drafts", 201, 1),
        ScheduledRequest("resumed", 50, 50),
    ]


def test_who_begins_beside_another_connectors_loads_is_unproven():
    from cacheflow.vllm.scheduler.view import ScheduledRequest

    scheduled = ScheduledRequest.of_step(scheduler_output(has_sync_kv_loads=True))
    assert [each.request_id for each in scheduled if each.unproven] == ["new", "resumed"]


def test_sleep_mode_is_declined_however_vllm_asks():
    """0.33 asks the class, with the configuration; 0.32 does not ask, but a subclass or a tool may ask an object."""
    from cacheflow.vllm.connector import CacheFlowConnector

    assert CacheFlowConnector.supports_sleep_mode(SimpleNamespace()) is False
    assert CacheFlowConnector.supports_sleep_mode() is False
    assert CacheFlowConnector.__new__(CacheFlowConnector).supports_sleep_mode(SimpleNamespace()) is False
