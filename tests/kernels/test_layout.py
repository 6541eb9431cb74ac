"""Memory: strides of results, no copies of dense tensors, nothing written that is not ours."""

from __future__ import annotations

from collections.abc import Callable

import cases
import harness
import pytest
import torch
import torch.nn.functional as F
from cases import DENSE, NOT_DENSE, Case, fill, fill_gradient, fill_parameters
from conftest import Backend
from parametrisations import both_layouts, both_modes
from torch import Tensor

from batchnorm_cuda import batch_norm

SHAPES = [(2, 5, 4, 3), (2, 5, 2, 4, 3)]

both_ranks = pytest.mark.parametrize("shape", SHAPES, ids=["4d", "5d"])


def name_of(function: Callable) -> str:
    return function.__name__


def results(x: Tensor, dy: Tensor, training: bool = True) -> dict[str, Tensor]:
    parameters = fill_parameters(x.shape[1], x.dtype, x.device)
    output = harness.call(batch_norm, x.detach(), parameters.clone(), training)
    return {"output": output} | harness.backward(batch_norm, x, parameters, dy, training)


@both_ranks
@both_modes
@pytest.mark.parametrize("layout", DENSE, ids=name_of)
def test_dense_strides_are_kept(
    backend: Backend, layout: Callable, shape: tuple[int, ...], training: bool
) -> None:
    x = fill(Case(shape, "small", layout), torch.float32, backend.device)
    got = results(x, fill_gradient(x, x.dtype), training)
    assert got["output"].stride() == x.stride()
    assert got["grad_input"].stride() == x.stride()


@both_ranks
@both_modes
@pytest.mark.parametrize("layout", NOT_DENSE, ids=name_of)
def test_other_strides_become_the_suggested_format(
    backend: Backend, layout: Callable, shape: tuple[int, ...], training: bool
) -> None:
    """As torch's own: channels last where the strides look like it, else contiguous."""
    x = fill(Case(shape, "small", layout), torch.float32, backend.device)
    dy = fill_gradient(x, x.dtype)
    got = results(x, dy, training)
    torchs = harness.call(F.batch_norm, x, fill_parameters(5, x.dtype, x.device), training)
    assert got["output"].stride() == torchs.stride()
    assert got["grad_input"].stride() == torchs.stride()


@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (2, 1, 4, 3), (1, 5, 1, 3), (1, 1, 1, 7)], ids=str)
@both_layouts
def test_ambiguous_strides(backend: Backend, layout: Callable, shape: tuple[int, ...]) -> None:
    """Dimensions of size 1 fit both formats; what is kept are the strides themselves."""
    x = fill(Case(shape, "small", layout), torch.float32, backend.device)
    dy = torch.randn(shape).to(x.device)
    got = results(x, dy, shape[0] * shape[2] * shape[3] > 1)
    assert got["output"].is_contiguous() == x.is_contiguous()
    channels_last_format = {"memory_format": torch.channels_last}
    for result in (got["output"], got["grad_input"]):
        assert result.is_contiguous(**channels_last_format) == x.is_contiguous(
            **channels_last_format
        )


def test_stride_of_a_single_sample_says_nothing(backend: Backend) -> None:
    """One sample cut out of every second is dense, whatever the distance to the next."""
    x = cases.transposed(torch.randn(4, 5, 3).to(backend.device))[::2][:1]
    assert x.stride() == (30, 1, 5)
    got = results(x, torch.randn(x.shape).to(x.device))
    assert got["output"].stride()[1:] == got["grad_input"].stride()[1:] == (1, 5)


@pytest.mark.parametrize(
    "layout", [cases.contiguous, cases.channels_last, cases.transposed], ids=name_of
)
@pytest.mark.parametrize("gradient_layout", DENSE + NOT_DENSE, ids=name_of)
def test_gradient_of_another_layout(
    backend: Backend, layout: Callable, gradient_layout: Callable
) -> None:
    """Only the values of grad_output count; grad_input keeps the strides of the input."""
    x = fill(Case((2, 5, 4, 3), "small", layout), torch.float32, backend.device)
    dy = gradient_layout(torch.randn(x.shape).to(x.device))
    same = torch.empty_like(x).copy_(dy)
    torch.manual_seed(1)
    got = results(x, dy)
    torch.manual_seed(1)
    expected = results(x, same)
    assert got["grad_input"].stride() == x.stride()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=4e-6)


@pytest.mark.parametrize("layout", DENSE + NOT_DENSE, ids=name_of)
def test_inputs_are_not_written(backend: Backend, layout: Callable) -> None:
    x = fill(Case((2, 5, 4, 3), "small", layout), torch.float16, backend.device)
    dy = layout(torch.randn(x.shape).to(x))
    before = x.clone(), dy.clone()
    results(x, dy)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])


@both_modes
def test_negative_view(backend: Backend, training: bool) -> None:
    """The imaginary part of a lazy conjugate carries its sign as a flag, not in memory."""
    x = torch.randn(4, 3, 5, dtype=torch.complex64).to(backend.device).conj().imag
    assert x.is_neg()
    parameters = fill_parameters(3, torch.float32, x.device)
    expected = harness.reference_forward(x.clone(), parameters, training)
    harness.assert_matches(harness.forward(backend, x, parameters, training), expected, x)


def copies(run: Callable[[], object]) -> list[str]:
    """The copying operators that ran, by name."""
    run()  # what happens once only, does so here
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return [event.name for event in profile.events() if event.name in COPYING]


COPYING = {"aten::copy_", "aten::clone", "aten::_to_copy", "aten::contiguous"}


@both_modes
@pytest.mark.parametrize("layout", [*DENSE[:4], cases.permuted], ids=name_of)
def test_dense_tensors_are_not_copied(kernels: Backend, layout: Callable, training: bool) -> None:
    x = fill(Case((2, 8, 4, 4), "small", layout), torch.float32, kernels.device)
    dy = torch.empty_like(x).normal_()
    parameters = fill_parameters(8, x.dtype, kernels.device)
    leaf = x.detach().requires_grad_()
    weight = parameters.weight.requires_grad_()

    def run() -> None:
        output = harness.call(batch_norm, leaf, parameters, training)
        torch.autograd.grad(output, [leaf, weight], dy)

    assert copies(run) == []


def test_other_tensors_are_copied_once(kernels: Backend) -> None:
    """The counter-check: a sliced input is copied by the forward and by the backward."""
    x = fill(Case((2, 8, 4, 4), "small", cases.spatial_slice), torch.float32, kernels.device)
    parameters = fill_parameters(8, x.dtype, kernels.device)
    with torch.no_grad():
        forward = copies(lambda: harness.call(batch_norm, x, parameters, True))
    assert forward.count("aten::copy_") == 1


@pytest.mark.gpu
@both_modes
def test_memory_allocated(kernels: Backend, training: bool) -> None:
    """An output and little more: 1 MiB is more than statistics and partial sums take."""
    x = torch.randn(32, 16, 64, 64, device=kernels.device)
    parameters = fill_parameters(16, x.dtype, kernels.device)
    harness.call(batch_norm, x, parameters, training)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = harness.call(batch_norm, x, parameters, training)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= output.numel() * output.element_size() + 2**20
