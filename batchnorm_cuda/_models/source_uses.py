"""What the source of a forward does with the modules that it has: calls them, or more.

For forwards that torch.fx cannot run. Reading is on the safe side: a child counts as called only
where every mention of it is a call, or a loop over a list whose variable is called.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

_CONTAINERS = nn.ModuleList | nn.ModuleDict
# What gives a container's items one by one: the functions, and its own methods.
_PASSING_ON = {"enumerate", "zip", "reversed", "list", "tuple", "sorted"}
_ITEMS = {"values", "items"}
# By these a forward reaches modules without naming them.
_BY_OTHER_WAYS = {
    "_modules",
    "_parameters",
    "__dict__",
    "apply",
    "buffers",
    "children",
    "get_parameter",
    "get_submodule",
    "modules",
    "named_buffers",
    "named_children",
    "named_modules",
    "named_parameters",
    "parameters",
    "state_dict",
}
_BY_OTHER_FUNCTIONS = {"eval", "exec", "locals"}
_HARMLESS = {"super", "hasattr", "isinstance"}  # functions that may be given self


def children_only_called(module: nn.Module) -> list[nn.Module]:
    """The modules below `module` that its own code uses in no other way than by calling them.

    These are children, and items of lists and dicts of modules. None where the source is not there.
    """
    if isinstance(module, _CONTAINERS):  # has no code: whoever has the list calls its items
        return list(_callable(module))
    own_call = "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__
    if own_call or isinstance(module, torch.jit.ScriptModule):
        return []
    children = {name: child for name, child in module._modules.items() if child is not None}
    used = _Uses(module, children)
    try:
        used.read("forward")
    except _Unreadable:
        return []
    named = [children[name] for name in used.otherwise]
    reached = {module for value in (*named, *_held(module)) for module in value.modules()}
    return [
        item
        for child in children.values()
        for item in _callable(child)
        if reached.isdisjoint(item.modules())
    ]


def _callable(child: nn.Module) -> Iterator[nn.Module]:
    if isinstance(child, _CONTAINERS):
        for item in child.children():
            yield from _callable(item)
    else:
        yield child


def _held(module: nn.Module) -> Iterator[nn.Module]:
    """Modules in attributes that are not registered: lists of layers, a parent, and the like."""
    waiting = [value for name, value in vars(module).items() if name != "_modules"]
    looked_into = set()
    for value in waiting:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in looked_into:
            looked_into.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


class _Unreadable(Exception):
    """Source that is not there, or that may reach any module."""


class _Uses:
    """Reads a method and all methods of `self` that it mentions."""

    def __init__(self, module: nn.Module, children: dict[str, nn.Module]) -> None:
        self.module = module
        self.children = children
        self.otherwise: set[str] = set()  # children that are not only called
        self._done: set[Any] = set()

    def read(self, name: str) -> None:
        for kind in type(self.module).__mro__:
            if kind is not nn.Module and kind is not object and name in vars(kind):
                member = vars(kind)[name]
                for function in _functions(member):
                    self._read_function(function)

    def _read_function(self, function: FunctionType) -> None:
        if function in self._done:
            return
        self._done.add(function)
        _Method(self, _parsed(function)).read()


def _functions(member: Any) -> Iterator[FunctionType]:
    if isinstance(member, property):
        members = [member.fget]
    elif isinstance(member, staticmethod | classmethod):
        members = [member.__func__]
    else:
        members = [member]
    for function in members:
        function = inspect.unwrap(function) if callable(function) else None
        if isinstance(function, FunctionType):
            yield function


def _parsed(function: FunctionType) -> ast.FunctionDef:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise _Unreadable from error
    if not isinstance(tree, ast.FunctionDef):
        raise _Unreadable
    return tree


class _Method:
    """The mentions of children in one method."""

    def __init__(self, uses: _Uses, tree: ast.FunctionDef) -> None:
        self.uses = uses
        self.nodes = list(ast.walk(tree))
        self.parents = {c: p for p in self.nodes for c in ast.iter_child_nodes(p)}
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self.me = arguments[0].arg if arguments else ""
        self.names: dict[str, set[str]] = {}  # variables that hold items of children

    def read(self) -> None:
        for node in self.nodes:
            if isinstance(node, ast.Name) and node.id in _BY_OTHER_FUNCTIONS:
                raise _Unreadable
            if isinstance(node, ast.Name) and node.id == self.me:
                self._read_self(node)
            if isinstance(node, ast.Attribute) and _calls(node.value, {"super"}):
                self.uses.read(node.attr)
        for node in self.nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                for child in self.names.get(node.id, ()):
                    self._judge(node, child, False)

    def _read_self(self, node: ast.Name) -> None:
        parent = self.parents[node]
        if isinstance(parent, ast.Attribute):
            name = parent.attr
            if name in self.uses.children:
                container = isinstance(self.uses.children[name], _CONTAINERS)
                self._judge(parent, name, container)
            elif name in _BY_OTHER_WAYS:
                if not self._asks_for_dtype(parent):
                    raise _Unreadable
            else:
                self.uses.read(name)
        elif not _calls(parent, _HARMLESS):
            raise _Unreadable  # given away as a whole

    def _judge(self, node: ast.expr, child: str, container: bool) -> None:
        """Whether a mention of a child, or of an item of one, is a call; else it is noted."""
        parent = self.parents[node]
        if isinstance(parent, ast.Call) and parent.func is node and not container:
            return
        if isinstance(parent, ast.Compare) and all(
            isinstance(operator, ast.Is | ast.IsNot) for operator in parent.ops
        ):
            return
        if container and self._goes_through(parent, node, child):
            return
        self.uses.otherwise.add(child)

    def _goes_through(self, parent: ast.AST, node: ast.expr, child: str) -> bool:
        """Whether the items of a container are taken here; their uses are judged in turn."""
        if isinstance(parent, ast.For | ast.comprehension) and parent.iter is node:
            self._bind(parent.target, node, child)
        elif isinstance(parent, ast.Subscript) and parent.value is node:
            self._judge(parent, child, False)
        elif _calls(parent, _PASSING_ON):
            self._judge(parent, child, True)
        elif isinstance(parent, ast.Attribute) and parent.attr in _ITEMS:
            self._judge(self.parents[parent], child, True)
        else:
            return _calls(parent, {"len"})
        return True

    def _bind(self, target: ast.expr, iterated: ast.expr, child: str) -> None:
        if isinstance(target, ast.Tuple) and _counts(iterated):
            target = target.elts[-1]
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self.names.setdefault(node.id, set()).add(child)

    def _asks_for_dtype(self, node: ast.Attribute) -> bool:
        """next(self.parameters()).dtype or .device"""
        above = node
        for kind in (ast.Call, ast.Call, ast.Attribute):
            above = self.parents.get(above)
            if not isinstance(above, kind):
                return False
        return above.attr in ("dtype", "device")


def _calls(node: ast.AST, functions: set[str]) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") in functions


def _counts(node: ast.expr) -> bool:
    """enumerate(...) or (...).items(): pairs, of which the first is a number or a name."""
    return _calls(node, {"enumerate"}) or (
        isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "items"
    )
