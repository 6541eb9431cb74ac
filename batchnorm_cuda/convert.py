"""`convert` and `revert`: exchange torch.nn's batch norms for ours inside a model, and back.

An exchange assigns the module's `__class__`, as torch's own lazy modules and parametrisations do.
The object stays, and all that it holds stays with it: parameters, buffers, hooks, mode, attributes
that a user set, and every reference to it from wherever. Nothing is copied, so nothing is missed.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from . import modules
from ._models.fusing import fuse as leave_forecasts
from ._models.fusing import unfuse
from ._models.torch_tools import register_fusers
from .sync import SyncBatchNorm

Model = TypeVar("Model", bound=nn.Module)

_DENSE = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
}
_LAZY = {
    nn.LazyBatchNorm1d: modules.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: modules.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: modules.LazyBatchNorm3d,
}
_OURS = _DENSE | _LAZY
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}

register_fusers(_DENSE)

# Where a module that `convert(sync=True)` exchanged keeps the class that it came from.
_ORIGIN = "_class_before_sync"


def convert(model: Model, fuse: bool = False, sync: bool = False) -> Model:
    """Exchange the batch norms of torch.nn in `model` for those of this package, in place.

    `torch.nn.BatchNorm1d`, `2d` and `3d`, their lazy variants and `torch.nn.SyncBatchNorm` become
    the class of the same name. The module objects stay the same ones, so that an optimizer, hooks,
    a wrapper such as DistributedDataParallel, and any other reference to a module, parameter or
    buffer go on working, and the keys and values of `state_dict()` do not change. A module used in
    several places stays one module; parametrisations stay registered. Converting twice changes
    nothing more.

    Only exact types are exchanged. A subclass that a user wrote may compute something else, so it
    is left alone, and so are the classes that `fully_shard` makes: convert before sharding.

    Args:
        model: any module, also a batch norm itself.
        fuse: let each batch norm take over the add and the activation that stand behind it, in
            whatever form, in one pass over memory. Nothing but the batch norms is changed; what
            cannot be fused is computed as before. `fusion_report` tells which were, and
            docs/fusion.md how.
        sync: exchange `BatchNorm1d`, `2d` and `3d`, torch.nn's and ours, for `SyncBatchNorm` over
            the default process group. Without it they stay local; a `torch.nn.SyncBatchNorm` stays
            synchronised, over its own process group, in either case. A subclass that stays local is
            named in a warning.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `sync` is set and `model` has lazy batch norms, which do not know their size.

    In both cases nothing has been changed.
    """
    exchange("convert", model, sync)
    if fuse:
        leave_forecasts(model, _become)
    return model


def exchange(function: str, model: Model, sync: bool) -> Model:
    """What `convert` does; also `SyncBatchNorm.convert_sync_batchnorm`, as `function` says."""
    _check_model(function, model)
    if sync:
        _refuse_lazy(function, model)
    left = []
    for name, module in list(model.named_modules()):
        kind = parametrize.type_before_parametrizations(module)
        if kind is nn.SyncBatchNorm:
            _become(module, SyncBatchNorm)
        elif sync and (kind in _DENSE or kind in _DENSE.values()):
            setattr(module, _ORIGIN, _TORCHS.get(kind, kind))
            module.process_group = None
            _become(module, SyncBatchNorm)
        elif kind in _OURS:
            _become(module, _OURS[kind])
        elif isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            left.append(f"{kind.__name__} at {name or 'its root'!r}")
    if sync and left:
        warnings.warn(
            f"{function}: left as they are, and not synchronised, because a subclass may compute "
            f"something else: {', '.join(left)}",
            stacklevel=3,
        )
    return model


def revert(model: Model) -> Model:
    """Exchange the batch norms of this package in `model` for those of torch.nn, in place.

    The inverse of `convert`, with the same guarantees; it also takes modules that were made as ours
    from the start. `SyncBatchNorm` becomes what `convert(sync=True)` found there, otherwise
    `torch.nn.SyncBatchNorm`.

    Args:
        model: any module, also a batch norm itself.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a batch norm has an `activation`, which torch.nn's cannot apply. Nothing has
            been changed then.
    """
    _check_model("revert", model)
    _refuse_activations(model)
    for module in list(model.modules()):
        unfuse(module, _become)
        kind = parametrize.type_before_parametrizations(module)
        if kind in _TORCHS:
            _become(module, _TORCHS[kind])
        elif kind is SyncBatchNorm:
            origin = module.__dict__.pop(_ORIGIN, nn.SyncBatchNorm)
            if origin is not nn.SyncBatchNorm:
                del module.process_group
            _become(module, origin)
    return model


def torchs_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of torch.nn that one of ours takes the place of; any other class itself."""
    return nn.SyncBatchNorm if kind is SyncBatchNorm else _TORCHS.get(kind, kind)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # The class is the module's own, made by torch from the one that is exchanged: it holds the
        # parametrised tensors as properties. Its like is made from `kind`.
        of_every_class = ("__dict__", "__weakref__")
        members = {k: v for k, v in vars(type(module)).items() if k not in of_every_class}
        kind = type(f"Parametrized{kind.__name__}", (kind,), members)
    module.__class__ = kind


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"{function}: expected model to be a torch.nn.Module, got {got}")


def _refuse_activations(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = parametrize.type_before_parametrizations(module)
        ours = kind in _TORCHS or kind is SyncBatchNorm
        if ours and module.activation is not None:
            raise ValueError(
                "revert: expected the batch norms of model to have no activation, got "
                f"{kind.__name__} with activation={module.activation!r} at {name or 'its root'!r}"
            )


def _refuse_lazy(function: str, model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = parametrize.type_before_parametrizations(module)
        if kind in _LAZY or kind in _LAZY.values():
            raise ValueError(
                f"{function}: expected model to have no lazy batch norms to synchronise, got "
                f"{kind.__name__} at {name or 'its root'!r}: run a forward pass first"
            )
