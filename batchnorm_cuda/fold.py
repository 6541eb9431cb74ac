"""`fold`: batch norms in evaluation as part of the layer before them.

Batch norm in evaluation is y = scale * (x - mean) + bias, where scale = weight / sqrt(var + eps).
Of a layer x = W u + b that is another such layer, with scale * W and scale * (b - mean) + bias.
What is left of the batch norm hands on its input, or applies an activation to it.

Its module changes class, as in `convert`, so that every reference to it stays good.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ._calls import has_hooks, trace_calls
from .convert import _check_model, torchs_class

Model = TypeVar("Model", bound=nn.Module)

# Layers, and how many dimensions a batch of their outputs has.
_LAYERS = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Batch norms, and the dimensions of what they take.
_BATCH_NORMS = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}
# What evaluation hands on as it is.
_HANDING_ON = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# What a subclass of a layer may define and still compute the same, and the special methods that it
# may not.
_HARMLESS = {"extra_repr", "reset_parameters"}
_SPECIAL = {"__call__", "__getattr__", "__getattribute__", "__setattr__", "__new__"}
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")

# Where a module keeps the sentence that `fold_report` gives of it.
_NOTE = "_fold_note"


class _Stays(Exception):
    """Why a batch norm is not folded, as the rest of a sentence that begins "stays: "."""


class Folded(nn.Module):
    """What is left of a folded batch norm that does more than to hand on its input.

    Batch norms of one dimension and synchronised ones take inputs of several numbers of dimensions.
    The layer before gives its channels where they expect them for one of these only: a linear
    layer has them last, a convolution of an input without a batch dimension has them first.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        torch._assert(input.dim() == self.dimensions, self.refusal)
        if residual is not None:
            input = input + residual
        return self.last(input)


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
    if batch_norms:
        sites = _Sites(model)
        for batch_norm in batch_norms:
            vars(batch_norm)[_NOTE] = sites.fold(batch_norm)
    return model


def fold_report(model: nn.Module) -> dict[str, str]:
    """What `fold` has made of each batch norm of `model`, by the names of their modules.

    Args:
        model: any module, usually after `fold`.

    Returns:
        "folded into ..." with the name of the layer, or "stays: " and the reason. A batch norm that
        `fold` has not seen says so.

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


class _Sites:
    """The batch norms of a model, with what comes before each."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.calls = trace_calls(model)

    def fold(self, batch_norm: nn.Module) -> str:
        """Fold it if that is possible, and say what came of it."""
        try:
            kind = _checked_kind(batch_norm)
            nodes = self._calls_of(batch_norm)
            layer = self._layer_before(nodes)
            dimensions = _dimensions(layer, kind, batch_norm)
            weight, bias = _folded_tensors(layer, batch_norm)
        except _Stays as reason:
            return f"stays: {reason}"
        layer.weight, layer.bias = weight, bias
        _leave_rest(batch_norm, kind, dimensions, any(map(_has_residual, nodes)))
        return f"folded into {self._describe(layer)}"

    def _calls_of(self, batch_norm: nn.Module) -> list[fx.Node]:
        self._refuse_exposed(batch_norm, "it")
        nodes = self.calls.calls.get(batch_norm)
        if not nodes:
            raise _Stays("the forward, as far as it could be followed, does not call it")
        return nodes

    def _layer_before(self, nodes: list[fx.Node]) -> nn.Module:
        """The one layer that gives all that the batch norm gets, and nothing to anyone else."""
        sources = [self._source(node) for node in nodes]
        layers = [self.calls.called.get(source) for source in sources]
        for source, layer in zip(sources, layers, strict=True):
            if layer is None or _kind(layer) not in _LAYERS:
                raise _Stays(f"before it is no layer to fold it into, but {self._say(source)}")
        if len(set(layers)) > 1:
            raise _Stays(f"it is shared: {' and '.join(map(self._describe, set(layers)))} use it")
        layer = layers[0]
        name = self._describe(layer)
        self._refuse_exposed(layer, name)
        if layer not in self.names:
            raise _Stays(f"{name} is not registered in the model")
        if set(self.calls.calls[layer]) != set(sources):
            raise _Stays(f"{name} is also called without it")
        if len(set(sources)) < len(sources):
            raise _Stays(f"what {name} gives is used more than once")
        _check_plain(layer, ("weight", "bias"), name)
        if any(id(tensor) in self.calls.read for tensor in (layer.weight, layer.bias)):
            raise _Stays(f"the weight or bias of {name} is used by itself, too")
        return layer

    def _source(self, node: fx.Node) -> fx.Node:
        """Where the input of a call comes from, past what hands on its own input.

        All on the way must have this one use, since its values are others once it is folded.
        """
        given = [*node.args, *node.kwargs.values()]
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            raise _Stays("it is called with something else than a tensor")
        module = self.calls.called.get(source)
        if type(module) in _HANDING_ON and not module.training and not has_hooks(module):
            before = self._source(source)
        elif _kind(module) in _LAYERS:
            before = source
        else:
            return source
        name = self._say(source)
        if self.calls.users(source) != [node] or given.count(source) > 1:
            raise _Stays(f"what {name} gives is used more than once")
        if source in self.calls.seen:
            raise _Stays(f"what {name} gives goes to {self.calls.seen[source]}, too")
        return before

    def _refuse_exposed(self, module: nn.Module, name: str) -> None:
        holder = self.calls.exposed.get(module)
        if holder is not None:
            why = self.calls.opaque.get(holder, "it is given to a function")
            holder = self._describe(holder)
            raise _Stays(f"{name} may be used by {holder}, which cannot be followed: {why}")

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


