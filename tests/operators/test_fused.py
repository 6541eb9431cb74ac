"""Batch norm fused with a residual and ReLU: values, gradients, errors, and what it keeps."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import fused
import harness
import pytest
import torch
from cases import (
    CHANNELLESS_SHAPES,
    EMPTY_SHAPES,
    LAYOUTS,
    Case,
    channels_last,
    contiguous,
    fill,
    fill_gradient,
    fill_parameters,
    odd_offset,
    spatial_slice,
)
from conftest import Backend
from fused import FORMS, every_form, extras
from parametrisations import both_layouts, both_modes, every_case, every_dtype, few_cases
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from batchnorm_cuda import batch_norm
from batchnorm_cuda._ops import layout
from batchnorm_cuda._ops import operators as ops
from batchnorm_cuda._ops.activations import parse

TIGHT = {"rtol": 1e-11, "atol": 1e-12}  # of float64


def assert_matches_reference(
    backend: Backend, case: Case, dtype: torch.dtype, training: bool, form: str
) -> None:
    x = fill(case, dtype, backend.device)
    residual = fill(case, dtype, backend.device) * 2
    dy = fill_gradient(x, dtype)
    p = fill_parameters(case.channels, dtype, backend.device)

    results = fused.run(fused.ours, x, p, training, form, residual, dy)

    torchs = fused.run(fused.torchs, x, p, training, form, residual, dy)
    forward = {k: v for k, v in results.items() if not k.startswith("grad_")}
    expected = fused.reference_forward(x, p, training, form, residual)
    harness.assert_matches(forward, expected, x, torchs)
    strides = layout.as_dense(x).stride()
    assert results["output"].stride() == results["grad_input"].stride() == strides

    g = fused.through_relu(dy, results["output"], form)
    if FORMS[form][0]:
        assert torch.equal(results["grad_residual"], g)
        if FORMS[form][1]:
            assert results["grad_residual"].stride() == strides
    backward = {k: results[k] for k in ("grad_input", "grad_weight", "grad_bias")}
    harness.assert_matches(backward, harness.reference_backward(g, x, p, training), x)


@every_dtype
@every_case
def test_every_shape(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    """One rounding of the sum, where torch makes two, and the gradients of batch norm for g."""
    assert_matches_reference(kernels, case, dtype, True, "residual and relu")


@every_dtype
@every_form
@both_modes
@few_cases
def test_every_form(
    backend: Backend, case: Case, training: bool, form: str, dtype: torch.dtype
) -> None:
    assert_matches_reference(backend, case, dtype, training, form)


@every_form
@both_modes
@both_layouts
def test_like_torchs_three_operators(backend: Backend, layout, training: bool, form: str) -> None:
    """In float64, where no value is near enough to zero for its sign to be a matter of rounding."""
    case = Case((4, 5, 6, 3), "small", layout)
    x, residual = (fill(case, torch.float64, backend.device) for _ in range(2))
    p = fill_parameters(5, torch.float64, backend.device)
    dy = torch.randn(x.shape, dtype=x.dtype).to(x)
    results = [fused.run(f, x, p, training, form, residual, dy) for f in (fused.ours, fused.torchs)]
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@few_cases
def test_float32_parameters(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    x, residual = (fill(case, dtype, backend.device) for _ in range(2))
    p = fill_parameters(case.channels, torch.float32, backend.device)
    dy = fill_gradient(x, dtype)
    results = fused.run(fused.ours, x, p, True, "residual and relu", residual, dy)
    g = fused.through_relu(dy, results["output"], "residual and relu")
    expected = harness.reference_backward(g, x, p, True)
    harness.assert_matches({k: results[k] for k in ("grad_weight", "grad_bias")}, expected, x)
    assert results["grad_weight"].dtype == results["grad_bias"].dtype == torch.float32


@every_form
@both_modes
@pytest.mark.parametrize("shape", [*EMPTY_SHAPES, *CHANNELLESS_SHAPES], ids=str)
def test_empty(backend: Backend, shape: tuple[int, ...], training: bool, form: str) -> None:
    x, residual, dy = (torch.zeros(shape).to(backend.device) for _ in range(3))
    p = fill_parameters(shape[1], torch.float32, backend.device)
    results = fused.run(fused.ours, x, p, training, form, residual, dy)
    assert results["output"].shape == results["grad_input"].shape == shape
    assert not results["grad_weight"].any() and not results["grad_bias"].any()
    if FORMS[form][0]:
        assert results["grad_residual"].shape == shape
    if training:
        assert torch.equal(results["running_mean"], p.running_mean)


def test_empty_of_one_dimension(backend: Backend) -> None:
    """The one shape of fewer than two dimensions that torch takes, and its residual's."""
    x = torch.zeros(0).to(backend.device)
    fused_output = batch_norm(x, None, None, training=True, residual=x, activation="relu")
    assert fused_output.shape == x.shape
    with pytest.raises(ValueError, match="expected residual to have shape"):
        batch_norm(x, None, None, training=True, residual=x.view(0, 1))


