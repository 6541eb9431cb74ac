"""Gradients of gradients: against the reference and finite differences, and what is computed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import harness
import pytest
import torch
from cases import (
    CHANNELLESS_SHAPES,
    EMPTY_SHAPES,
    FEW_CASES,
    Case,
    Parameters,
    fill,
    fill_gradient,
    fill_parameters,
    odd_offset,
)
from conftest import Backend
from parametrisations import both_layouts, both_modes, every_case, every_dtype, few_cases
from torch import Tensor

from batchnorm_cuda import batch_norm
from batchnorm_cuda._ops import operators as ops

NAMES = ("grad_grad_output", "double_grad_input", "double_grad_weight")


def fill_grad_grads(x: Tensor, p: Parameters) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of grad_input, which correlates with x as dy does, grad_weight and grad_bias."""
    of_weight, of_bias = (
        None if t is None else torch.randn(t.shape).to(t) for t in (p.weight, p.bias)
    )
    return 0.5 - fill_gradient(x, x.dtype), of_weight, of_bias


def problem(case: Case, dtype: torch.dtype, device: str, **given: bool) -> tuple:
    x = fill(case, dtype, device)
    p = fill_parameters(case.channels, dtype, device, **given)
    return x, p, fill_gradient(x, dtype), fill_grad_grads(x, p)


def call_operator(
    problem: tuple, training: bool, needed: tuple[bool, bool, bool] = (True, True, True)
) -> tuple[Tensor | None, ...]:
    x, p, dy, grad_grads = problem
    statistics = (None, None) if training else (p.running_mean, p.running_var)
    args = (x, p.weight, p.bias, *statistics, None, training, 0.1, harness.EPS)
    _, save_mean, save_invstd = ops.forward(*args)
    return ops.double_backward(
        *grad_grads, dy, x, p.weight, save_mean, save_invstd, training, *needed
    )


def check(backend: Backend, case: Case, dtype: torch.dtype, training: bool, **given: bool) -> None:
    x, p, dy, grad_grads = problem(case, dtype, backend.device, **given)
    results = harness.double_backward(batch_norm, x, p, dy, grad_grads, training)
    expected = harness.reference_double_backward(grad_grads, dy, x, p, training)
    assert {grad.dtype for grad in results.values()} == {dtype}
    harness.assert_matches(results, expected, x)


@every_case
def test_matches_reference(kernels: Backend, case: Case) -> None:
    check(kernels, case, torch.float32, training=True)


@every_dtype
@both_modes
@few_cases
def test_every_dtype(kernels: Backend, case: Case, dtype: torch.dtype, training: bool) -> None:
    check(kernels, case, dtype, training)


