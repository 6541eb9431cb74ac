"""`fusion_report`: what each batch norm of a model takes over, or why nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._fusion.forecast import Found


@dataclass(frozen=True)
class FusedBatchNorm:
    """A batch norm, and what it takes over: "relu", "add", or "add, relu".

    Attributes:
        name: of the module, as in `named_modules`.
        training: what it takes over in the model's training mode, or None.
        evaluation: the same for evaluation mode.
        reason: why nothing, where one of the two is None; the one for training first.
    """

    name: str
    training: str | None
    evaluation: str | None
    reason: str | None

    def __str__(self) -> str:
        training, evaluation = (taken or "not fused" for taken in (self.training, self.evaluation))
        parts = f"{training} in training, {evaluation} in evaluation"
        what = training if training == evaluation else parts
        return f"{self.name}: {what}" + ("" if self.reason is None else f" ({self.reason})")


@dataclass(frozen=True)
class FusionReport:
    """Every batch norm of a model; `print` it for a line each.

    Attributes:
        batch_norms: in the order of `named_modules`.
    """

    batch_norms: tuple[FusedBatchNorm, ...]

    @property
    def fused(self) -> tuple[FusedBatchNorm, ...]:
        """Those that take something over in one of the modes."""
        return tuple(one for one in self.batch_norms if one.training or one.evaluation)

    def __str__(self) -> str:
        count = f"{len(self.fused)} of {len(self.batch_norms)} batch norms fused"
        return "\n".join([count, *map(str, self.batch_norms)])


def fusion_report(model: nn.Module) -> FusionReport:
    """What `convert(model, fuse=True)` found for every batch norm of `model`.

    Args:
        model: any module. Where batch norms have not been converted, or not with fuse=True, the
            report says so.

    Returns:
        A `FusionReport`. It is a forecast: a model that does something else when it runs computes
        that, unfused.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"fusion_report: expected model to be a torch.nn.Module, got {got}")
    return FusionReport(
        tuple(_row(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm))
    )


def _row(name: str, module: _BatchNorm) -> FusedBatchNorm:
    fusion = getattr(module, "_fusion", None)
    if not hasattr(module, "_fusion"):
        return _unfused(name, f"{type(module).__name__} is not a class that convert exchanges")
    if module._forward_hooks:
        return _unfused(name, "a forward hook gets its output")
    if fusion is None:
        return _unfused(name, "convert(model, fuse=True) has not seen it")
    forecasts = (fusion.training, fusion.evaluation)
    reasons = dict.fromkeys(found for found in forecasts if isinstance(found, str))
    taken = [str(found) if isinstance(found, Found) else None for found in forecasts]
    return FusedBatchNorm(name, *taken, "; ".join(reasons) or None)


def _unfused(name: str, reason: str) -> FusedBatchNorm:
    return FusedBatchNorm(name, None, None, reason)
