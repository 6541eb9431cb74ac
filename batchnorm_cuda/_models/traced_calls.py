"""Which modules a model calls, and where their outputs go, found by torch.fx without an input.

Modules whose forward is torch.nn's or this package's are leaves; all others are run with proxies.
A forward that does not run with proxies (it asks for a value, say) is a leaf as well, and called
*opaque*: its children are traced on their own, unless its source does more with them than call
them. What opaque code may use by itself is *exposed*: nothing is known of its uses.

Nothing is executed, and what forwards stored in their modules meanwhile is taken back.

Who has to be certain (`fold`) asks for every way to call the model. Who makes a forecast, and has
another way to find out what happens (`convert(fuse=True)`), asks for the usual one.
"""

from __future__ import annotations

import gc
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import modules
from .regions import Regions
from .snapshot import Snapshot, same_random_numbers
from .source_uses import children_only_called
from .ways_to_call import Caller, TooManyWays, variants_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What evaluation hands on as it is.
HANDING_ON = (
    nn.Identity,
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
# What traced code may ask of a tensor without looking at its values.
_METADATA = {"shape", "dtype", "device", "ndim"}
_METADATA_CALLS = {"size", "dim"}
_REAL = (Tensor, nn.Parameter)  # exactly, where `isinstance` takes proxies for tensors
_CHANGING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__set__"}


@dataclass
class Calls:
    """What tracing a model has found."""

    calls: dict[nn.Module, list[fx.Node]] = field(default_factory=dict)
    called: dict[fx.Node, nn.Module] = field(default_factory=dict)
    # Outputs that somebody sees besides the nodes that use them, and who.
    seen: dict[fx.Node, str] = field(default_factory=dict)
    # ids of parameters and buffers that forwards read, other than by calling their module.
    read: set[int] = field(default_factory=set)
    opaque: dict[nn.Module, str] = field(default_factory=dict)  # and why
    exposed: dict[nn.Module, nn.Module] = field(default_factory=dict)  # and to which opaque module
    graphs: dict[fx.Graph, nn.Module] = field(default_factory=dict)  # and what is called in each
    # Nodes of calls that did not happen, as the module that made them turned out to be opaque.
    dead: set[fx.Node] = field(default_factory=set)
    # Attributes that a forward sets, and that may make the next call another one.
    changed: dict[nn.Module, list[str]] = field(default_factory=dict)

    def add(self, other: Calls) -> None:
        self.graphs |= other.graphs
        self.dead |= other.dead
        for module, nodes in other.calls.items():
            self.calls.setdefault(module, []).extend(nodes)
        self.called |= other.called
        self.seen |= other.seen
        self.read |= other.read
        self.opaque |= other.opaque
        self.exposed |= other.exposed

    def course(self) -> list[Any]:
        """What is called in which order with what, whatever the classes of the modules are."""
        steps: list[Any] = [set(self.opaque)]
        for graph in self.graphs:
            place = {node: ("node", at) for at, node in enumerate(graph.nodes)}
            for node in graph.nodes:
                arguments = fx.node.map_arg((node.args, node.kwargs), place.get)
                steps.append((node.op, self.called.get(node, node.target), repr(arguments)))
        return steps

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that use the values of `node`."""
        return [user for user in node.users if not _asks_for_metadata(user)]


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of the module run more than its class's forward, or something else."""
    own = vars(module)
    replaced = (
        name
        for name, value in own.items()
        if callable(value) and hasattr(type(module), name) and name != "_compiled_call_impl"
    )
    return any(own.get(name) for name in _HOOKS) or next(replaced, None) is not None


@same_random_numbers()
def trace_calls(model: nn.Module, usual: bool = False, training: bool | None = None) -> Calls:
    """All calls that `model` makes when it is called, as it is now.

    Args:
        model: any module.
        usual: look only at calls with the arguments that have to be given, and behind what cannot
            be followed at each module by itself.
        training: the mode of all modules; None leaves each in its own.
    """
    found = Calls()
    waiting, traced = [model], set()
    before = Snapshot(model.modules())
    try:
        for module in model.modules() if training is not None else ():
            # A scripted module keeps its mode in C++, where nothing puts it back; it is a leaf.
            if not isinstance(module, torch.jit.ScriptModule):
                vars(module)["training"] = training
        while waiting:
            block = _unwrapped(waiting.pop())
            if block in traced:
                continue
            traced.add(block)
            known = set(found.opaque)
            _trace(block, found, usual)
            for module in [module for module in found.opaque if module not in known]:
                waiting += module.children() if usual else _expose_children(module, found)
        found.changed = before.changed()
    finally:
        before.restore()
    return found


def _trace(block: nn.Module, found: Calls, usual: bool) -> None:
    if _is_leaf(block):
        found.opaque[block] = "it is not looked into"
        return
    try:
        variants = list(itertools.islice(variants_of(block), 1 if usual else None))
    except (TooManyWays, TypeError, ValueError) as reason:  # the latter by `inspect`
        found.opaque[block] = str(reason)
        return
    for arguments, certain in variants:
        part = Calls(opaque=dict(found.opaque))
        try:
            regions = Regions()
            with regions if usual else nullcontext():
                part.graphs[_Tracer(part, regions).trace(Caller(block, arguments))] = block
        except Exception as error:  # in a `__call__` of its own
            part.opaque[block] = _in_a_line(error)
        if certain or block not in part.opaque:
            found.add(part)


def _expose_children(module: nn.Module, found: Calls) -> Iterator[nn.Module]:
    """Note what of `module` its opaque code may use, and give what it uses by calls alone."""
    whole = children_only_called(module)
    inside = {child for block in whole for child in block.modules()}
    for child in module.modules():
        if child is not module and child not in inside:
            found.exposed.setdefault(child, module)
    for block in whole:
        found.exposed.setdefault(block, module)
        if not _is_leaf(block):
            yield block


# --- tracing ------------------------------------------------------------------------------------


class Proxy(fx.Proxy):
    """A proxy that `isinstance(x, Tensor)` takes for a tensor: forwards ask that, and branch."""

    _is_param = _is_buffer = False  # torch.nn asks this of every tensor that is stored in a module

    @property
    def __class__(self) -> type:
        return Tensor


def _in_place(name: str) -> Callable:
    function = getattr(operator, name.strip("_"))

    def method(self: Proxy, *others: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, *others), {})

    return method


