"""Which way a call goes. Each function is a table: the first row that holds decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._build import extension
from . import composite
from .calls import Forward

# Aliases: the look-ups of their names would be paid on every call. Of compilers only Dynamo works
# on tensors that look like any others; torch.compiler.is_compiling, of every one, takes two calls.
is_compiling = torch.compiler.is_dynamo_compiling
is_tracing = torch._C._is_tracing  # by torch.jit: sizes are tensors
is_grad_enabled = torch.is_grad_enabled
transforms_active = torch._C._are_functorch_transforms_active  # grad, vmap, jvp, ... of torch.func
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_kernels = extension.has_kernels
_emulates = extension.emulates

dispatcher = torch.ops.batchnorm_cuda

Way = Literal["composite", "in parts", "recorded", "direct"]


def way_of(call: Forward) -> Way:
    """Who differentiates the call, once its arguments are checked.

    ============================================================  =============
    no kernels take the input                                     "composite"
    a transform of torch.func or forward-mode AD is active        "in parts"
    gradients are recorded, and torch.jit traces no graph         "recorded"
    else                                                          "direct"
    ============================================================  =============

    "composite": autograd, through torch's own operators. "in parts": Functions that can be
    transformed, one for each part of a fused call. "recorded": the Function of plain training.
    "direct": nobody. Over several ranks all calls are recorded or direct: a composite could not
    gather in its backward, and no transform can in any pass.
    """
    if call.group is None:
        if not _has_kernels(call.input):
            return "composite"
        if not is_compiling():
            if transforms_active() or forward_ad._current_level >= 0:
                return "in parts"
            if is_tracing():  # which would hold the Function beside the operator
                return "direct"
    return "recorded" if is_grad_enabled() else "direct"


def computes(call: Any, seen: Callable[[Any], tuple[object, ...]], dispatched: bool = False) -> Any:
    """Who computes a pass of this record, called as `computes(...).forward(...)`.

    ============================================================  =====================
    Dynamo, a dispatch mode or torch.jit has to see an operator,  `dispatcher`
    or one of the tensors that are `seen` is of a subclass
    no kernels take them                                          `composite`
    they are on a GPU                                             the extension
    they are on the CPU, and emulation is asked for               the extension's twin
    ============================================================  =====================

    Behind the dispatcher the first row is left out.

    The dispatcher costs the boxing of every argument, several times the price of a direct call.
    `seen` gives the tensors, of which the first has the device; Dynamo does not trace it.
    """
    if not dispatched and (is_compiling() or _dispatch_modes() or is_tracing()):
        return dispatcher
    tensors = seen(call)
    if not dispatched:
        for tensor in tensors:
            # What is no tensor at all, the extension refuses by a TypeError.
            if type(tensor) is not Tensor and isinstance(tensor, Tensor):
                return dispatcher
    tensor = tensors[0]
    if tensor.is_cuda:
        return extension._cuda or extension.load_cuda()
    if _emulates() and tensor.is_cpu:
        return extension._emulated or extension.load_emulated()
    return composite


def implementation(tensor: Tensor) -> Any:
    """Who computes behind the dispatcher."""
    return computes((tensor,), tuple, dispatched=True)


def is_recorded() -> bool:
    """True where a backward must itself be a differentiable or transformable operation."""
    # forward_ad's own function of this takes a call more, on the path of every step.
    active = is_grad_enabled() or forward_ad._current_level >= 0 or transforms_active()
    # Compilers differentiate once, by themselves.
    return active and not torch.compiler.is_compiling()


def forward_mode_active() -> bool:
    """True inside of `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0