@pytest.mark.parametrize("given", [{"weight": False}, {"bias": False}], ids=lambda g: f"{g}")
@both_modes
def test_absent_parameters(kernels: Backend, training: bool, given: dict[str, bool]) -> None:
    check(kernels, FEW_CASES[1], torch.bfloat16, training, **given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@both_modes
def test_float32_parameters(kernels: Backend, dtype: torch.dtype, training: bool) -> None:
    """Their gradients come, and go, in float32."""
    x = fill(FEW_CASES[2], dtype, kernels.device)
    p = fill_parameters(x.shape[1], torch.float32, kernels.device)
    dy, grad_grads = fill_gradient(x, dtype), fill_grad_grads(x, p)
    results = harness.double_backward(batch_norm, x, p, dy, grad_grads, training)
    assert [results[name].dtype for name in NAMES] == [dtype, dtype, torch.float32]
    expected = harness.reference_double_backward(grad_grads, dy, x, p, training)
    harness.assert_matches(results, expected, x)


@pytest.mark.parametrize("options", [{"splits": 3}, {"index_bits": 64}], ids=str)
@few_cases
def test_other_plans(kernels: Backend, plan_options: Callable, case: Case, options: dict) -> None:
    plan_options(options)
    check(kernels, case, torch.float16, training=True)


@pytest.mark.parametrize("misaligned", range(3), ids=["input", "grad_output", "grad_grad_input"])
@pytest.mark.parametrize("shape", [(3, 10, 8, 8), (40, 32)], ids=["along S", "along C"])
def test_each_tensor_may_be_misaligned(
    kernels: Backend, shape: tuple[int, ...], misaligned: int
) -> None:
    x, p, dy, (ggx, *rest) = problem(Case(shape, "whole windows"), torch.float16, kernels.device)
    tensors = [x, dy, ggx]
    tensors[misaligned] = odd_offset(tensors[misaligned])
    x, dy, ggx = tensors
    expected = harness.reference_double_backward((ggx, *rest), dy, x, p, True)
    results = dict(zip(NAMES, call_operator((x, p, dy, (ggx, *rest)), True), strict=True))
    harness.assert_matches(results, expected, x)


@pytest.mark.parametrize("present", list(product([False, True], repeat=3)), ids=str)
@both_modes
def test_absent_gradients_are_zero(
    kernels: Backend, training: bool, present: tuple[bool, ...]
) -> None:
    x, p, dy, grad_grads = problem(FEW_CASES[4], torch.float32, kernels.device)
    given = tuple(grad if there else None for grad, there in zip(grad_grads, present, strict=True))
    results = dict(zip(NAMES, call_operator((x, p, dy, given), training), strict=True))
    expected = harness.reference_double_backward(given, dy, x, p, training)
    harness.assert_matches(results, expected, x)


@pytest.mark.parametrize("needed", list(product([False, True], repeat=3)), ids=str)
@both_modes
@few_cases
def test_only_needed_results(
    kernels: Backend, case: Case, training: bool, needed: tuple[bool, bool, bool]
) -> None:
    """Each is the same, to the bit, whichever others are needed, and absent when it is not."""
    arguments = problem(case, torch.float32, kernels.device)
    everything = call_operator(arguments, training)
    some = call_operator(arguments, training, needed)
    for result, full, need in zip(some, everything, needed, strict=True):
        assert (result is not None) == need
        assert not need or torch.equal(result, full)


@both_modes
def test_grad_output_is_not_read_for_its_own_gradient(kernels: Backend, training: bool) -> None:
    """Not even its NaNs, and it may be absent: the tangent of the output is computed so."""
    x, p, dy, grad_grads = problem(FEW_CASES[1], torch.float32, kernels.device)
    needed = (True, False, False)
    with_nan = call_operator((x, p, torch.full_like(dy, torch.nan), grad_grads), training, needed)
    without = call_operator((x, p, None, grad_grads), training, needed)
    assert torch.equal(with_nan[0], without[0])
    assert torch.equal(without[0], call_operator((x, p, dy, grad_grads), training)[0])


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3))[1:], ids=str)
def test_autograd_asks_for_what_is_wanted(
    kernels: Backend, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = harness.asked(monkeypatch, ops.double_backward)
    x, p, dy, _ = problem(FEW_CASES[0], torch.float32, kernels.device)
    leaves = [dy, x, p.weight]
    for leaf, flag in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(flag)
    # A leaf of its own, so that there is a first gradient whatever is wanted of the second.
    first = x + torch.zeros(1, device=x.device, requires_grad=True)
    output = harness.call(batch_norm, first, p, True)
    (grad,) = torch.autograd.grad(output, first, dy, create_graph=True)
    used = [leaf for leaf, flag in zip(leaves, wanted, strict=True) if flag]
    assert len(torch.autograd.grad(grad.square().sum(), used)) == len(used)
    # x is reached through `first`, which requires a gradient in any case.
    assert asked == [(wanted[0], True, wanted[2])]


@both_modes
@both_layouts
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "none"])
def test_gradgradcheck(backend: Backend, layout: Callable, training: bool, affine: str) -> None:
    x = fill(Case((3, 2, 2, 3), "small", layout), torch.float64, backend.device).requires_grad_()
    p = fill_parameters(2, torch.float64, backend.device)
    affine_leaves = {
        name: getattr(p, name).requires_grad_() for name in ("weight", "bias") if name in affine
    }

    def function(x: Tensor, *affine: Tensor) -> Tensor:
        given = dict(zip(affine_leaves, affine, strict=True))
        mean, var = p.running_mean.clone(), p.running_var.clone()
        return batch_norm(x, mean, var, **given, training=training)

    assert torch.autograd.gradgradcheck(function, (x, *affine_leaves.values()))


def test_gradient_of_gradient_norm(backend: Backend) -> None:
    """As a gradient penalty uses it: second-order terms reach the parameters' .grad."""
    x, p, *_ = problem(FEW_CASES[2], torch.float64, backend.device)
    x.requires_grad_()
    weight = p.weight.requires_grad_()
    output = harness.call(batch_norm, x, p, True)
    (grad,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
    grad.norm().backward()

    leaf, scale = x.detach().requires_grad_(), weight.detach().requires_grad_()
    shape = (1, -1, 1, 1)
    centred = leaf - leaf.mean((0, 2, 3), keepdim=True)
    std = (centred.square().mean((0, 2, 3), keepdim=True) + harness.EPS).sqrt()
    output = centred / std * scale.view(shape) + p.bias.view(shape)
    (grad,) = torch.autograd.grad(output.pow(3).sum(), leaf, create_graph=True)
    grad.norm().backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weight.grad, scale.grad, rtol=1e-9, atol=1e-11)


