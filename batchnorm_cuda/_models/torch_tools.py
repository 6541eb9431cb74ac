"""Tools of torch that take batch norms apart or go by their exact class, and know none of ours.

Each works with ours, or refuses in words that say what to call instead:

- `torch.nn.SyncBatchNorm.convert_sync_batchnorm` keeps an activation: such a batch norm becomes our
  `SyncBatchNorm`.
- `fuse_conv_bn_eval` and `fuse_linear_bn_eval` of torch.nn.utils.fusion refuse an activation.
- `torch.ao.quantization.fuse_modules` fuses ours as it fuses torch.nn's.
- `torch.fx.experimental.optimization.fuse` and torch.ao.quantization's graph mode pass over classes
  that they do not know, without a word: they are refused where they would have fused.
- `torch.jit.script` cannot compile the kernels' Python: refused.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from torch import Tensor, fx, nn
from torch.nn.utils import fusion

from .._ops.choice import is_compiling

_CONVERTS = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__
_FUSES = (fusion.fuse_conv_bn_eval.__code__, fusion.fuse_linear_bn_eval.__code__)


class RunningMean:
    """`running_mean` of a batch norm: its buffer, but it is noticed who takes the module apart.

    Functions of torch that build something else out of a batch norm call nothing of it. They all
    read its running mean, and leave its activation out. Without a `__set__` all but reading stays
    `torch.nn.Module`'s.
    """

    def __get__(
        self, module: nn.Module | None, kind: type[nn.Module]
    ) -> Tensor | RunningMean | None:
        if module is None:
            return self
        if module.activation is not None and not is_compiling():
            _keep_activation(module, sys._getframe(1))
        return nn.Module.__getattr__(module, "running_mean")


def _keep_activation(module: nn.Module, reader: FrameType) -> None:
    if reader.f_code is _CONVERTS:
        from ..sync import SyncBatchNorm

        synchronised = reader.f_locals.get("module_output")
        if type(synchronised) is not nn.SyncBatchNorm:
            raise RuntimeError(
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm would leave out "
                f"activation={module.activation!r}: call batchnorm_cuda.convert(model, sync=True)"
            )
        synchronised.__class__ = SyncBatchNorm
        synchronised.activation = module.activation
    elif reader.f_code in _FUSES:
        raise ValueError(
            f"torch.nn.utils.fusion: {reader.f_code.co_name} would leave out "
            f"activation={module.activation!r}: call batchnorm_cuda.fold(model), which keeps it"
        )


def refuse_fusing_by_class(tracer: fx.Tracer, input: object) -> None:
    """Where torch.fx traces a batch norm of ours in order to fuse it, had it another class."""
    if not isinstance(input, fx.Proxy) or input.node.op != "call_module":
        return
    layer = tracer.root.get_submodule(input.node.target)
    follows = isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
    if follows and _is_called_to_fuse():
        raise RuntimeError(
            "torch fuses batch norms by their exact class, and would pass over batchnorm_cuda's: "
            "call batchnorm_cuda.fold(model) in its place, or batchnorm_cuda.revert(model) before"
        )


def _is_called_to_fuse() -> bool:
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == "torch.ao.quantization.quantize_fx" or (
            module == "torch.fx.experimental.optimization" and frame.f_code.co_name == "fuse"
        ):
            return True
        frame = frame.f_back
    return False


def refuse_script(module: nn.Module) -> NoReturn:
    raise RuntimeError(
        f"torch.jit.script cannot compile a {type(module).__name__} of batchnorm_cuda: call "
        "batchnorm_cuda.revert(model) before it or, in evaluation, batchnorm_cuda.fold(model); "
        "torch.jit.trace takes the model as it is"
    )


def register_fusers(classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Let torch.ao.quantization fuse what `classes` maps torch's batch norms to as it fuses those.

    Its table of fusions is private, and torch.ao may go: then its own error says what it lacks.
    """
    try:
        from torch.ao.quantization.fuser_method_mappings import _DEFAULT_OP_LIST_TO_FUSER_METHOD
    except ImportError:
        return
    for pattern, fuse in list(_DEFAULT_OP_LIST_TO_FUSER_METHOD.items()):
        ours = tuple(classes.get(kind, kind) for kind in pattern)
        if ours != pattern:
            _DEFAULT_OP_LIST_TO_FUSER_METHOD[ours] = _with_torchs(fuse, classes)


def _with_torchs(
    fuse: Callable[..., nn.Module], classes: dict[type[nn.Module], type[nn.Module]]
) -> Callable[..., nn.Module]:
    torchs = {ours: theirs for theirs, ours in classes.items()}

    def fuse_ours(is_qat: bool, *modules: nn.Module) -> nn.Module:
        return fuse(is_qat, *(_as_torchs(module, torchs) for module in modules))

    return fuse_ours


def _as_torchs(module: nn.Module, torchs: dict[type[nn.Module], type[nn.Module]]) -> Any:
    """The module of torch.nn that has all that this one has; the module itself is left alone."""
    if type(module) not in torchs:
        return module
    if module.activation is not None:
        raise ValueError(
            "torch.ao.quantization would leave out "
            f"activation={module.activation!r}: call batchnorm_cuda.fold(model) before it"
        )
    twin = copy.copy(module)
    twin.__class__ = torchs[type(module)]
    return twin
