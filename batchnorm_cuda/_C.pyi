"""The compiled module: `_C` for CUDA tensors, `_C_emulated` for the host build of the kernels.

What the operators take and give is told by the records in batchnorm_cuda/_ops/calls.py. A result
that an argument says is not needed is None.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

# A signature a line.
# fmt: off

# ---- operators: written by `python -m tools.stub`

def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None, training: bool, momentum: float | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, and in training update the running statistics in place and count the batch. Gives (output, mean, invstd)."""

def backward(grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, save_mean: Tensor, save_invstd: Tensor, training: bool, need_input: bool, need_weight: bool, need_bias: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a `Forward`, those that are needed. Gives (grad_input, grad_weight, grad_bias)."""

def double_backward(grad_grad_input: Tensor | None, grad_grad_weight: Tensor | None, grad_grad_bias: Tensor | None, grad_output: Tensor | None, input: Tensor, weight: Tensor | None, save_mean: Tensor, save_invstd: Tensor, training: bool, need_grad_output: bool, need_input: bool, need_weight: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a plain `Backward`, from those of its results, which are zero where None. Gives (grad_grad_output, grad_input, grad_weight)."""

def fused_forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None, residual: Tensor | None, relu: bool, need_mask: bool, training: bool, momentum: float | None, eps: float, activation: str = "relu", parameter: float = 0.) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normalise, and in training update the running statistics in place and count the batch. Gives (output, mean, invstd, mask)."""

def fused_backward(grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, save_mean: Tensor, save_invstd: Tensor, mask: Tensor, training: bool, need_input: bool, need_weight: bool, need_bias: bool, need_residual: bool, activation: str = "relu", parameter: float = 0.) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a `Forward`, those that are needed. Gives (grad_input, grad_weight, grad_bias, grad_residual)."""

def sync_statistics(input: Tensor) -> Tensor:
    """What the other ranks must know of this rank's part: count, mean and M2, packed in one row. Gives row."""

def sync_forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None, gathered: Tensor, momentum: float | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise, and in training update the running statistics in place and count the batch. Gives (output, mean, invstd, count)."""

def sync_fused_forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None, gathered: Tensor, residual: Tensor | None, relu: bool, need_mask: bool, momentum: float | None, eps: float, activation: str = "relu", parameter: float = 0.) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Normalise, and in training update the running statistics in place and count the batch. Gives (output, mean, invstd, count, mask)."""

def sync_backward_reduce(grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of a `Forward`, those that are needed. Gives (sums, grad_weight, grad_bias)."""

def sync_fused_backward_reduce(grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, mask: Tensor, need_weight: bool, need_bias: bool, activation: str = "relu", parameter: float = 0.) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of a `Forward`, those that are needed. Gives (sums, grad_weight, grad_bias)."""

def sync_sum(gathered: Tensor) -> Tensor:
    """The sum over the first dimension, the ranks; their order does not change a bit of it. Gives sum."""

def sync_backward_elementwise(grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, sums: Tensor, count: Tensor) -> Tensor:
    """The gradients of a `Forward`, those that are needed. Gives grad_input."""

def sync_fused_backward_elementwise(grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, sums: Tensor, count: Tensor, mask: Tensor, need_input: bool, need_residual: bool, activation: str = "relu", parameter: float = 0.) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a `Forward`, those that are needed. Gives (grad_input, grad_residual)."""

# ---- what is no operator

def recorded(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None, training: bool, momentum: float | None, eps: float, residual: Tensor | None = None, relu: bool = False, activation: str = "relu", parameter: float = 0.0) -> Tensor:
    """The output alone, with a gradient where autograd records one."""

def make_plan(op: str, n: int, c: int, s: int, dtype: str, device: dict[str, Any] = {}, options: dict[str, Any] = {}) -> dict[str, Any]:
    """The plan for [n, c, s] on a described device, as a dictionary."""

def plan_candidates(op: str, n: int, c: int, s: int, dtype: str, device: dict[str, Any] = {}, options: dict[str, Any] = {}, costs: dict[str, Any] = {}) -> list[dict[str, Any]]:
    """All plans that may be chosen for [n, c, s] on a described device.

    Each with "options" that force it in make_plan and set_plan_options, its "cost" in moves
    (csrc/plan/plan_costs.h) and "predicted_bytes", the "splits" of two passes (0 of a team), and
    whether it is "chosen". `costs` overrides constants of cost_model().
    """

def cost_model() -> dict[str, Any]:
    """The constants of the planner's cost model (csrc/plan/plan_costs.h)."""

def device_info(index: int = 0) -> dict[str, Any]:
    """Properties of a device as the planner sees them."""

def set_kernel_loader(loader: Callable[[str], str]) -> None:
    """Names a function that gives the path of a shared object of kernels when they are needed.

    Called for "common", "half", "bfloat16", "float" or "double" when it is first needed, from any
    thread: by several at once, perhaps, which then load the same file.
    """

def set_plan_options(options: dict[str, Any]) -> None:
    """Forces planner choices in this process; {} takes them back."""
