"""The operators of fused batch norm: their schemas and rules, by torch.library.opcheck, and what
autograd and torch.func make of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, channels_last, contiguous, fill, fill_parameters
from conftest import KERNELS, Backend
from fused import CHANNELS, FORMS, every_form, small_tensors
from parametrisations import both_modes, every_layout
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import vmap

from batchnorm_cuda import batch_norm
from batchnorm_cuda._ops import operators as ops

operators = torch.ops.batchnorm_cuda


every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])


def forward_arguments(
    layout: Callable, dtype: torch.dtype, form: str, training: bool, need_mask: bool
) -> tuple:
    x, residual = (
        fill(Case((2, CHANNELS, 4, 3), "small", layout), dtype, KERNELS.device) for _ in "xr"
    )
    p = fill_parameters(
        CHANNELS, torch.float64 if dtype == torch.float64 else torch.float32, x.device
    )
    added, relu = FORMS[form]
    tensors = (x, p.weight, p.bias, p.running_mean, p.running_var, None)
    return (*tensors, residual if added else None, relu, need_mask, training, 0.1, 1e-5)


@every_layout
@every_dtype
@every_form
def test_opcheck_forward(layout: Callable, dtype: torch.dtype, form: str) -> None:
    for need_mask in {False, FORMS[form][1]}:
        arguments = forward_arguments(layout, dtype, form, True, need_mask)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators.fused_forward.default, arguments, test_utils=tests)


@every_form
@both_modes
def test_opcheck_forward_with_gradients(form: str, training: bool) -> None:
    x, weight, bias, mean, var, _, residual, *rest = forward_arguments(
        contiguous, torch.float64, form, training, FORMS[form][1]
    )
    for tensor in (x, weight, bias, residual):
        if tensor is not None:
            tensor.requires_grad_()
    counter = torch.tensor(2).to(x.device)
    arguments = (x, weight, bias, mean, var, counter, residual, *rest)
    torch.library.opcheck(operators.fused_forward.default, arguments)


def backward_arguments(layout: Callable, dtype: torch.dtype, training: bool) -> tuple:
    arguments = forward_arguments(layout, dtype, "residual and relu", training, True)
    x, weight, bias, *_ = arguments
    _, mean, invstd, mask = ops.fused_forward(*arguments)
    return torch.randn_like(x), x, weight, bias, mean, invstd, mask, training


@every_layout
@both_modes
@pytest.mark.parametrize(
    "needed",
    [
        (True, True, True, True),
        (True, False, False, False),
        (False, True, True, False),
        (False, False, False, True),
        (False, False, True, True),
    ],
)
def test_opcheck_backward(layout: Callable, training: bool, needed: tuple[bool, ...]) -> None:
    arguments = (*backward_arguments(layout, torch.bfloat16, training), *needed)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operators.fused_backward.default, arguments, test_utils=tests)


@both_modes
def test_dispatcher_and_direct_call_agree(training: bool) -> None:
    """The two ways into the kernels, forward and backward."""
    results = []
    for direct in (True, False):
        torch.manual_seed(3)
        arguments = forward_arguments(contiguous, torch.float32, "relu", training, True)
        call = ops.fused_forward if direct else operators.fused_forward
        forward = call(*arguments)
        torch.manual_seed(4)
        backward = backward_arguments(channels_last, torch.float32, training)
        call = ops.fused_backward if direct else operators.fused_backward
        results.append([*forward[:3], *arguments[3:5], *call(*backward, *(True,) * 4)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("operator", ["forward", "reduce", "elementwise", "residual only"])
def test_opcheck_synchronised(backend: Backend, operator: str) -> None:
    x = torch.randn(3, 4, 5, 2).to(memory_format=torch.channels_last).to(backend.device)
    w, b, mean, var = torch.rand(4, 4).to(backend.device).unbind()
    running = mean.clone(), var.clone()
    row = ops.sync_statistics(x)
    rows, sums = torch.stack([row, row]), torch.randn(2, 4).to(backend.device)
    count = torch.tensor([60]).to(backend.device)
    before = (x, w, b, *running, None, rows, x.clone())
    *_, mask = ops.sync_fused_forward(*before, True, True, 0.1, 1e-5)
    elementwise = (x.contiguous(), x, w, mean, var, sums, count, mask)
    calls = {
        "forward": [
            (operators.sync_fused_forward, (*before, True, True, 0.1, 1e-5)),
            (operators.sync_fused_forward, (*before, True, False, 0.1, 1e-5)),
        ],
        "reduce": [
            (operators.sync_fused_backward_reduce, (x, x, w, b, mean, var, mask, True, True)),
            (operators.sync_fused_backward_reduce, (x, x, w, b, mean, var, mask, False, True)),
        ],
        "elementwise": [(operators.sync_fused_backward_elementwise, (*elementwise, True, True))],
        "residual only": [(operators.sync_fused_backward_elementwise, (*elementwise, False, True))],
    }
    for operator_packet, arguments in calls[operator]:
        torch.library.opcheck(operator_packet.default, arguments)


def test_fake_tensors_run_no_kernel(backend: Backend) -> None:
    with FakeTensorMode() as mode:
        x, r = (mode.from_tensor(torch.randn(2, CHANNELS, 4).to(backend.device)) for _ in "xr")
        output = batch_norm(
            x.requires_grad_(), None, None, training=True, residual=r, activation="relu"
        )
        assert type(output) is type(x)
        output.sum().backward()
        assert x.grad.stride() == x.stride()


@both_modes
def test_operators_under_vmap(kernels: Backend, training: bool) -> None:
    """As a program that torch.export has made meets them: forward and backward, example by example.

    The mask is each example's own.
    """
    x, residual, weight = small_tensors(kernels, 2)
    state = torch.rand(2, CHANNELS, dtype=x.dtype).to(x.device) + 0.5

    def forward(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        running = (None, None) if training else state
        arguments = (x, weight, None, *running, None, residual, True, True, training, 0.1, 1e-5)
        output, mean, invstd, mask = operators.fused_forward(*arguments)
        backward = (x.square(), x, weight, None, mean, invstd, mask, training)
        return output, mask, *operators.fused_backward(*backward, True, True, False, True)

    got = vmap(forward)(x, residual)
    one_by_one = [forward(*example) for example in zip(x, residual, strict=True)]
    torch.testing.assert_close(got, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


@pytest.mark.parametrize("counters", ["none", "shared", "of examples"])
def test_operator_under_vmap_updates_its_statistics(kernels: Backend, counters: str) -> None:
    x, residual, _ = small_tensors(kernels, 2)
    counter = {
        "none": None,
        "shared": torch.tensor(3).to(x.device),
        "of examples": torch.tensor([3, 5]).to(x.device),
    }[counters]
    momentum = 0.1 if counter is None else None
    mean, var = (torch.ones(2, CHANNELS, dtype=x.dtype, device=x.device) for _ in range(2))
    twins = [(m.clone(), v.clone()) for m, v in zip(mean, var, strict=True)]
    counts = [None, None] if counter is None else counter.expand(2).clone()

    def forward(x: Tensor, mean: Tensor, var: Tensor, counter: Tensor | None) -> Tensor:
        settings = (residual[0], True, False, True, momentum, 1e-5)
        return operators.fused_forward(x, None, None, mean, var, counter, *settings)[0]

    in_dims = (0, 0, 0, 0 if counters == "of examples" else None)
    got = vmap(forward, in_dims)(x, mean, var, counter)
    examples = zip(x, twins, counts, strict=True)
    torch.testing.assert_close(got, torch.stack([forward(e, *s, n) for e, s, n in examples]))
    torch.testing.assert_close([mean[0], var[1]], [twins[0][0], twins[1][1]])
    if counter is not None:
        assert torch.equal(counter.expand(2), counts)
    with pytest.raises(RuntimeError, match="running_mean and running_var to be None, or training"):
        vmap(forward, (0, None, None, None))(x, mean[0], var[0], None)


def test_operator_in_forward_mode(kernels: Backend) -> None:
    x, residual, weight = small_tensors(kernels)
    settings = (True, False, True, 0.1, 1e-5)
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        dual = forward.make_dual(x, torch.randn_like(x))
        outputs = [
            operators.fused_forward(dual, weight, *(None,) * 4, residual, *settings)[0],
            batch_norm(dual, None, None, weight, None, True, residual=residual, activation="relu"),
        ]
        got, expected = (forward.unpack_dual(output).tangent for output in outputs)
    assert got is not None
    torch.testing.assert_close(got, expected)


def test_operators_twice_differentiated(kernels: Backend) -> None:
    """Of a recorded graph: the gradient's gradient, as the public function has it."""
    results = []
    x, residual, weight = (t.requires_grad_() for t in small_tensors(kernels))
    for direct in (True, False):
        if direct:
            output = batch_norm(
                x, None, None, weight, None, True, residual=residual, activation="relu"
            )
        else:
            settings = (residual, True, True, True, 0.1, 1e-5)
            output = operators.fused_forward(x, weight, *(None,) * 4, *settings)[0]
        first = torch.autograd.grad(output.pow(3).sum(), (x, residual, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, residual, weight))
        results.append([*first, *second])
    torch.testing.assert_close(*results)
