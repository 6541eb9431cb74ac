"""`fold`: batch norms in evaluation as part of the layer before them.

Batch norm in evaluation is y = scale * (x - mean) + bias, where scale = weight / sqrt(var + eps).
Of a layer x = W u + b that is another such layer, with scale * W and scale * (b - mean) + bias.
What is left of the batch norm hands on its input, or applies an activation to it.

Its module changes class, as in `convert`, so that every reference to it stays good.
"""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._models.folding import (
    LAYERS,
    Stays,
    check_batch_norm,
    check_plain,
    fold_into,
    layer_kind,
)
from ._models.snapshot import Snapshot
from ._models.traced_calls import HANDING_ON, has_hooks, trace_calls
from .convert import Model, _check_model

# Where a module keeps the sentence that `fold_report` gives of it.
_NOTE = "_fold_note"


def fold(model: Model) -> Model:
    """Fold the batch norms of `model` into the convolution or linear layer before them, in place.

    For inference: the layer does the work of both, and nothing is left of the batch norm but its
    `activation`, if it has one. Batch norms of torch.nn and of this package are folded, behind
    `torch.nn.Conv1d`, `2d`, `3d`, `ConvTranspose1d`, `2d`, `3d` and `Linear`.

    What comes before a batch norm is found by torch.fx, which follows the forward of `model`, or
    the largest blocks of it that can be followed without an input. A batch norm is folded only
    where all that the layer gives goes to it, and all that it gets comes from the layer. It stays
    where the layer's output is used twice or seen by a hook, where one of the two is parametrised,
    is of a class that may compute something else, or may be used by code that cannot be followed.
    `fold_report` has the reason for each.

    Modules stay the same objects. A folded batch norm becomes a `torch.nn.Identity`, a
    `torch.nn.ReLU` or the like; the layer gets a new weight and bias, while the old ones, which a
    `state_dict()` or an optimizer may hold, keep their values. They are computed in float64 from
    whatever the dtypes are, and rounded once, to the dtype of the layer's weight.

    There is no way back: keep a copy, or the state, of a model to be trained on. The forward is
    followed as it runs in evaluation, with the attributes that modules have now, and with tensors
    for what it takes; calls of single blocks from outside, and other methods, are not considered.

    Args:
        model: any module in evaluation mode, `model.eval()`.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` is in training mode. Nothing has been changed in either case.
    """
    _check_model("fold", model)
    if model.training:
        raise ValueError(
            "fold: expected model to be in evaluation mode, got one in training mode: "
            "call model.eval() first"
        )
    batch_norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    sites = _Sites(model) if batch_norms else None
    changes = [sites.fold(batch_norm) for batch_norm in batch_norms]
    if any(changes) and sites.lead_elsewhere():
        for change in filter(None, reversed(changes)):
            change.restore()
        for batch_norm in batch_norms:  # which one was it?
            change = sites.fold(batch_norm)
            if change is not None and sites.lead_elsewhere():
                change.restore()
                _note(batch_norm, "stays: the forward takes another way without it")
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module._assign_modules_buffers()  # it broadcasts those it knows, and not none
    return model


