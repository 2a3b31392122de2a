"""Rows of models with recurrent layers, whatever their pattern; no vLLM needed."""

from types import SimpleNamespace

import pytest
import torch

from cacheflow.errors import ConfigError, UnsupportedModelError
from cacheflow.vllm.models.kv_groups import KvGroups
from cacheflow.vllm.models.layers import find_layers

pytestmark = pytest.mark.torch


class Keeper(torch.nn.Module):
    """What vLLM has given an attention or a state: notes when it is called, and writes keys and values first."""

    attn_backend = SimpleNamespace(forward_includes_kv_cache_update=False)

    def __init__(self, name, called):
        super().__init__()
        self.name, self.called = name, called
        self.impl = SimpleNamespace(forward=lambda: called.append(f"{name} attends"))

    def forward(self, hidden):
        self.called.append(self.name)
        if self.name.startswith("A"):
            self.impl.forward()
        return hidden + 1


class Layer(torch.nn.Module):
    def __init__(self, keepers):
        super().__init__()
        self.keepers = torch.nn.Sequential(*keepers)

    def forward(self, hidden):
        return self.keepers(hidden)


class Model(torch.nn.Module):
    """``A``: attention, ``S``: running state, ``B``: both, ``-``: a layer that keeps nothing of its own."""

    def __init__(self, pattern):
        super().__init__()
        self.called = []
        kinds = {"-": "", "B": "AS"}
        keepers = [
            [Keeper(f"{each}{n}", self.called) for each in kinds.get(kind, kind)] for n, kind in enumerate(pattern)
        ]
        self.layers = torch.nn.ModuleList(Layer(each) for each in keepers)
        self.context = {each.name: each for of_layer in keepers for each in of_layer}

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def rows_of(pattern):
    model = Model(pattern)
    names = [name for name in model.context if name.startswith("A")]
    states = [name for name in model.context if name.startswith("S")]
    return model, find_layers(model, model.context, names, states)


@pytest.mark.parametrize(
    ("pattern", "spans", "states"),
    [
        ("SSSASSSA", [(0, 4), (4, 8)], [("S0", "S1", "S2"), ("S4", "S5", "S6")]),
        ("ASSAS", [(0, 1), (1, 5)], [(), ("S1", "S2", "S4")]),
        ("-SA-SA-", [(0, 4), (4, 7)], [("S1",), ("S4",)]),
        ("SSAA", [(0, 3), (3, 4)], [("S0", "S1"), ()]),
        ("A-A", [(0, 2), (2, 3)], [(), ()]),
        ("BBB", [(0, 1), (1, 2), (2, 3)], [("S0",), ("S1",), ("S2",)]),
        ("SB-A", [(0, 3), (3, 4)], [("S0", "S1"), ()]),
    ],
)
def test_a_row_is_an_attention_with_the_states_below_it(pattern, spans, states):
    _, layers = rows_of(pattern)
    assert [layers.span(row, row + 1) for row in range(layers.num_rows)] == spans
    assert list(layers.states_R) == states


def test_rows_run_one_after_the_other_as_the_model_does():
    model, layers = rows_of("SSASAS")
    carry = layers.run(lambda: model(torch.zeros(1)), None, (0, 1), kv_only_top=False)
    assert model.called == ["S0", "S1", "A2", "A2 attends"]
    assert carry.top.item() == 3
    layers.run(lambda: model(torch.zeros(1)), carry, (1, 2), kv_only_top=False)
    assert model.called[4:] == ["S3", "A4", "A4 attends", "S5"]


def test_keys_and_values_alone_leave_out_the_attention_but_no_state():
    model, layers = rows_of("SASASS")
    layers.run(lambda: model(torch.zeros(1)), None, (0, 1), kv_only_top=True)
    assert model.called == ["S0", "A1"]
    carry = layers.run(lambda: model(torch.zeros(1)), None, (0, 1), kv_only_top=False)
    model.called.clear()
    layers.run(lambda: model(torch.zeros(1)), carry, (1, 2), kv_only_top=True)
    assert model.called == ["S2", "A3", "A3 attends", "S4", "S5"]  # states above the last attention need its output


def test_a_layer_with_both_is_run_whole():
    model, layers = rows_of("BB")
    layers.run(lambda: model(torch.zeros(1)), None, (0, 1), kv_only_top=True)
    assert model.called == ["A0", "A0 attends", "S0"]


def test_two_attentions_in_one_layer_are_refused():
    model, _ = rows_of("BB")
    shared = torch.nn.Sequential(model.layers[0].keepers[0], model.layers[1].keepers[0])
    whole = torch.nn.Sequential(torch.nn.ModuleList([shared]))
    with pytest.raises(UnsupportedModelError, match="A0 and A1 are in one layer"):
        find_layers(whole, model.context, ["A0", "A1"])


def group(kind, *names, **spec):
    return SimpleNamespace(kv_cache_spec=type(kind, (), {"block_size": 128, **spec})(), layer_names=list(names))


def test_groups_are_told_apart_by_what_they_keep():
    groups = KvGroups.of(
        SimpleNamespace(
            kv_cache_groups=[group("MambaSpec", "s0", "s3"), group("FullAttentionSpec", "a2"), group("MambaSpec", "s1")]
        )
    )
    assert (groups.attention, groups.states, groups.block_size) == (1, (0, 2), 128)
    assert groups.state_names == (("s0", "s3"), ("s1",))
    assert not groups.kept_within_passes
    by_group = ([0, 0, 7], [4, 5, 6], [0, 0, 9])
    assert groups.kv_blocks(by_group) == [4, 5, 6]
    assert groups.state_blocks(by_group, 3 * 128) == (7, 9)
    assert groups.state_blocks(by_group, 2 * 128) == ()  # vLLM has let go of them
    assert groups.state_blocks(by_group, 4 * 128) == ()
    assert groups.by_group([4, 5, 6], [[0, 0, 7], [0, 0, 9]]) == by_group


@pytest.mark.parametrize("kinds", [("MambaSpec",), ("FullAttentionSpec", "SlidingWindowSpec")])
def test_one_group_keeps_keys_and_values(kinds):
    with pytest.raises(ConfigError, match="only models with one are supported"):
        KvGroups.of(SimpleNamespace(kv_cache_groups=[group(kind) for kind in kinds]))