@few_cases
def test_repeats_to_the_bit(kernels: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which blocks and threads run."""
    arguments = problem(case, torch.float32, kernels.device)
    results = []
    for seed in ("1", "5"):
        monkeypatch.setenv("BATCHNORM_CUDA_EMULATE_SEED", seed)
        results.append(call_operator(arguments, True))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_non_finite_values_stay_in_their_channel(kernels: Backend) -> None:
    x, p, dy, grad_grads = problem(FEW_CASES[4], torch.float32, kernels.device)
    clean = call_operator((x, p, dy, grad_grads), True)
    grad_grads[0][0, 1] = torch.inf
    dirty = call_operator((x, p, dy, grad_grads), True)
    for before, after in zip(clean, dirty, strict=True):
        channel = 0 if before.dim() == 1 else 1
        others = torch.tensor([0, *range(2, x.shape[1])], device=x.device)
        left = (t.index_select(channel, others) for t in (before, after))
        assert torch.equal(*left)
        assert not after.select(channel, 1).isfinite().all()


@pytest.mark.parametrize("shape", EMPTY_SHAPES + CHANNELLESS_SHAPES, ids=str)
@both_modes
def test_empty(backend: Backend, shape: tuple[int, ...], training: bool) -> None:
    x = torch.empty(shape, device=backend.device, requires_grad=True)
    p = fill_parameters(shape[1], x.dtype, backend.device)
    weight = p.weight.requires_grad_()
    output = harness.call(batch_norm, x, p, training)
    first = torch.autograd.grad(output.square().sum(), (x, weight), create_graph=True)
    grads = torch.autograd.grad(
        sum(grad.square().sum() for grad in first), (x, weight), materialize_grads=True
    )
    assert grads[0].shape == x.shape
    assert torch.equal(grads[1], torch.zeros_like(weight))


def test_third_derivatives_are_refused(kernels: Backend) -> None:
    """No third derivative is better than a wrong one."""
    x = fill(Case((3, 2, 4), "small"), torch.float64, kernels.device).requires_grad_()
    output = batch_norm(x, None, None, training=True)
    (first,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"third derivatives.* not available"):
        second.sum().backward()


def test_bias_changed_between_the_derivatives(backend: Backend) -> None:
    """The gradients do not depend on bias: updating it is allowed, as after the forward."""
    x, p, dy, _ = problem(FEW_CASES[0], torch.float32, backend.device)
    bias = p.bias.requires_grad_()
    output = harness.call(batch_norm, x.requires_grad_(), p, True)
    (grad,) = torch.autograd.grad(output, x, dy, create_graph=True)
    with torch.no_grad():
        bias.add_(1)
    grad.square().sum().backward()
    assert x.grad.isfinite().all()


def replaced(arguments: tuple, position: int, value: object) -> tuple:
    return (*arguments[:position], value, *arguments[position + 1 :])


@pytest.mark.parametrize(
    "position, make, error, message",
    [
        (0, lambda t: t[:, :2], ValueError, "grad_grad_input to have shape"),
        (0, lambda t: t.double(), TypeError, "grad_grad_input to have dtype torch.float32"),
        (1, lambda t: t[:2], ValueError, "grad_grad_weight to have shape"),
        (2, lambda t: t.half(), TypeError, "grad_grad_bias to have dtype"),
        (3, lambda t: t.double(), TypeError, "grad_output to have dtype torch.float32"),
        (3, lambda _: None, ValueError, "grad_output to be given"),
        (4, lambda t: t[0, :, 0], ValueError, "input to have at least 2 dimensions"),
        (5, lambda _: None, ValueError, "weight to be given"),
        (6, lambda t: t.half(), TypeError, "save_mean to have dtype torch.float32"),
        (7, lambda t: t[:2], ValueError, "save_invstd to have shape"),
    ],
)
def test_errors_name_the_argument(
    kernels: Backend, position: int, make: Callable, error: type, message: str
) -> None:
    x, p, dy, grad_grads = problem(Case((2, 3, 4), "small"), torch.float32, kernels.device)
    saved = (x.new_zeros(3), x.new_ones(3))
    arguments = (*grad_grads, dy, x, p.weight, *saved, True, True, True, True)
    wrong = replaced(arguments, position, make(arguments[position]))
    with pytest.raises(error, match=f"batch_norm: expected {message}"):
        ops.double_backward(*wrong)


@both_modes
@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (True, False, True)])
@both_layouts
def test_opcheck(kernels: Backend, layout: Callable, training: bool, needed: tuple) -> None:
    case = Case((2, 5, 4, 3), "small", layout)
    x, p, dy, grad_grads = problem(case, torch.bfloat16, kernels.device)
    saved = torch.zeros(5, device=x.device), torch.ones(5, device=x.device)
    torch.library.opcheck(
        torch.ops.batchnorm_cuda.double_backward.default,
        (*grad_grads, dy, x, p.weight, *saved, training, *needed),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_plan_reads_each_tensor_twice(extension) -> None:
    """Three reads for the sums, three more and two writes for the outputs."""
    shifts = {"grad_output_shift": 0, "grad_grad_input_shift": 0, "outputs": 2}
    size = (8, 64, 784, "float16")
    tensor = 8 * 64 * 784 * 2
    plan = extension.make_plan("double_backward_training", *size, {"l2_bytes": 0}, shifts)
    assert plan["predicted_bytes"] == (3 + 3 + 2) * tensor
    assert plan["compulsory_bytes"] == (3 + 2) * tensor
    assert plan["reread_bytes"] == 3 * tensor
    # Read forwards twice, the five tensors stay in the L2 cache all or not at all.
    for l2_bytes, expected in ((5 * tensor - 1, 8 * tensor), (5 * tensor, 5 * tensor)):
        other = extension.make_plan(
            "double_backward_training", *size, {"l2_bytes": l2_bytes}, shifts
        )
        assert other["predicted_bytes"] == expected
    assert (plan["strategy"], plan["launches"]) == ("two_pass", 3)
