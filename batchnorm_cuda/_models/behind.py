"""What stands behind each batch norm: an add, an activation, or why neither, read from graphs.

It is a forecast, and changes nothing in the model: docs/fusion.md says what decides in a call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._fusion.activations import BY_MODULE, Activation, Read, fields, in_words, read
from .._fusion.forecast import Found
from .traced_calls import HANDING_ON, Calls, has_hooks, trace_calls

_ADDS = (operator.add, torch.add, operator.iadd)
_ADD_METHODS = ("add", "add_")
_IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow),
    operator.setitem,
)
# What may give a tensor that shares its input's memory; getattr: of .data and .T.
_VIEWS = {
    *("alias", "as_strided", "bfloat16", "broadcast_to", "chunk", "contiguous", "cpu", "cuda"),
    *("detach", "diagonal", "double", "dropout", "expand", "expand_as", "flatten", "float"),
    *("getattr", "getitem", "half", "movedim", "narrow", "permute", "positive", "ravel"),
    *("requires_grad_", "reshape", "reshape_as", "select", "split", "squeeze", "swapaxes"),
    *("swapdims", "t", "tensor_split", "to", "transpose", "type", "type_as", "unbind"),
    *("unflatten", "unfold", "unsqueeze", "view", "view_as"),
}
_VIEW_MODULES = (*HANDING_ON, nn.Flatten, nn.Unflatten)

Forecast = Found | str  # or why there is nothing


class Unfused(Exception):
    """Why a batch norm takes nothing over."""


def find(model: nn.Module, training: bool) -> dict[nn.Module, Forecast]:
    """What is found for each batch norm, in one of the model's modes."""
    calls = trace_calls(model, usual=True, training=training)
    names = {module: name for name, module in model.named_modules()}
    seen: dict[nn.Module, list[Forecast]] = {}
    for graph in calls.graphs:
        for module, found in _Part(graph, calls, names).batch_norms():
            seen.setdefault(module, []).append(found)
    forecasts: dict[nn.Module, Forecast] = {}
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            found = seen.get(module, [])
            once = len(found) == 1
            forecasts[module] = (
                found[0] if once else str(_not_once(len(found), module, model, calls))
            )
    return forecasts


def _not_once(times: int, batch_norm: nn.Module, model: nn.Module, calls: Calls) -> Unfused:
    if times:
        return Unfused(f"it is called {times} times")
    if batch_norm is model:
        return Unfused("it is the whole model")
    for name, module in reversed(list(model.named_modules())):
        if module in calls.opaque and any(child is batch_norm for child in module.children()):
            caller = name or "the model"
            why = calls.opaque[module]
            return Unfused(f"torch.fx cannot trace {caller}, which calls it: {why}")
    return Unfused("it is not called")