@every_form
def test_not_finite(backend: Backend, form: str) -> None:
    """ReLU keeps NaN, as torch's, and both infinities of the residual go where they belong.

    Gradients pass where the output is NaN, also where they are recorded.
    """
    x = torch.randn(3, 4, 5).to(backend.device)
    residual = torch.randn(3, 4, 5).to(backend.device)
    x[1, 2, 3] = torch.nan
    residual[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    p = fill_parameters(4, torch.float32, backend.device)
    results = []
    for function, recorded in ((fused.torchs, False), (fused.ours, False), (fused.ours, True)):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        output = function(leaves[0], p, False, **extras(form, leaves[1]))
        wanted = leaves if FORMS[form][0] else leaves[:1]
        dy = torch.arange(1.0, 61).view(3, 4, 5).to(backend.device)
        grads = torch.autograd.grad(output, wanted, dy, create_graph=recorded)
        results.append([output.detach(), *(g.detach() for g in grads)])
    expected, *ours = results
    assert expected[0][1, 2, 3].isnan() and expected[1][1, 2, 3] != 0
    for got in ours:
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_mask_of_a_rank_that_is_not_finite(backend: Backend) -> None:
    """The same bits by the parts of synchronised batch norm."""
    x = torch.randn(3, 4, 5).to(backend.device)
    residual = torch.full_like(x, -10)
    residual[0, 0, 1] = torch.nan
    rows = ops.sync_statistics(x).unsqueeze(0)
    arguments = (x, None, None, None, None, None, rows, residual, True, True, 0.1, 1e-5)
    *_, mask = ops.sync_fused_forward(*arguments)
    assert mask.tolist() == [2, *[0] * 14]


# --- derivatives --------------------------------------------------------------------------------


def small(backend: Backend, layout=contiguous) -> list[Tensor]:
    """x, residual, weight, bias in float64."""
    case = Case((3, 2, 2, 3), "small", layout)
    p = fill_parameters(2, torch.float64, backend.device)
    tensors = [fill(case, torch.float64, backend.device) for _ in range(2)]
    return [t.requires_grad_() for t in (*tensors, p.weight, p.bias)]


def function(form: str, training: bool):
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        running = (None, None) if training else torch.full((2, 2), 0.7).to(weight)
        return batch_norm(x, *running, weight, bias, training, **extras(form, residual))

    return call


def inputs_of(form: str, tensors: list[Tensor]) -> list[Tensor]:
    if not FORMS[form][0]:
        tensors[1].requires_grad_(False)
    return tensors


@every_form
@both_modes
@both_layouts
def test_gradcheck(backend: Backend, layout, training: bool, form: str) -> None:
    """First and second derivatives, in reverse and in forward mode, one by one and batched."""
    tensors = inputs_of(form, small(backend, layout))
    call = function(form, training)
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(call, tensors, **modes)
    assert torch.autograd.gradgradcheck(call, tensors, check_batched_grad=True)


@every_form
def test_gradients_in_both_ways_agree(kernels: Backend, form: str) -> None:
    """A backward that is recorded, and so goes in parts, gives what the fused kernels give."""
    tensors = inputs_of(form, small(kernels))
    wanted = [t for t in tensors if t.requires_grad]
    output = function(form, True)(*tensors)
    dy = torch.randn(output.shape, dtype=output.dtype).to(output)
    grads = [
        torch.autograd.grad(output, wanted, dy, create_graph=recorded, retain_graph=True)
        for recorded in (False, True)
    ]
    torch.testing.assert_close(*grads, **TIGHT)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1), (1, 2, 3), (0, 2, 3)], ids=str)
