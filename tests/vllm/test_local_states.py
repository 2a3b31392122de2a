"""Running states of vLLM's own prefix cache: held until they were copied, and let go in any case; no vLLM needed."""

from types import SimpleNamespace

import pytest

from cacheflow.vllm.local_states import LocalStates
from cacheflow.vllm.models.kv_groups import KvGroups

SIZE = 4
GROUPS = KvGroups(attention=1, states=(0, 2), block_size=SIZE, spec=None, attention_names=(), state_names=((), ()))


def block(number):
    return SimpleNamespace(block_id=number, is_null=number == 0)


class Manager:
    """A KV cache manager that has cached states at some positions of every prompt."""

    def __init__(self, *columns):
        self.held = []
        self.blocks = [
            [block(column * 10 + group if column in columns else 0) for column in range(4)] for group in (1, 2, 3)
        ]
        self.num_cached = SIZE * (max(columns, default=-1) + 1)
        self.block_pool = self

    def get_computed_blocks(self, request):
        return SimpleNamespace(blocks=self.blocks), self.num_cached, 0

    def touch(self, blocks):
        self.held += blocks

    def free_blocks(self, blocks):
        for each in blocks:
            self.held.remove(each)


REQUEST = SimpleNamespace(request_id="r")


def test_states_are_held_until_they_are_let_go():
    manager = Manager(2)
    states = LocalStates(manager, GROUPS)
    assert states.hold(REQUEST, 3 * SIZE)
    assert states.held("r") == (21, 23)
    assert [each.block_id for each in manager.held] == [21, 23]
    assert states.hold(REQUEST, 3 * SIZE)  # asked again in the next step
    assert len(manager.held) == 2
    states.release_unless(lambda request_id: request_id == "r")
    assert len(manager.held) == 2
    states.release_unless(lambda request_id: False)
    assert manager.held == []
    assert states.held("r") == ()
    states.release("r")


@pytest.mark.parametrize("columns", [(), (1,), (3,)], ids=["nothing is cached", "less", "states farther on"])
def test_what_is_not_there_is_not_held(columns):
    manager = Manager(*columns)
    states = LocalStates(manager, GROUPS)
    assert not states.hold(REQUEST, 3 * SIZE)
    assert manager.held == []


def test_a_vllm_that_lacks_what_it_takes_goes_without(caplog):
    states = LocalStates(SimpleNamespace(block_pool=SimpleNamespace(touch=None)), GROUPS)
    assert "lacks get_computed_blocks, block_pool.free_blocks" in caplog.text
    assert not states.hold(REQUEST, SIZE)