# --- what can be folded -------------------------------------------------------------------------


def _kind(module: nn.Module | None) -> type:
    """The class of the module that tells what it computes.

    torch's for one of ours, what a parametrised one is made from, and that of a layer for a
    subclass which overrides nothing that takes part in a call.
    """
    kind = torchs_class(parametrize.type_before_parametrizations(module))
    bases = kind.__mro__
    for place, base in enumerate(bases):
        if base in _LAYERS:
            own = {name for subclass in bases[:place] for name in vars(subclass)} - _HARMLESS
            taking_part = own & {*dir(base), "weight", "bias"}
            special = {name for name in taking_part if name.startswith("__")} - _SPECIAL
            return kind if taking_part - special else base
    return kind


def _checked_kind(batch_norm: nn.Module) -> type:
    kind = _kind(batch_norm)
    if any(map(is_lazy, (*batch_norm.parameters(), *batch_norm.buffers()))):
        raise _Stays("it is lazy, and has had no input yet")
    if kind not in _BATCH_NORMS:
        raise _Stays(f"its class, {kind.__name__}, may compute something else")
    if batch_norm.training:
        raise _Stays("it is in training mode")
    _check_plain(batch_norm, _STATE[:-1], "it")
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        raise _Stays("it has no running statistics, and takes those of its batch")
    activation = getattr(batch_norm, "activation", None)
    if activation is not None and activation not in _ACTIVATIONS:
        raise _Stays(f"no module takes the place of its activation, {activation!r}")
    return kind


def _check_plain(module: nn.Module, tensors: Iterable[str], name: str) -> None:
    """Its calls are its class's forward, with tensors that can be computed with."""
    if has_hooks(module) or any(vars(module).get(hooks) for hooks in _STATE_HOOKS):
        raise _Stays(f"{name} has hooks, or a forward of its own")
    if parametrize.is_parametrized(module):
        raise _Stays(f"{name} is parametrised")
    for tensor in (getattr(module, tensor) for tensor in tensors):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_floating_point():
            raise _Stays(f"{name} has weights of another kind than floating-point tensors")
        if tensor.is_meta:
            raise _Stays(f"{name} is on the meta device")


