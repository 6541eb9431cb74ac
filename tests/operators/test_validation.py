"""Bad arguments: the error names the argument, what was expected and what came; nothing is written.

One table for every backend, so that code tried on a laptop fails there as it would on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import fill_parameters
from conftest import Backend
from parametrisations import both_modes
from torch import Tensor

from batchnorm_cuda import batch_norm
from batchnorm_cuda._ops import operators as ops

N, C, L = 4, 8, 3
DTYPES = "torch.float16, torch.bfloat16, torch.float32 or torch.float64"


@dataclass(frozen=True)
class Bad:
    """A call that is right but for `changes`, and the error it must give."""

    changes: dict[str, Callable[[str], object] | object]
    error: type[Exception]
    message: str

    @property
    def id(self) -> str:
        return self.message.removeprefix("batch_norm: expected ")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[str], Tensor]:
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


def sparse(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.zeros(shape, device=device).to_sparse()


def on_meta(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.zeros(shape, device="meta")


def with_grad(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.zeros(shape, device=device, requires_grad=True)


def expected(text: str) -> str:
    return f"batch_norm: expected {text}"


HALF = {
    name: zeros(*shape, dtype=torch.float16)
    for name, shape in {
        "input": (N, C, L),
        "weight": (C,),
        "bias": (C,),
        "running_mean": (C,),
        "running_var": (C,),
    }.items()
}

TABLE = [
    # input
    Bad({"input": [1.0]}, TypeError, expected("input to be a torch.Tensor, got list")),
    Bad({"input": None}, TypeError, expected("input to be a torch.Tensor, got None")),
    Bad(
        {"input": zeros(N, C, L, dtype=torch.int64)},
        TypeError,
        expected(f"input to have dtype {DTYPES}, got torch.int64"),
    ),
    Bad(
        {"input": zeros(N, C, L, dtype=torch.uint8)},
        TypeError,
        expected(f"input to have dtype {DTYPES}, got torch.uint8"),
    ),
    Bad(
        {"input": zeros(N, C, L, dtype=torch.complex64)},
        TypeError,
        expected(f"input to have dtype {DTYPES}, got torch.complex64"),
    ),
    Bad(
        {"input": zeros(5)},
        ValueError,
        expected("input to have at least 2 dimensions, got shape [5]"),
    ),
    Bad(
        {"input": zeros()},
        ValueError,
        expected("input to have at least 2 dimensions, got shape []"),
    ),
    Bad(
        {"input": sparse(N, C)},
        TypeError,
        expected("input to be a strided tensor, got torch.sparse_coo"),
    ),
    Bad(
        {"input": zeros(1, C)},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 8])",
    ),
    Bad(
        {"input": zeros(1, C, 1, 1)},
        ValueError,
        "Expected more than 1 value per channel when training, "
        "got input size torch.Size([1, 8, 1, 1])",
    ),
    # weight and bias
    Bad({"weight": zeros(7)}, ValueError, expected("weight to have shape [8], got [7]")),
    Bad({"weight": zeros(8, 1)}, ValueError, expected("weight to have shape [8], got [8, 1]")),
    Bad({"weight": zeros()}, ValueError, expected("weight to have shape [8], got []")),
    Bad({"bias": zeros(9)}, ValueError, expected("bias to have shape [8], got [9]")),
    Bad(
        {"weight": zeros(C, dtype=torch.float64)},
        TypeError,
        expected("weight to have dtype torch.float32, got torch.float64"),
    ),
    Bad(
        {"weight": zeros(C, dtype=torch.int32)},
        TypeError,
        expected("weight to have dtype torch.float32, got torch.int32"),
    ),
    Bad(
        {"bias": zeros(C, dtype=torch.float16)},
        TypeError,
        expected("bias to have dtype torch.float32, got torch.float16"),
    ),
    Bad(
        {**HALF, "weight": zeros(C, dtype=torch.bfloat16)},
        TypeError,
        expected("weight to have dtype torch.float16 or torch.float32, got torch.bfloat16"),
    ),
    Bad(
        {**HALF, "bias": zeros(C, dtype=torch.float64)},
        TypeError,
        expected("bias to have dtype torch.float16 or torch.float32, got torch.float64"),
    ),
    Bad(
        {"weight": on_meta(C)},
        RuntimeError,
        expected("weight to be on {device}, the device of input, got meta"),
    ),
    Bad(
        {"bias": on_meta(C)},
        RuntimeError,
        expected("bias to be on {device}, the device of input, got meta"),
    ),
    Bad(
        {"weight": sparse(C)},
        TypeError,
        expected("weight to be a strided tensor, got torch.sparse_coo"),
    ),
    Bad(
        {"weight": [1.0] * C}, TypeError, expected("weight to be a torch.Tensor or None, got list")
    ),
    Bad({"bias": 0.5}, TypeError, expected("bias to be a torch.Tensor or None, got float")),
    # running statistics
    Bad(
        {"running_mean": zeros(3)}, ValueError, expected("running_mean to have shape [8], got [3]")
    ),
    Bad(
        {"running_var": zeros(1, 8)},
        ValueError,
        expected("running_var to have shape [8], got [1, 8]"),
    ),
    Bad(
        {**HALF, "running_mean": zeros(C, dtype=torch.float64)},
        TypeError,
        expected("running_mean to have dtype torch.float16 or torch.float32, got torch.float64"),
    ),
    Bad(
        {"running_var": zeros(C, dtype=torch.bfloat16)},
        TypeError,
        expected("running_var to have dtype torch.float32, got torch.bfloat16"),
    ),
    Bad(
        {"running_mean": on_meta(C)},
        RuntimeError,
        expected("running_mean to be on {device}, the device of input, got meta"),
    ),
    Bad(
        {"running_var": on_meta(C)},
        RuntimeError,
        expected("running_var to be on {device}, the device of input, got meta"),
    ),
    Bad(
        {"running_mean": None},
        ValueError,
        expected("running_mean to be given with running_var, got None"),
    ),
    Bad(
        {"running_var": None},
        ValueError,
        expected("running_var to be given with running_mean, got None"),
    ),
    Bad(
        {"running_mean": None, "running_var": None, "training": False},
        ValueError,
        expected("running_mean and running_var to be given when training=False, got None"),
    ),
    Bad(
        {"running_mean": with_grad(C)},
        RuntimeError,
        expected("running_mean not to require grad, got a tensor with requires_grad=True"),
    ),
    Bad(
        {"running_var": with_grad(C)},
        RuntimeError,
        expected("running_var not to require grad, got a tensor with requires_grad=True"),
    ),
    Bad(
        {"running_var": (1.0,) * C},
        TypeError,
        expected("running_var to be a torch.Tensor or None, got tuple"),
    ),
    # settings
    Bad({"eps": -1e-5}, ValueError, expected("eps to be finite and not negative, got -1e-05")),
    Bad({"eps": float("nan")}, ValueError, expected("eps to be finite and not negative, got nan")),
    Bad({"eps": float("inf")}, ValueError, expected("eps to be finite and not negative, got inf")),
    Bad({"eps": None}, TypeError, expected("eps to be a number, got None")),
    Bad({"eps": "small"}, TypeError, expected("eps to be a number, got str")),
    Bad({"momentum": None}, TypeError, expected("momentum to be a number, got None")),
    Bad({"momentum": "0.1"}, TypeError, expected("momentum to be a number, got str")),
]


def call_with(bad: Bad, device: str) -> dict[str, object]:
    parameters = fill_parameters(C, torch.float32, device)
    arguments: dict[str, object] = {"input": torch.randn(N, C, L).to(device), **vars(parameters)}
    arguments["training"] = True
    for name, change in bad.changes.items():
        arguments[name] = change(device) if callable(change) else change
    return arguments


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_bad_argument(backend: Backend, bad: Bad, grad: bool) -> None:
    arguments = call_with(bad, backend.device)
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and not v.is_meta}
    before = {name: (tensor.clone(), tensor._version) for name, tensor in tensors.items()}

    with torch.set_grad_enabled(grad), pytest.raises(bad.error) as raised:
        batch_norm(**arguments)

    assert type(raised.value) is bad.error
    device = torch.empty(0, device=backend.device).device
    assert str(raised.value) == bad.message.replace("{device}", str(device))
    for name, tensor in tensors.items():
        values, version = before[name]
        assert tensor._version == version, f"{name} was written to"
        if not tensor.is_sparse:
            assert torch.equal(tensor, values), f"{name} was changed"


def test_error_hides_no_cause(backend: Backend) -> None:
    """The error for a wrong type replaces the one it was noticed by."""
    with pytest.raises(TypeError) as raised:
        batch_norm([1.0], None, None, training=True)
    assert raised.value.__suppress_context__


@both_modes
def test_parameters_are_checked_in_both_modes(backend: Backend, training: bool) -> None:
    x = torch.randn(N, C, L).to(backend.device)
    mean, var = torch.zeros(C, device=x.device), torch.ones(C, device=x.device)
    with pytest.raises(ValueError, match="expected bias to have shape"):
        batch_norm(x, mean, var, None, torch.zeros(3, device=x.device), training)


def test_integer_settings_are_numbers(backend: Backend) -> None:
    x = torch.randn(N, C, L).to(backend.device)
    mean, var = torch.zeros(C, device=x.device), torch.ones(C, device=x.device)
    batch_norm(x, mean, var, training=True, momentum=1, eps=0)
    torch.testing.assert_close(mean, x.mean((0, 2)))


BACKWARD_TABLE = [
    Bad(
        {"grad_output": zeros(N, C, L + 1)},
        ValueError,
        expected("grad_output to have shape [4, 8, 3], got [4, 8, 4]"),
    ),
    Bad(
        {"grad_output": zeros(N, C, L, dtype=torch.float64)},
        TypeError,
        expected("grad_output to have dtype torch.float32, the dtype of input, got torch.float64"),
    ),
    Bad(
        {"grad_output": sparse(N, C, L)},
        TypeError,
        expected("grad_output to be a strided tensor, got torch.sparse_coo"),
    ),
    Bad({"save_mean": zeros(7)}, ValueError, expected("save_mean to have shape [8], got [7]")),
    Bad(
        {"save_invstd": zeros(C, dtype=torch.float16)},
        TypeError,
        expected("save_invstd to have dtype torch.float32, got torch.float16"),
    ),
    Bad(
        {"weight": None},
        ValueError,
        expected("weight to be given where its gradient is wanted, got None"),
    ),
    Bad(
        {"bias": None},
        ValueError,
        expected("bias to be given where its gradient is wanted, got None"),
    ),
]


@pytest.mark.parametrize("bad", BACKWARD_TABLE, ids=lambda bad: bad.id)
def test_bad_argument_of_backward(kernels: Backend, bad: Bad) -> None:
    """The operator checks what autograd hands it, and what is handed to it past autograd."""
    device = kernels.device
    arguments: dict[str, object] = {
        name: torch.randn(shape).to(device)
        for name, shape in {
            "grad_output": (N, C, L),
            "input": (N, C, L),
            "weight": (C,),
            "bias": (C,),
            "save_mean": (C,),
            "save_invstd": (C,),
        }.items()
    }
    for name, change in bad.changes.items():
        arguments[name] = change(device) if callable(change) else change
    with pytest.raises(bad.error) as raised:
        ops.backward(**arguments, training=True, need_input=True, need_weight=True, need_bias=True)
    assert str(raised.value) == bad.message


@pytest.mark.parametrize(
    ("counter", "error", "message"),
    [
        (
            torch.ones(()),
            TypeError,
            expected("num_batches_tracked to have dtype torch.int64, got torch.float32"),
        ),
        (
            torch.ones(2, dtype=torch.int64),
            ValueError,
            expected("num_batches_tracked to have one element, got shape [2]"),
        ),
        (
            None,
            ValueError,
            expected("momentum to be a number where num_batches_tracked is not given, got None"),
        ),
    ],
    ids=["dtype", "shape", "missing"],
)
def test_bad_counter(
    kernels: Backend, counter: Tensor | None, error: type[Exception], message: str
) -> None:
    x = torch.randn(N, C, L).to(kernels.device)
    mean, var = torch.zeros(C, device=x.device), torch.ones(C, device=x.device)
    counter = counter if counter is None else counter.to(kernels.device)
    with pytest.raises(error) as raised:
        ops.forward(x, None, None, mean, var, counter, True, None, 1e-5)
    assert str(raised.value) == message
    assert not mean.any()