def fold_report(model: nn.Module) -> dict[str, str]:
    """What `fold` has made of each batch norm of `model`, by the names of their modules.

    Args:
        model: any module, usually after `fold`.

    Returns:
        A sentence for each. It begins with "folded into" and names the layer, or with "stays" and
        gives the reason; a batch norm that `fold` has not seen says so.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_model("fold_report", model)
    report = {}
    for name, module in model.named_modules():
        note = vars(module).get(_NOTE)
        if note is None and isinstance(module, _BatchNorm):
            note = "stays: fold has not seen it"
        if note is not None:
            report[name] = note
    return report


def _note(module: nn.Module, text: str) -> None:
    vars(module)[_NOTE] = text


class _Sites:
    """The batch norms of a model, with what comes before each."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.calls = trace_calls(model)

    def fold(self, batch_norm: nn.Module) -> Snapshot | None:
        """Fold it if that is possible, and give what undoes it. What came of it is noted there."""
        try:
            check_batch_norm(batch_norm)
            nodes = self._calls_of(batch_norm)
            layer = self._layer_before(nodes)
            before = Snapshot((layer, batch_norm))
            fold_into(layer, batch_norm, any(map(_has_residual, nodes)))
        except Stays as reason:
            _note(batch_norm, f"stays: {reason}")
            return None
        _note(batch_norm, f"folded into {self._describe(layer)}")
        return before

    def lead_elsewhere(self) -> bool:
        """Whether the forward does something else now, as one does that asks for classes."""
        return trace_calls(self.model).course() != self.calls.course()

    def _calls_of(self, batch_norm: nn.Module) -> list[fx.Node]:
        self._refuse_exposed(batch_norm, "it")
        nodes = self.calls.calls.get(batch_norm)
        if not nodes:
            raise Stays("the forward, as far as it could be followed, does not call it")
        return nodes

    def _layer_before(self, nodes: list[fx.Node]) -> nn.Module:
        """The one layer that gives all that the batch norm gets, and nothing to anyone else."""
        sources = [self._source(node) for node in nodes]
        layers = [self.calls.called.get(source) for source in sources]
        for source, layer in zip(sources, layers, strict=True):
            if layer is None or layer_kind(layer) not in LAYERS:
                raise Stays(f"before it is no layer to fold it into, but {self._say(source)}")
        if len(set(layers)) > 1:
            raise Stays(f"it is shared: {' and '.join(map(self._describe, set(layers)))} use it")
        layer = layers[0]
        name = self._describe(layer)
        self._refuse_exposed(layer, name)
        if layer not in self.names:
            raise Stays(f"{name} comes before it")
        if set(self.calls.calls[layer]) != set(sources):
            raise Stays(f"{name} is also called without it")
        check_plain(layer, ("weight", "bias"), name)
        if any(id(tensor) in self.calls.read for tensor in (layer.weight, layer.bias)):
            raise Stays(f"the weight or bias of {name} is used by itself, too")
        return layer

    def _source(self, node: fx.Node) -> fx.Node:
        """Where the input of a call comes from, past what hands on its own input.

        All on the way must have this one use, since its values are others once it is folded.
        """
        given = [*node.args, *node.kwargs.values()]
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            raise Stays("it is called with something else than a tensor")
        module = self.calls.called.get(source)
        if type(module) in HANDING_ON and not module.training and not has_hooks(module):
            before = self._source(source)
        elif layer_kind(module) in LAYERS:
            before = source
        else:
            return source
        name = self._say(source)
        if self.calls.users(source) != [node] or given.count(source) > 1:
            raise Stays(f"what {name} gives is used more than once")
        if source in self.calls.seen:
            raise Stays(f"what {name} gives goes to {self.calls.seen[source]}, too")
        return before

    def _refuse_exposed(self, module: nn.Module, name: str) -> None:
        holder = self.calls.exposed.get(module)
        if holder is not None:
            why = self.calls.opaque.get(holder, "it is given to a function")
            holder = self._describe(holder)
            raise Stays(f"{name} may be used by {holder}, which cannot be followed: {why}")

    def _describe(self, module: nn.Module) -> str:
        kind = type(module).__name__
        if module not in self.names:
            return f"an unregistered {kind}"
        return f"{self.names[module]!r} ({kind})" if self.names[module] else f"the model ({kind})"

    def _say(self, node: fx.Node) -> str:
        if node in self.calls.called:
            return self._describe(self.calls.called[node])
        if node.op == "placeholder":
            return "an input"
        return getattr(node.target, "__name__", str(node.target))


def _has_residual(node: fx.Node) -> bool:
    return len(node.args) > 1 or "residual" in node.kwargs