@every_form
def test_any_subset_of_gradients(backend: Backend, form: str, wanted: tuple[int, ...]) -> None:
    tensors = inputs_of(form, small(backend))
    everything = [t for t in tensors if t.requires_grad]
    call = function(form, True)
    expected = dict(
        zip(map(id, everything), torch.autograd.grad(call(*tensors).sum(), everything), strict=True)
    )
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index in wanted and id(tensor) in expected)
    asked = [t for t in tensors if t.requires_grad]
    output = call(*tensors)
    assert output.requires_grad == bool(asked)
    if asked:
        for tensor, got in zip(asked, torch.autograd.grad(output.sum(), asked), strict=True):
            torch.testing.assert_close(got, expected[id(tensor)], **TIGHT)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_residual_is_input(backend: Backend, activation: str | None) -> None:
    """Both ways add up to one gradient."""
    x, _, weight, bias = small(backend)
    dy = torch.randn(x.shape, dtype=x.dtype).to(x)
    results = []
    for residual in (x, x.detach().clone().requires_grad_()):
        output = batch_norm(
            x, None, None, weight, bias, True, residual=residual, activation=activation
        )
        leaves = (x,) if residual is x else (x, residual)
        results.append([output.detach(), sum(torch.autograd.grad(output, leaves, dy))])
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.parametrize("of_residual", [*LAYOUTS, odd_offset], ids=lambda f: f.__name__)
@pytest.mark.parametrize("of_input", [contiguous, channels_last, spatial_slice, odd_offset])
@both_modes
def test_residual_of_other_strides(backend: Backend, of_input, of_residual, training: bool) -> None:
    """Strides change no value; output and gradients have those of the input made dense."""
    case = Case((2, 5, 4, 6), "small", of_input)
    x, dy = (fill(case, torch.float32, backend.device) for _ in range(2))
    residual = of_residual(torch.randn(case.shape).to(x))
    p = fill_parameters(5, torch.float32, backend.device)
    results = [
        fused.run(fused.ours, x, p, training, "residual and relu", r, dy)
        for r in (residual, residual.clone(memory_format=torch.contiguous_format))
    ]
    for name, got in results[0].items():
        assert torch.equal(got, results[1][name]), name
    assert results[0]["output"].stride() == layout.as_dense(x).stride()