def _dimensions(layer: nn.Module, kind: type, batch_norm: nn.Module) -> int:
    """How many dimensions the batch norm gets, if the channels are where it takes them."""
    dimensions = _LAYERS[_kind(layer)]
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if dimensions not in _BATCH_NORMS[kind] or channels != batch_norm.num_features:
        raise _Stays(
            f"a {kind.__name__} of {batch_norm.num_features} channels does not take what a "
            f"{type(layer).__name__} of {channels} gives"
        )
    return dimensions


def _has_residual(node: fx.Node) -> bool:
    return len(node.args) > 1 or "residual" in node.kwargs


# --- arithmetic ---------------------------------------------------------------------------------


def _folded_tensors(layer: nn.Module, batch_norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The layer's new weight and bias."""
    weight, bias = _wide(layer.weight), _wide(layer.bias)
    mean, variance = _wide(batch_norm.running_mean), _wide(batch_norm.running_var)
    scale = (variance + batch_norm.eps).rsqrt()
    if batch_norm.weight is not None:
        scale = scale * _wide(batch_norm.weight)
    shift = -mean * scale if bias is None else (bias - mean) * scale
    if batch_norm.bias is not None:
        shift = shift + _wide(batch_norm.bias)
    rows = _by_channel(weight, layer)
    rows = rows * scale.view(-1, *[1] * (rows.dim() - 1))
    dtype = layer.weight.dtype
    _check_rounding(rows.flatten(1), dtype)
    _check_rounding(shift.expand(1, -1), dtype)
    requires_grad = layer.weight.requires_grad
    folded = torch.empty_like(layer.weight, requires_grad=False)
    with torch.no_grad():
        folded.copy_(_by_channel(rows, layer))
    shift = shift.to(folded.device, dtype)
    return nn.Parameter(folded, requires_grad), nn.Parameter(shift, requires_grad)


def _wide(tensor: Tensor | None) -> Tensor | None:
    """In float64, on the CPU: not every device has it."""
    return None if tensor is None else tensor.detach().to("cpu", torch.float64)


def _by_channel(weight: Tensor, layer: nn.Module) -> Tensor:
    """The weight with the output channel as first dimension; applied twice, as it was.

    A transposed convolution has (groups * in, out, ...) in memory, and gives groups * out channels.
    """
    if not isinstance(layer, _TRANSPOSED):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def _check_rounding(exact: Tensor, dtype: torch.dtype) -> None:
    """Each row keeps the relative accuracy of dtype: it is neither too large nor too small."""
    error = (exact.to(dtype).double() - exact).abs().amax(1)
    if not (error <= torch.finfo(dtype).eps / 2 * exact.abs().amax(1)).all():
        name = str(dtype).removeprefix("torch.")
        raise _Stays(f"the layer's weight or bias would not be finite, or too small for {name}")


# --- what is left -------------------------------------------------------------------------------

# The modules that apply the activations of batch norms. In place: the input is the layer's output,
# which nothing else uses.
_ACTIVATIONS = {"relu": (nn.ReLU, {"inplace": True})}


def _leave_rest(batch_norm: nn.Module, kind: type, dimensions: int, residual: bool) -> None:
    """Turn the batch norm into what it has still to do."""
    rest, settings = _ACTIVATIONS.get(getattr(batch_norm, "activation", None), (nn.Identity, {}))
    for tensors in (batch_norm._parameters, batch_norm._buffers):
        for name in _STATE:
            tensors.pop(name, None)
    batch_norm._non_persistent_buffers_set.difference_update(_STATE)
    if residual or len(_BATCH_NORMS[kind]) > 1:
        batch_norm.__class__ = Folded
        batch_norm.dimensions = dimensions
        batch_norm.refusal = (
            f"batchnorm_cuda.fold: expected the layer before to give {dimensions} dimensions, with "
            "its channels where the batch norm took them; use the model from before fold"
        )
        batch_norm.last = rest(**settings)
    else:
        batch_norm.__class__ = rest
        vars(batch_norm).update(settings)
