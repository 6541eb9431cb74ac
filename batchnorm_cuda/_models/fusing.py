"""Leaves forecasts with the batch norms of a model, and takes them back."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize

from .._fusion import pending
from .._fusion.forecast import Fusion
from . import behind, timm_layers

Become = Callable[[nn.Module, type[nn.Module]], None]


def fuse(model: nn.Module, become: Become) -> None:
    """Leave a forecast with each batch norm of this package in `model`."""
    pending.tell_dynamo()
    for module in list(model.modules()):
        kind = parametrize.type_before_parametrizations(module)
        if timm_layers.is_theirs(kind):
            become(module, timm_layers.ours())
    in_training, in_evaluation = (behind.find(model, training) for training in (True, False))
    for module in model.modules():
        if hasattr(module, "_fusion"):
            module._fusion = Fusion(in_training[module], in_evaluation[module])


def unfuse(module: nn.Module, become: Become) -> None:
    """Take back what `fuse` did to one module."""
    module.__dict__.pop("_fusion", None)
    if timm_layers.is_ours(parametrize.type_before_parametrizations(module)):
        become(module, timm_layers.theirs())