# torch.fx takes `y += x` for `y = y + x`, and does not know `y[i] = x`.
for _name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__"):
    setattr(Proxy, _name, _in_place(_name))


class SideEffect(Exception):
    """What a forward would do now, and not as part of what is traced."""


class _RealTensors(TorchFunctionMode):
    """Notes the tensors that a forward computes with as it is traced, and lets it change none."""

    def __init__(self, found: Calls) -> None:
        super().__init__()
        self.read = found.read

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        real = [value for value in pytree.tree_leaves((args, kwargs)) if type(value) in _REAL]
        changes = name in _CHANGING or (name.endswith("_") and not name.endswith("__"))
        if type(kwargs.get("out", args[0] if args and changes else None)) in _REAL:
            raise SideEffect(f"{name} changes a tensor")
        result = function(*args, **kwargs)
        if name not in _METADATA_CALLS and not (name == "__get__" and type(result) not in _REAL):
            self.read.update(map(id, real))
        return result


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that a forward which updates a buffer does not do it now

    def __init__(self, found: Calls, regions: Regions) -> None:
        super().__init__()
        self._found = found
        self._regions = regions
        self._callers: list[nn.Module] = []
        self._born: list[tuple[weakref.ref, fx.Node]] = []

    def trace(self, root: Caller, concrete_args: None = None) -> fx.Graph:
        root.tracer = self
        with _RealTensors(self._found):
            graph = super().trace(root)
        for node in graph.nodes:
            if node.op == "get_attr" and self._found.users(node):
                self._note_read(node)
        return graph

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = Proxy(node, self)
        self._born.append((weakref.ref(proxy), node))
        return proxy

    def create_node(self, *arguments: Any, **settings: Any) -> fx.Node:
        node = super().create_node(*arguments, **settings)
        node.meta["caller"] = self._callers[-1] if self._callers else None
        node.meta["region"] = self._regions.current()
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, nn.Module):  # given to a function, which may use any part of it
            for module in a.modules():
                self._found.exposed.setdefault(module, a)
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        """Hooks are not run: they are the user's, who does not expect proxies there."""
        m = _unwrapped(m)
        if _is_leaf(m):
            if _package(m) != modules.__name__ and next(m.children(), None) is not None:
                self._found.opaque.setdefault(m, "it is not looked into")
            return self.call_leaf(m, args, kwargs)
        if m in self._found.opaque:
            return self.call_leaf(m, args, kwargs)
        before = len(self.graph.nodes)
        self._callers.append(m)
        try:
            result = m.forward(*args, **kwargs)
        except Exception as error:
            self._found.opaque.setdefault(m, _in_a_line(error))
            self._found.dead.update(list(self.graph.nodes)[before:])
            self._callers.pop()
            return self.call_leaf(m, args, kwargs)
        self._callers.pop()
        if has_hooks(m):
            for node in _nodes((args, kwargs, result)):
                self._found.seen.setdefault(node, f"hooks of the {type(m).__name__} around it")
        return result

    def note_kept(self, result: Any) -> None:
        """Of the proxies only those still live that are returned, or kept by somebody."""
        returned = _nodes(result)
        for node in returned:
            if node.op == "get_attr":
                self._note_read(node)
        unexpected = self._found.called.keys() - returned
        if any(ref() is not None and node in unexpected for ref, node in self._born):
            gc.collect()  # or they are in reference cycles, as an exception with its frames
        for ref, node in self._born:
            if ref() is not None:
                self._found.seen.setdefault(node, "who calls the block, or keeps what it gives")

    def _note_read(self, node: fx.Node) -> None:
        """The parameter or buffer; found without the getattr that torch.fx replaces meanwhile."""
        module = self.root
        *parents, name = node.target.split(".")
        for parent in parents:
            module = module._modules[parent]
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is not None:
            self._found.read.add(id(tensor))

    def call_leaf(self, module: nn.Module, args: tuple, kwargs: dict) -> fx.Proxy:
        proxy = self.create_proxy("call_module", type(module).__name__, args, kwargs)
        self._found.called[proxy.node] = module
        self._found.calls.setdefault(module, []).append(proxy.node)
        return proxy


def _package(module: nn.Module) -> str:
    """Where the forward is defined."""
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit"
    return type(module).forward.__module__ or ""  # that of a graph has none


def _is_leaf(module: nn.Module) -> bool:
    known = ("torch.nn.", "torch.ao.nn.", "torch.jit", modules.__name__)
    return _package(module).startswith(known) and not isinstance(module, nn.Sequential)


def _unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper of torch's calls: torch.compile's, and those of data parallelism."""
    while True:
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module


def _nodes(values: Any) -> list[fx.Node]:
    return [value.node for value in pytree.tree_leaves(values) if isinstance(value, fx.Proxy)]


def _asks_for_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA_CALLS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA


def _in_a_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:120]}"