class _Part:
    """One graph. A value is a set of nodes: what is done in place has its result in all of them."""

    def __init__(self, graph: fx.Graph, calls: Calls, names: dict[nn.Module, str]) -> None:
        self.calls = calls
        self.names = names
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        *_, self.output = graph.nodes
        # The batch norm that takes over an add, by name.
        self.takers: dict[fx.Node, str] = {}
        self.summed = self._find_summed()

    def _module_of(self, node: fx.Node) -> nn.Module | None:
        return self.calls.called.get(node)

    def batch_norms(self) -> Iterator[tuple[nn.Module, Forecast]]:
        calls = [(n, self._module_of(n)) for n in self.order if n not in self.calls.dead]
        found = [
            (node, module, self._forecast(node, module))
            for node, module in calls
            if isinstance(module, _BatchNorm)
        ]
        for node, module, forecast in found:
            _, uses = self._uses({node})
            taker = self.takers.get(uses[0]) if uses else None
            if isinstance(forecast, str) and taker is not None:
                yield module, f"it is what is added to the output of {taker}"
            else:
                yield module, forecast

    def _forecast(self, batch_norm: fx.Node, module: nn.Module) -> Forecast:
        try:
            return self._behind(batch_norm, module)
        except Unfused as reason:
            return str(reason)

    def _behind(self, batch_norm: fx.Node, module: nn.Module) -> Found:
        if getattr(module, "activation", None) is not None:
            raise Unfused(f"it has an activation of its own, {module.activation!r}")
        value, uses = self._uses({batch_norm})
        add = uses[0] if uses else None
        residual = None if add in self.takers else self._residual(add, value)
        if residual is None:
            end, activation = self._activation(batch_norm, value, uses)
            self._check_callers(batch_norm, end)
            self._check_overwritten(batch_norm, batch_norm.args[0], end)
            return Found(add=False, activation=activation)
        self._check_uses(batch_norm, uses, _is_in_place(add) and add.args[0] in value)
        after = {add, *value, add.args[0]} if _is_in_place(add) else {add}
        after, uses = self._uses(after)
        try:
            end, activation = self._activation(batch_norm, after, uses)
        except Unfused:
            end, activation = uses[0] if add in self.summed else add, None
        self._check_callers(batch_norm, add, end)
        self._check_overwritten(batch_norm, batch_norm.args[0], end)
        self._check_overwritten(add, residual, end)
        self.takers[add] = self.names.get(module, "another one")
        return Found(True, activation, summed=add in self.summed)

    def _activation(
        self, batch_norm: fx.Node, value: set[fx.Node], uses: list[fx.Node]
    ) -> tuple[fx.Node, Activation]:
        """The node of an activation that is the only one to need `value`, and the keyword."""
        if not uses:
            raise Unfused("its output is not used")
        found = self._read(uses[0], value)
        if found is None:
            if len(uses) > 1:
                raise self._several(uses)
            if self._is_add(uses[0]) and _is_in_place(uses[0]):
                raise Unfused("it is added in place to another tensor")
            raise Unfused(f"its output goes to {self._name(uses[0])}")
        module = self._module_of(uses[0])
        if module is not None and has_hooks(module):
            raise Unfused(f"{self._name(uses[0])} has hooks, or a forward of its own")
        if fields(found.activation) is None:
            raise Unfused(f"activation {in_words(found.activation)} is not known")
        self._check_uses(batch_norm, uses, found.in_place)
        return uses[0], found.activation

    def _read(self, node: fx.Node, value: set[fx.Node]) -> Read | None:
        """The activation that `node` makes of `value`."""
        if not node.args or node.args[0] not in value:
            return None
        if node.op == "call_module":
            module = self._module_of(node)
            row = BY_MODULE.get(type(module))
            return None if row is None else row.of_module(module)
        called = getattr(Tensor, node.target, None) if node.op == "call_method" else node.target
        return read(called, node.args, node.kwargs)

    def _residual(self, node: fx.Node | None, value: set[fx.Node]) -> fx.Node | None:
        """What `node` adds to `value`, if it is an add of two tensors."""
        if node is None or not self._is_add(node):
            return None
        first, second = node.args
        if (first in value) == (second in value):
            return None
        elsewhere = _is_in_place(node) and first not in value
        if elsewhere and self._origin(first) not in self.summed:
            return None
        return second if first in value else first

    def _is_add(self, node: fx.Node) -> bool:
        """Of two tensors that may be of one shape."""
        by_function = node.op == "call_function" and node.target in _ADDS
        by_method = node.op == "call_method" and node.target in _ADD_METHODS
        plain = len(node.args) == 2 and not node.kwargs
        return (by_function or by_method) and plain and all(type(a) is fx.Node for a in node.args)

    def _find_summed(self) -> set[fx.Node]:
        """Sums with a batch norm's output to which another one's is added in place."""
        sums, summed = set(), set()
        for node in filter(self._is_add, self.order):
            operands = [self._origin(operand) for operand in node.args]
            of_batch_norms = [isinstance(self._module_of(o), _BatchNorm) for o in operands]
            if _is_in_place(node):
                target = operands[0]
                if of_batch_norms[1] and target in sums:
                    summed.add(target)
                    sums.add(node)
                elif of_batch_norms[0]:
                    sums.add(node)
            elif any(of_batch_norms):
                sums.add(node)
        return summed

    def _origin(self, node: fx.Node) -> fx.Node:
        """The node whose result this one hands on."""
        while self._hands_on(node) or _adds_zero(node):
            node = next(operand for operand in node.args if isinstance(operand, fx.Node))
        return node

    def _check_uses(self, batch_norm: fx.Node, uses: list[fx.Node], in_place: bool) -> None:
        """That the first of the uses of a value can be done together with the batch norm."""
        if uses[0].meta["region"] != batch_norm.meta["region"]:
            name = self._name(uses[0])
            raise Unfused(f"a checkpoint or a gradient mode ends between it and {name}")
        if not in_place and len(uses) > 1:
            raise self._several(uses)

    def _several(self, uses: list[fx.Node]) -> Unfused:
        users = " and ".join(map(self._name, uses))
        return Unfused(f"its output is used {len(uses)} times, by {users}")

    def _uses(self, value: set[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
        """The value with what only hands it on, and what uses it, in the order of the calls."""
        while True:
            users = {user for node in value for user in node.users}
            if not self.calls.seen.keys().isdisjoint(value):
                users.add(self.output)
            uses = sorted(users - value - self.calls.dead, key=self.order.__getitem__)
            copied = len(uses) == 1 and _adds_zero(uses[0])
            if not uses or not (copied or self._hands_on(uses[0])):
                return value, uses
            value = value | {uses[0]}

    def _hands_on(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._module_of(node)
            return type(module) is nn.Identity and not has_hooks(module)
        if node.op == "call_function" and _called(node) == "stochastic_depth":
            _, p, _, training = node.args  # torchvision's
            return p == 0 or not training
        return False

    def _check_callers(self, *nodes: fx.Node) -> None:
        """That the code which makes these calls remembers nothing for the next time."""
        for node in nodes:
            caller = node.meta["caller"]
            changed = self.calls.changed.get(caller)
            if changed:
                raise Unfused(f"{type(caller).__name__} sets {', '.join(changed)} when it runs")

    def _check_overwritten(self, start: fx.Node, argument: Any, end: fx.Node) -> None:
        """That nothing in between overwrites an argument of `start`, which waits until `end`.

        The value itself may be: that is what in-place adds and activations do.
        """
        memory = self._memory(argument)
        for node in list(self.order)[self.order[start] + 1 : self.order[end]]:
            if any(self._memory(value) is memory for value in self._overwritten(node)):
                raise Unfused(f"{self._name(node)} overwrites what it is computed from")

    def _overwritten(self, node: fx.Node) -> Iterable[Any]:
        """What a call may write to."""
        if self._module_of(node) in self.calls.opaque:
            return node.all_input_nodes
        if "out" in node.kwargs:
            return (node.kwargs["out"],)
        return node.args[:1] if self._overwrites(node) else ()

    def _overwrites(self, node: fx.Node) -> bool:
        module = self._module_of(node)
        return bool(node.args) and (_is_in_place(node) or getattr(module, "inplace", False) is True)

    def _memory(self, value: Any) -> Any:
        """The node that made the memory of a node's result, as far as names tell."""
        while isinstance(value, fx.Node) and value.args:
            module = self._module_of(value)
            view = _called(value) in _VIEWS if module is None else type(module) in _VIEW_MODULES
            if not (view or self._overwrites(value) or self._hands_on(value)):
                break
            value = value.args[0]
        return value

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self._module_of(node)
            return f"{self.names.get(module, 'an unregistered one')} ({type(module).__name__})"
        return "the caller" if node.op == "output" else _called(node)


def _called(node: fx.Node) -> str:
    """The name of a function or method."""
    return getattr(node.target, "__name__", str(node.target))


def _is_in_place(node: fx.Node) -> bool:
    if node.op == "call_function":
        by_name = _called(node).endswith("_") and not _called(node).endswith("__")
        return node.target in _IN_PLACE or by_name or node.kwargs.get("inplace", False) is True
    return node.op == "call_method" and node.target.endswith("_") and node.target[-2] != "_"


def _adds_zero(node: fx.Node) -> bool:
    """As sum() does at first."""
    return node.op == "call_function" and node.target is operator.add and 0 in node.args
