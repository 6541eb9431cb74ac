"""Folding one batch norm into one layer: what can be, the arithmetic, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .._fusion.activations import BY_NAME, Activation, fields, has_module
from ..convert import torchs_class
from ..modules import Folded
from ..modules import _KernelForward as KernelForward
from .traced_calls import has_hooks

# Layers, and how many dimensions a batch of their outputs has.
LAYERS = {
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
# What a subclass of a layer may define and still compute the same, and the special methods that it
# may not.
_HARMLESS = {"extra_repr", "reset_parameters"}
_SPECIAL = {"__call__", "__getattr__", "__getattribute__", "__setattr__", "__new__"}
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


class Stays(Exception):
    """Why a batch norm is not folded, as the rest of a sentence that begins "stays: "."""


def layer_kind(module: nn.Module | None) -> type:
    """The class of the module that tells what it computes.

    torch's for one of ours, what a parametrised one is made from, and that of a layer for a
    subclass which overrides nothing that takes part in a call.
    """
    kind = torchs_class(parametrize.type_before_parametrizations(module))
    bases = kind.__mro__
    for place, base in enumerate(bases):
        if base in LAYERS:
            own = {name for subclass in bases[:place] for name in vars(subclass)} - _HARMLESS
            taking_part = own & {*dir(base), "weight", "bias"}
            special = {name for name in taking_part if name.startswith("__")} - _SPECIAL
            return kind if taking_part - special else base
    return kind


def check_batch_norm(batch_norm: nn.Module) -> None:
    """That it computes scale * (x - mean) + bias, and an activation that has a module."""
    kind = layer_kind(batch_norm)
    if any(map(is_lazy, (*batch_norm.parameters(), *batch_norm.buffers()))):
        raise Stays("it is lazy, and has had no input yet")
    if kind not in _BATCH_NORMS:
        raise Stays(f"its class, {kind.__name__}, may compute something else")
    if batch_norm.training:
        raise Stays("it is in training mode")
    check_plain(batch_norm, _STATE[:-1], "it")
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        raise Stays("it has no running statistics, and takes those of its batch")
    activation = _activation(batch_norm)
    if activation is not None and not has_module(activation):
        raise Stays(f"no module takes the place of its activation, {activation!r}")


def check_plain(module: nn.Module, tensors: Iterable[str], name: str) -> None:
    """Its calls are its class's forward, with tensors that can be computed with."""
    if has_hooks(module) or any(vars(module).get(hooks) for hooks in _STATE_HOOKS):
        raise Stays(f"{name} has hooks, or a forward of its own")
    if parametrize.is_parametrized(module):
        raise Stays(f"{name} is parametrised")
    for tensor in (getattr(module, tensor) for tensor in tensors):
        if tensor is None:
            continue
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or not tensor.is_floating_point():
            raise Stays(f"{name} has weights of another kind than dense floating-point tensors")
        if tensor.is_meta:
            raise Stays(f"{name} is on the meta device")


def fold_into(layer: nn.Module, batch_norm: nn.Module, residual: bool) -> None:
    """Let the layer do the work of both. `residual` tells whether the batch norm is given one."""
    accepted = _BATCH_NORMS[layer_kind(batch_norm)]
    dimensions = LAYERS[layer_kind(layer)]
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if dimensions not in accepted or channels != batch_norm.num_features:
        raise Stays(
            f"{batch_norm.num_features} channels of a {type(batch_norm).__name__} are not what a "
            f"{type(layer).__name__} with {channels} gives"
        )
    layer.weight, layer.bias = _folded_tensors(layer, batch_norm)
    _leave_rest(batch_norm, dimensions, residual or len(accepted) > 1)


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
    if not exact.numel():
        return
    error = (exact.to(dtype).double() - exact).abs().amax(1)
    if not (error <= torch.finfo(dtype).eps / 2 * exact.abs().amax(1)).all():
        name = str(dtype).removeprefix("torch.")
        raise Stays(f"the layer's weight or bias would not be finite, or too small for {name}")


# --- what is left -------------------------------------------------------------------------------


def _activation(batch_norm: nn.Module) -> Activation | None:
    """Of ours; on a batch norm of torch.nn an attribute of this name does nothing."""
    return batch_norm.activation if isinstance(batch_norm, KernelForward) else None


def _activation_module(batch_norm: nn.Module) -> nn.Module:
    """What applies its activation, or hands on its input.

    In place: the input is the layer's output, which nothing else uses.
    """
    activation = _activation(batch_norm)
    if activation is None:
        return nn.Identity()
    _, name, parameter = fields(activation)
    return BY_NAME[name].made(parameter)


def _leave_rest(batch_norm: nn.Module, dimensions: int, more: bool) -> None:
    """Turn the batch norm into what it has still to do, which may be more than its activation."""
    rest = _activation_module(batch_norm)
    for tensors in (batch_norm._parameters, batch_norm._buffers):
        for name in _STATE:
            tensors.pop(name, None)
    vars(batch_norm).pop("_fusion", None)
    if more:
        batch_norm.__class__ = Folded
        batch_norm.dimensions = dimensions
        batch_norm.last = rest
    else:
        batch_norm.__class__ = type(rest)
        own = {k: v for k, v in vars(rest).items() if k != "training" and not k.startswith("_")}
        vars(batch_norm).update(own)
