"""The layers of a worker's model that keep keys and values, and runs of a few of them by the model's own loop.

No model is known by name. Layers are found by the attention objects that vLLM has given a KV cache. A few of them are
run by calling the whole model as vLLM's runner does, while stand-ins take the place of the layers that are not wanted:
those below return what the layer before the wanted ones returned when it was run (the *carry*), and above the last one
the call ends. So everything that a model does before and between its layers is done by its own code.

A row is a layer that has keys and values of its own, with the recurrent layers right before it and what lies between,
or that is recurrent as well; what comes after the last such layer is run with the last row.

Shapes: ``R`` rows of this stage, bottom first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cacheflow.errors import UnsupportedModelError

Module = torch.nn.Module


class Carry(NamedTuple):
    """What was run of a model so far, for a later call that goes on with it; the layers of that call overwrite it.

    Attributes:
        top: What the topmost layer that was run returned: any nest of tensors.
        kept: By layer, copies of what those returned whose output the model asks for again once all have run.
    """

    top: Any
    kept: dict[int, Any]


class CallEnded(BaseException):
    """Ends a call of the model at the layer where enough was run."""

    def __init__(self, returned: Any = None) -> None:  # noqa: ANN401 -- what a layer returned
        super().__init__()
        self.returned = returned


@dataclass(frozen=True, slots=True, eq=False)
class ModelLayers:
    """The layers of this pipeline stage.

    Attributes:
        modules: Every layer of the stage, in the order of the model's loop, those without keys and values included.
        first_number: Number of the first of them in the whole model.
        row_of_R: Which of ``modules`` has each row's attention.
        first_of_R: With which of ``modules`` each row begins.
        attention_R: VLLM's attention object of each row.
        name_R: Its name, the key of the row's KV cache.
        states_R: Names of each row's recurrent layers, in order; none in models without.
        whole_R: Whether each row is always run to its top: it has a recurrent layer beside or above its attention.
        asked_again: Those of ``modules`` whose output the model gives to a drafter (EAGLE-3's auxiliary states).
    """

    modules: tuple[Module, ...]
    first_number: int
    row_of_R: tuple[int, ...]
    first_of_R: tuple[int, ...]
    attention_R: tuple[Any, ...]
    name_R: tuple[str, ...]
    states_R: tuple[tuple[str, ...], ...]
    whole_R: tuple[bool, ...]
    asked_again: frozenset[int] = frozenset()

    @property
    def num_rows(self) -> int:
        """Layers with keys and values of their own."""
        return len(self.row_of_R)

    def span(self, row_lo: int, row_hi: int) -> tuple[int, int]:
        """Modules ``[lo, hi)`` that are run for rows ``[row_lo, row_hi)``.

        A layer that keeps nothing of its own is run with the row before it.
        """
        last = self.first_of_R[row_hi] if row_hi < len(self.first_of_R) else len(self.modules)
        return self.first_of_R[row_lo], last

    def can_write_alone(self, row: int) -> bool:
        """Whether a row's keys and values are in the cache before its attention is computed."""
        return writes_before(self.attention_R[row])

    def run(
        self, call: Callable[[], object], carry: Carry | None, rows: tuple[int, int], *, kv_only_top: bool
    ) -> Carry | None:
        """Run rows ``[lo, hi)`` by a call of the whole model.

        Args:
            call: Calls the model, as vLLM's runner does.
            carry: What the row below ``lo`` returned; not looked at where ``lo`` is 0.
            rows: Which.
            kv_only_top: Stop in row ``hi - 1`` once its keys and values are written.

        Returns:
            The carry of row ``hi``; None with ``kv_only_top``.
        """
        row_lo, row_hi = rows
        first, last = self.span(row_lo, row_hi)
        cut = kv_only_top and not self.whole_R[row_hi - 1]
        alone = cut and self.can_write_alone(row_hi - 1)
        kept = {} if carry is None else dict(carry.kept)
        with ExitStack() as stand_ins:
            if carry is not None:
                for module in self.modules[:first]:
                    stand_ins.enter_context(_returns(module, carry.top))
            for index in self.asked_again & frozenset(range(first, last)):
                module = self.modules[index]
                stand_ins.enter_context(_stand_in(module, "forward", _keep(module.forward, kept, index)))
            if alone:
                stand_ins.enter_context(ended_by(self.attention_R[row_hi - 1]))
            else:
                top = self.modules[self.row_of_R[row_hi - 1] if cut else last - 1]
                stand_ins.enter_context(_stand_in(top, "forward", _end_after(top.forward)))
            try:
                call()
            except CallEnded as ended:
                return None if kv_only_top else Carry(ended.returned, kept)
        raise UnsupportedModelError(f"the model's loop did not come to layer {self.first_number + last - 1}")

    def pass_through(self, call: Callable[[], object], carry: Carry) -> object:
        """What the model returns once all layers of this stage have run; ``carry`` is what came of them."""
        with ExitStack() as stand_ins:
            for index, module in enumerate(self.modules):
                is_top = index == len(self.modules) - 1
                stand_ins.enter_context(_returns(module, carry.top if is_top else carry.kept.get(index, carry.top)))
            return call()

    def prelude(self, call: Callable[[], object]) -> tuple[list[Module], list[torch.Tensor]]:
        """What the model runs before its first layer: the outermost modules, and the floats that the layer is given."""
        ran: list[Module] = []

        def note(module: Module, *_: object) -> None:
            inside = set(module.modules())
            ran[:] = [*(each for each in ran if each not in inside), module]

        def end(*args: object, **kwargs: object) -> None:
            raise CallEnded((args, kwargs))

        hook = torch.nn.modules.module.register_module_forward_hook(note)
        try:
            with _stand_in(self.modules[0], "forward", end):
                call()
        except CallEnded as ended:
            return ran, [each for each in leaves(ended.returned) if each.is_floating_point()]
        finally:
            hook.remove()
        raise UnsupportedModelError(f"the model's loop did not come to layer {self.first_number}")


def find_layers(
    model: Module, context: Mapping[str, Any], names: Sequence[str], state_names: Sequence[str] = ()
) -> ModelLayers:
    """The layers of a model that hold the attention objects of these names, with what lies between them.

    Args:
        model: The whole model.
        context: VLLM's ``static_forward_context``: attention objects and recurrent layers by name.
        names: Those of the model with a KV cache.
        state_names: Those with a running state.

    Raises:
        UnsupportedModelError: One of them is not in the model's tree or not in a list of layers, or two of a kind are
            in one layer, or some are in different lists.
    """
    paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    lists, keepers, states = dict[int, tuple[str, Module]](), dict[int, str](), dict[int, str]()
    for name, of_kind in (*((each, keepers) for each in names), *((each, states) for each in state_names)):
        path = paths.get(id(context[name]))
        found = None if path is None else _outermost_list(model, path)
        if found is None:
            raise UnsupportedModelError(f"the layer {name} is in no list of the model's layers")
        of_list, parent, number = found
        lists[id(parent)] = of_list, parent
        if number in of_kind:
            raise UnsupportedModelError(f"{of_kind[number]} and {name} are in one layer")
        of_kind[number] = name
    if len(lists) != 1:
        raise UnsupportedModelError(f"its layers are in several lists: {', '.join(path for path, _ in lists.values())}")
    [(_, parent)] = lists.values()
    every = list(parent.children())
    here = [index for index, module in enumerate(every) if type(module).__name__ != "PPMissingLayer"]
    first, last = here[0], here[-1]
    rows = sorted(keepers)
    of_row: list[list[int]] = [[] for _ in rows]
    for number in sorted(states):
        of_row[min(bisect_left(rows, number), len(rows) - 1)].append(number)
    begins = [min([*found, number]) for found, number in zip(of_row, rows, strict=True)]
    return ModelLayers(
        modules=tuple(every[first : last + 1]),
        first_number=first,
        row_of_R=tuple(number - first for number in rows),
        first_of_R=(0, *(number - first for number in begins[1:])),
        attention_R=tuple(context[keepers[number]] for number in rows),
        name_R=tuple(keepers[number] for number in rows),
        states_R=tuple(tuple(states[number] for number in found) for found in of_row),
        whole_R=tuple(bool(found) and found[-1] >= row for found, row in zip(of_row, rows, strict=True)),
        asked_again=frozenset(number - 1 - first for number in _given_to_drafter(model) if first < number <= last),
    )


def _given_to_drafter(model: Module) -> set[int]:
    """Numbers of the layers whose input the model hands to a drafter; the output of the last is its own."""
    found = (getattr(module, "aux_hidden_state_layers", ()) for module in model.modules())
    return {number for numbers in found if isinstance(numbers, tuple) for number in numbers}


def owning_names(context: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the attention layers of these names that have keys and values of their own, and share no other's."""
    return [name for name in names if not getattr(context[name], "kv_sharing_target_layer_name", None)]


def leaves(nest: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401
    """The tensors of a nest, in order."""
    flat, _ = torch.utils._pytree.tree_flatten(nest)  # noqa: SLF001 -- torch's only tree functions
    return (each for each in flat if isinstance(each, torch.Tensor))


def mapped(nest: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:  # noqa: ANN401
    """The same nest of other tensors."""
    tree = torch.utils._pytree  # noqa: SLF001 -- torch's only tree functions
    return tree.tree_map(lambda each: change(each) if isinstance(each, torch.Tensor) else each, nest)


def _outermost_list(model: Module, path: str) -> tuple[str, Module, int] | None:
    """The outermost list of modules on the way to a module: its path, itself, and where in it the way goes on."""
    parent, steps = model, path.split(".")
    for depth, step in enumerate(steps):
        if isinstance(parent, torch.nn.ModuleList):
            return ".".join(steps[:depth]), parent, int(step)
        parent = parent.get_submodule(step)
    return None


def is_latent(attention: Any) -> bool:  # noqa: ANN401 -- vLLM's Attention or MLAAttention
    """Whether an attention keeps one latent a token (MLA) for all heads: every tensor-parallel rank keeps all of it."""
    return hasattr(attention, "kv_lora_rank")


def writes_before(attention: Any) -> bool:  # noqa: ANN401
    """Whether an attention's keys and values are in the cache before it is computed."""
    return is_latent(attention) or not attention.attn_backend.forward_includes_kv_cache_update


@contextmanager
def ended_by(attention: Any) -> Iterator[None]:  # noqa: ANN401
    """Have a call of the model end where this attention would be computed: its keys and values are written by then.

    The call then raises ``CallEnded``.
    """

    def end(*_: object, **__: object) -> None:
        raise CallEnded

    owner, method = (attention, "forward_impl") if is_latent(attention) else (attention.impl, "forward")
    with _stand_in(owner, method, end):
        yield


def _end_after(forward: Callable[..., Any]) -> Callable[..., None]:
    def run(*args: object, **kwargs: object) -> None:
        raise CallEnded(forward(*args, **kwargs))

    return run


def _keep(forward: Callable[..., Any], kept: dict[int, Any], index: int) -> Callable[..., Any]:
    """The same call, whose output is copied: the layers above overwrite it."""

    def run(*args: object, **kwargs: object) -> Any:  # noqa: ANN401
        returned = forward(*args, **kwargs)
        kept[index] = mapped(returned, torch.clone)
        return returned

    return run


def _returns(module: Module, value: Any) -> AbstractContextManager[None]:  # noqa: ANN401
    return _stand_in(module, "forward", lambda *_, **__: value)


@contextmanager
def _stand_in(owner: Any, method: str, function: Callable[..., object]) -> Iterator[None]:  # noqa: ANN401
    """Have an object's method be another for a while; on the object, so that its class is left alone."""
    attributes = owner.__dict__
    before = attributes.get(method)
    attributes[method] = function
    try:
        yield
    finally:
        if before is None:
            del attributes[method]
        else:
            attributes[method] = before