@pytest.mark.parametrize("shape", [(4, 10, 6, 6), (33, 10), (2, 32, 49)], ids=str)
def test_two_runs_agree_to_the_bit(kernels: Backend, shape: tuple[int, ...]) -> None:
    x, residual, dy = (torch.randn(shape).to(kernels.device) for _ in range(3))
    p = fill_parameters(shape[1], torch.float32, kernels.device)
    first, second = (
        fused.run(fused.ours, x, p, True, "residual and relu", residual, dy) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# --- the mask -----------------------------------------------------------------------------------


def expected_bits(output: Tensor) -> list[int]:
    """The bytes of the mask, by its definition; the bits past the last element are zero."""
    window = 16 // output.dtype.itemsize
    positive = (output.as_strided((output.numel(),), (1,)) > 0).tolist()
    windows = [positive[first : first + window] for first in range(0, len(positive), window)]
    return [sum(bit << place for place, bit in enumerate(bits)) for bits in windows]


@every_dtype
@every_case
def test_mask_of_the_kernels(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    """A bit an element, in the memory order of the output."""
    x, residual = (fill(case, dtype, kernels.device) for _ in range(2))
    output, _, _, mask = ops.fused_forward(
        x, None, None, None, None, None, residual, True, True, True, 0.1, 1e-5
    )
    window = 16 // dtype.itemsize
    assert mask.dtype == torch.uint8 and mask.dim() == 1
    size = -(-x.numel() // window)
    assert len(mask) == size
    assert mask.tolist() == expected_bits(output)


def allocations(call: Callable[[], object]) -> int:
    """The tensors that a call asks for by size, as a mask is; those like another do not count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name == "aten::empty" for event in profile.events())


@both_modes
def test_inference_writes_no_mask(kernels: Backend, training: bool) -> None:
    tensors = small(kernels)
    detached = tuple(tensor.detach() for tensor in tensors)
    results = []

    def masks(tensors: tuple[Tensor, ...]) -> int:
        by_form = {form: partial(function(form, training), *tensors) for form in FORMS}
        results.append(by_form["residual and relu"]())
        return allocations(by_form["residual and relu"]) - allocations(by_form["residual"])

    with torch.no_grad():
        assert masks(tensors) == 0
    with torch.inference_mode():
        assert masks(tensors) == 0
    assert masks(detached) == 0
    assert masks(tensors) == 1
    for result in results:
        assert torch.equal(result, results[0])


def test_residual_alone_needs_no_mask(kernels: Backend) -> None:
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function("residual", True)(*small(kernels)).sum().backward()
    assert saved and not any(tensor.dtype == torch.uint8 for tensor in saved)


@every_dtype
def test_one_bit_an_element_is_kept(kernels: Backend, dtype: torch.dtype) -> None:
    """Neither output nor residual: what is saved besides the plain batch norm's is the mask."""
    x, residual = (torch.randn(4, 8, 16, 16).to(kernels.device, dtype) for _ in range(2))
    sizes = []
    for keywords in ({}, {"residual": residual, "activation": "relu"}):
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            batch_norm(x.requires_grad_(), None, None, training=True, **keywords)
        sizes.append(sum(t.nbytes for t in saved))
    assert sizes[1] - sizes[0] == x.numel() * dtype.itemsize // 16


def test_residual_may_be_updated(backend: Backend) -> None:
    """Between forward and backward, in place: it takes no part in the backward."""
    x, residual, weight, bias = small(backend)
    output = function("residual and relu", True)(x, residual, weight, bias)
    with torch.no_grad():
        residual.zero_()
        bias.zero_()
    output.sum().backward()


# --- errors -------------------------------------------------------------------------------------

N, C, L = 4, 8, 3


def tensor(*shape: int, **settings: object):
    return lambda device: torch.zeros(shape, **{"device": device, **settings})


REFUSED = [
    (tensor(N, C, 1), ValueError, "to have shape [4, 8, 3], got [4, 8, 1]"),
    (tensor(1, C, L), ValueError, "to have shape [4, 8, 3], got [1, 8, 3]"),
    (tensor(C), ValueError, "to have shape [4, 8, 3], got [8]"),
    (tensor(), ValueError, "to have shape [4, 8, 3], got []"),
    (tensor(N, C, L, 1), ValueError, "to have shape [4, 8, 3], got [4, 8, 3, 1]"),
    (
        tensor(N, C, L, dtype=torch.float64),
        TypeError,
        "to have dtype torch.float32, the dtype of input, got torch.float64",
    ),
    (
        tensor(N, C, L, dtype=torch.float16),
        TypeError,
        "to have dtype torch.float32, the dtype of input, got torch.float16",
    ),
    (
        tensor(N, C, L, device="meta"),
        RuntimeError,
        "to be on {device}, the device of input, got meta",
    ),
    (
        lambda device: torch.zeros(N, C, L, device=device).to_sparse(),
        TypeError,
        "to be a strided tensor, got torch.sparse_coo",
    ),
    (lambda device: [1.0], TypeError, "to be a torch.Tensor or None, got list"),
]


def assert_refused(backend: Backend, error: type, message: str, **keywords: object) -> None:
    x = torch.randn(N, C, L).to(backend.device)
    p = fill_parameters(C, torch.float32, backend.device)
    before = {name: (t.clone(), t._version) for name, t in vars(p).items()}
    with pytest.raises(error) as raised:
        fused.ours(x, p, True, **keywords)
    assert type(raised.value) is error
    assert str(raised.value) == f"batch_norm: expected {message}"
    for name, value in vars(p).items():
        assert value._version == before[name][1], name
        assert torch.equal(value, before[name][0]), name


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_refused_residual(
    backend: Backend, make, error: type, message: str, activation: str | None, grad: bool
) -> None:
    residual = make(backend.device)
    device = torch.empty(0, device=backend.device).device
    message = "residual " + message.replace("{device}", str(device))
    with torch.set_grad_enabled(grad):
        assert_refused(backend, error, message, residual=residual, activation=activation)


@pytest.mark.parametrize(
    "activation", ["gelu", "ReLU", True, torch.relu], ids=["gelu", "ReLU", "bool", "function"]
)
def test_refused_activation(backend: Backend, activation: object) -> None:
    """Before anything is written; the words are those of test_activations.py."""
    with pytest.raises(ValueError, match=", got ") as raised:
        parse(activation)
    message = str(raised.value).removeprefix("batch_norm: expected ")
    assert_refused(backend, ValueError, message, activation=activation)


BAD_BACKWARD = {
    "size": (
        {"mask": torch.zeros(8, dtype=torch.uint8)},
        ValueError,
        "mask to have shape [24], got [8]",
    ),
    "dtype": ({"mask": torch.zeros(24)}, TypeError, "mask to have dtype torch.uint8, got torch."),
    "gradient": ({"grad_output": torch.zeros(N, C)}, ValueError, "grad_output to have shape"),
}


@pytest.mark.parametrize("bad", BAD_BACKWARD)
def test_bad_argument_of_backward(kernels: Backend, bad: str) -> None:
    changes, error, message = BAD_BACKWARD[bad]
    x = torch.randn(N, C, L).to(kernels.device)
    vector = torch.ones(C).to(kernels.device)
    arguments = {"grad_output": x, "input": x, "weight": vector, "bias": vector}
    arguments |= {"save_mean": vector, "save_invstd": vector}
    arguments["mask"] = torch.zeros(24, dtype=torch.uint8).to(kernels.device)
    arguments |= {name: value.to(kernels.device) for name, value in changes.items()}
    needed = dict.fromkeys(("need_input", "need_weight", "need_bias", "need_residual"), True)
    with pytest.raises(error, match=re.escape(f"batch_norm: expected {message}")):
        ops.fused_backward(**arguments, **needed, training=True)
