"""The compiled module: `_C` for CUDA tensors, `_C_emulated` for the host build of the kernels."""

from typing import Any

from torch import Tensor

def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, save_mean, save_invstd); updates the running statistics when training."""

def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    training: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(grad_input, grad_weight, grad_bias), None where not needed."""

def double_backward(
    grad_grad_input: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    training: bool,
    need_grad_output: bool,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(grad_grad_output, grad_input, grad_weight), None where not needed."""

def make_plan(
    op: str,
    n: int,
    c: int,
    s: int,
    dtype: str,
    device: dict[str, Any] = {},
    options: dict[str, Any] = {},
) -> dict[str, Any]:
    """The plan for [n, c, s] on a described device, as a dictionary."""

def device_info(index: int = 0) -> dict[str, Any]:
    """Properties of a device as the planner sees them."""

def set_plan_options(options: dict[str, Any]) -> None:
    """Forces planner choices in this process; {} takes them back."""
