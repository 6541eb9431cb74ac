"""Inputs on which careless arithmetic fails, through every strategy of the kernels.

The shapes are large enough for a channel to be shared by the three blocks of a forced team.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import harness
import pytest
import torch
import torch.nn.functional as F
from cases import Parameters, channels_last, contiguous, fill_gradient
from conftest import ATEN, KERNELS, Backend
from strategies import FORCED, force, planned
from torch import Tensor

from batchnorm_cuda import batch_norm


def fewer(shape: tuple[int, ...], layout: Callable) -> tuple[int, ...]:
    """A batch of four in channels last: one block must hold all channels, along S just one."""
    return (min(shape[0], 4), *shape[1:]) if layout is channels_last else shape


both_layouts = pytest.mark.parametrize(
    "layout", [contiguous, channels_last], ids=lambda layout: layout.__name__
)
NO_PARAMETERS = Parameters(None, None, None, None)
# The composite, the kernels as the planner chooses, and each strategy forced.
WAYS = ["aten", "planned", *FORCED]


@pytest.fixture(params=WAYS)
def backend(
    request: pytest.FixtureRequest,
    extension: ModuleType,
    plan_options: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> Backend:
    """Each of WAYS in turn; a forced strategy that does not run is an error."""
    if request.param == "aten":
        monkeypatch.delenv("BATCHNORM_CUDA_EMULATE", raising=False)
        return ATEN
    if request.param in FORCED:
        force(request.param, extension, plan_options, monkeypatch)
    return KERNELS


def check_training(backend: Backend, x: Tensor) -> dict[str, Tensor]:
    """Forward and backward of x against the reference, without parameters."""
    forward = harness.forward(backend, x, NO_PARAMETERS, True)
    dy = fill_gradient(x, x.dtype)
    backward = harness.backward(batch_norm, x, NO_PARAMETERS, dy, True)
    torchs = harness.torch_forward(x, NO_PARAMETERS, True)
    torchs |= harness.backward(F.batch_norm, x, NO_PARAMETERS, dy, True)
    harness.assert_matches(forward, harness.reference_forward(x, NO_PARAMETERS, True), x, torchs)
    expected = harness.reference_backward(dy, x, NO_PARAMETERS, True)
    harness.assert_matches(backward, expected, x, torchs)
    return forward


@pytest.mark.parametrize("offset", [1e4, -3e5], ids=str)
@both_layouts
def test_mean_far_above_deviation(backend: Backend, layout, offset: float) -> None:
    """E[x^2] - E[x]^2 would lose every digit: float32 holds 7, the mean takes 4 to 5.5 of them.

    The bounds grow with mean/std (reference.py), as they must: float32 cannot hold the mean better.
    The variance does not depend on it, and is held to a bound that does not either.
    """
    x = layout(torch.randn(fewer((10, 6, 15, 17), layout)) + offset).to(backend.device)
    forward = check_training(backend, x)
    if backend.has_kernels:
        var = x.double().var((0, 2, 3), correction=0)
        got = forward["save_invstd"].double().pow(-2) - harness.EPS
        torch.testing.assert_close(got, var, rtol=1e-5, atol=0)


@both_layouts
def test_large_mean_that_is_exact(backend: Backend, layout) -> None:
    """Whole numbers around 2^12, in pairs: float32 holds the mean, the sums and x - mean exactly.

    What is left are the 5 roundings after the subtraction. y = scale * x + (bias - mean * scale)
    would be off by 2^12 times as much.
    """
    half = torch.randint(1, 8, (8, 3, 16, 16)).float()
    x = layout(torch.cat([half, -half]) + 2.0**12).to(backend.device)
    output = batch_norm(x, None, None, training=True)
    expected = harness.reference_forward(x, NO_PARAMETERS, True).output
    torch.testing.assert_close(output.cpu().double(), expected, rtol=5 * 2.0**-24, atol=0)


@both_layouts
def test_running_variance_of_large_mean(backend: Backend, layout) -> None:
    x = layout(torch.randn(fewer((10, 6, 15, 17), layout)) + 1e4).to(backend.device)
    mean, var = torch.zeros(6, device=x.device), torch.ones(6, device=x.device)
    batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=2e-7, atol=0)


@both_layouts
def test_one_outlier_as_first_element(backend: Backend, layout) -> None:
    """A shift taken from one element would be a bad one here."""
    x = torch.randn(fewer((10, 6, 15, 17), layout))
    x[0, :, 0, 0] = 1e4
    check_training(backend, layout(x).to(backend.device))


def test_outlier_alone_in_the_first_window(backend: Backend) -> None:
    """Its window ends after one value, so that a thread's first batch may be the outlier alone.

    A mean taken relative to that batch's would round at the outlier's size at every merge, and be
    off by a roundoff of it. Relative to the mean so far, each merge of equal halves halves what a
    rounding weighs: over 256 threads next to nothing is left. An eighth is allowed.
    """
    # 483 = 4 * 120 + 3: channel 1 begins in a window's last lane. Of its 732 windows, a thread of
    # three blocks has one.
    x = torch.randn(6, 4, 21, 23)
    x[0, :, 0, 0] = 1e4
    x = x.to(backend.device)
    mean, var = torch.zeros(4, device=x.device), torch.ones(4, device=x.device)
    batch_norm(x, mean, var, training=True, momentum=1.0)
    atol = 1e4 * 2.0**-24 / 8
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=0, atol=atol)


@both_layouts
@pytest.mark.parametrize("value", [0.0, 3.0, 1e4, -1e-3], ids=str)
def test_constant_channel(backend: Backend, layout, value: float) -> None:
    """Variance 0: the output is the bias, up to the rounding of the mean, and stays finite.

    The mean of equal values is off by at most a few roundoffs of it; divided by sqrt(eps).
    """
    x = layout(torch.full((8, 3, 16, 17), value)).to(backend.device).requires_grad_()
    bias = torch.tensor([1.0, -2.0, 0.0], device=backend.device)
    output = batch_norm(x, None, None, None, bias, training=True)
    off_by = 4 * 2.0**-24 * abs(value) / 1e-5**0.5
    expected = bias.view(1, 3, 1, 1).expand_as(output)
    torch.testing.assert_close(output, expected, rtol=2.0**-23, atol=off_by)
    output.sum().backward()
    assert bool(x.grad.isfinite().all())


@both_layouts
@pytest.mark.parametrize("value", [1e7, -3e9, 2.0**100], ids=str)
def test_constant_channel_of_large_values(backend: Backend, layout, value: float) -> None:
    """Nothing is left of the difference from the mean: the output is the bias."""
    x = layout(torch.full((8, 3, 16, 17), value)).to(backend.device)
    bias = torch.tensor([1.0, -2.0, 0.0], device=backend.device)
    output = batch_norm(x, None, None, None, bias, training=True)
    assert torch.equal(output, bias.view(1, 3, 1, 1).expand_as(output))


def test_half_sums_beyond_halfs_range(backend: Backend) -> None:
    """Each value fits float16, their sum and the sum of squares do not (largest: 65504)."""
    x = (torch.randn(16, 3, 20, 20) * 300 + 2000).half().to(backend.device)
    check_training(backend, x)


def test_half_gradient_sums_beyond_halfs_range(backend: Backend) -> None:
    """The gradient sums to 640000: exact for a float32 parameter, infinite for a float16 one."""
    x = torch.randn(16, 2, 20, 20).half().to(backend.device)
    dy = torch.full_like(x, 100.0)
    for dtype, expected in ((torch.float32, 640000.0), (torch.float16, float("inf"))):
        bias = torch.zeros(2, dtype=dtype, device=x.device, requires_grad=True)
        batch_norm(x, None, None, None, bias, training=True).backward(dy)
        assert bias.grad.tolist() == [expected, expected]


@both_layouts
def test_bfloat16_keeps_small_terms(backend: Backend, layout) -> None:
    """Sums over 3000 values near 1: bfloat16 accumulation would stop at 256."""
    x = layout(torch.rand(30, 2, 10, 10) * 0.1 + 1).bfloat16().to(backend.device)
    check_training(backend, x)


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")], ids=str)
@both_layouts
@pytest.mark.parametrize("shape", [(8, 5, 16, 17), (3, 32, 5, 7)], ids=str)
def test_non_finite_channel_stays_alone(
    backend: Backend, layout, poison: float, shape: tuple[int, ...]
) -> None:
    """One inf or NaN spoils its own channel and changes no bit of any other."""
    x = torch.randn(fewer(shape, layout))
    poisoned = x.clone()
    poisoned[1, 2, 3, 4] = poison
    dy = layout(torch.randn(x.shape)).to(backend.device)
    clean = run_all(layout(x).to(backend.device), dy)
    spoilt = run_all(layout(poisoned).to(backend.device), dy)
    others = [c for c in range(shape[1]) if c != 2]
    for name, value in clean.items():
        per_channel = value.transpose(0, 1) if value.dim() > 1 else value
        other = spoilt[name].transpose(0, 1) if value.dim() > 1 else spoilt[name]
        assert torch.equal(per_channel[others], other[others]), name
    assert bool(spoilt["output"][:, 2].isnan().all())
    assert bool(spoilt["grad_input"][:, 2].isnan().all())
    assert not bool(spoilt["running_var"][2].isfinite())


def run_all(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    c = x.shape[1]
    names = ["running_mean", "running_var", "weight", "bias"]
    mean, var, weight, bias = (torch.full((c,), 0.5, device=x.device) for _ in names)
    x, weight, bias = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    output = batch_norm(x, mean, var, weight, bias, training=True)
    output.backward(dy)
    return {
        "output": output.detach(),
        "grad_input": x.grad,
        "grad_weight": weight.grad,
        "grad_bias": bias.grad,
        "running_mean": mean,
        "running_var": var,
    }


def test_non_finite_gradient_stays_in_its_channel(backend: Backend) -> None:
    x = torch.randn(8, 5, 16, 17).to(backend.device)
    dy = torch.randn(8, 5, 16, 17).to(backend.device)
    poisoned = dy.clone()
    poisoned[1, 2, 3, 4] = float("inf")
    clean, spoilt = run_all(x, dy), run_all(x.detach(), poisoned)
    others = [0, 1, 3, 4]
    for name in ("grad_weight", "grad_bias"):
        assert torch.equal(clean[name][others], spoilt[name][others])
        assert not bool(spoilt[name][2].isfinite())
    assert torch.equal(clean["grad_input"][:, others], spoilt["grad_input"][:, others])


def test_eps_zero(backend: Backend) -> None:
    """Allowed: exact normalisation where the channel varies, NaN where it does not, as 0/0 is."""
    x = torch.randn(20, 3, 60, dtype=torch.float64).to(backend.device)
    x[:, 1] = 2.0
    output = batch_norm(x, None, None, training=True, eps=0.0)
    rows = output[:, [0, 2]].transpose(0, 1).flatten(1)
    one = torch.ones(2, dtype=torch.float64, device=x.device)
    torch.testing.assert_close(rows.pow(2).mean(1), one, rtol=1e-14, atol=0)
    assert bool(output[:, 1].isnan().all())
    mean, var = torch.zeros(3, device=x.device), torch.full((3,), 4.0, device=x.device)
    torch.testing.assert_close(batch_norm(x, mean, var, eps=0.0), x / 2, rtol=0, atol=0)


def test_large_eps(backend: Backend) -> None:
    """eps inside the root, not added to the deviation."""
    x = torch.tensor([[-1.0], [1.0]], device=backend.device).repeat(1200, 1)
    output = batch_norm(x, None, None, training=True, eps=3.0)
    assert output.flatten().tolist() == [-0.5, 0.5] * 1200


def test_tiny_values(backend: Backend) -> None:
    """Deviations of 1e-20: the squares underflow float32, eps decides, nothing becomes NaN."""
    x = (torch.randn(40, 3, 60) * 1e-20).to(backend.device)
    output = batch_norm(x, None, None, training=True)
    assert bool(output.isfinite().all())
    assert output.abs().max().item() <= 1e-15


@both_layouts
def test_large_count(backend: Backend, layout) -> None:
    """150 000 values in a channel: plain summation in order would be off by 1e-4 relative."""
    x = layout(torch.rand(1, 1, 300, 500) + 10).to(backend.device)
    mean, var = torch.zeros(1, device=x.device), torch.ones(1, device=x.device)
    batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean.double(), x.double().mean().view(1), rtol=2.0**-22, atol=0)
    torch.testing.assert_close(var.double(), x.double().var().view(1), rtol=2.0**-19, atol=0)


@pytest.mark.parametrize(
    ("count", "backend"),
    [(count, way) for way in WAYS for count in (2, 3) if (count, way) != (2, "grid")],
    indirect=["backend"],
)
def test_smallest_counts(backend: Backend, count: int) -> None:
    """count/(count - 1) is 2 and 1.5; the running variance is the unbiased one.

    Three blocks cannot share two rows: the test below.
    """
    x = torch.randn(count, 40).to(backend.device)
    mean, var = torch.zeros(40, device=x.device), torch.zeros(40, device=x.device)
    batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(var.double(), x.double().var(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "impossible"), [((2, 40), ["grid"]), ((4, 3, 6), ["grid", "cluster"])], ids=str
)
def test_the_plan_says_where_no_team_is_possible(
    kernels: Backend, shape: tuple[int, ...], impossible: list[str]
) -> None:
    """Forcing a team there is answered by two passes, which no test above may take for a team."""
    x = torch.randn(shape, device=kernels.device)
    for name in impossible:
        for op in ("forward", "backward"):
            assert planned(x, op, name) == "two_pass"
