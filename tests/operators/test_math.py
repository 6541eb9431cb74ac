"""The formulas: against autograd of the definition, and two well-known wrong ones shown wrong.

docs/math.md derives what is checked here.
"""

from __future__ import annotations

import harness
import pytest
import torch
from cases import Case, fill, fill_parameters
from conftest import Backend
from parametrisations import both_layouts, both_modes
from torch import Tensor

from batchnorm_cuda import batch_norm


@both_modes
@both_layouts
def test_gradcheck(backend: Backend, layout, training: bool) -> None:
    """All three gradients against finite differences, in float64."""
    x = fill(Case((3, 2, 2, 3), "small", layout), torch.float64, backend.device).requires_grad_()
    p = fill_parameters(2, torch.float64, backend.device)
    mean, var = p.running_mean, p.running_var

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    assert torch.autograd.gradcheck(
        function, (x, p.weight.requires_grad_(), p.bias.requires_grad_())
    )


class Channel:
    """One channel in float64, its gradient by autograd of the definition, and the pieces."""

    def __init__(self) -> None:
        count, eps = 11, 1e-3
        self.count = count
        self.x = (torch.randn(count, dtype=torch.float64) * 2 + 0.5).requires_grad_()
        self.weight = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        self.dy = torch.randn(count, dtype=torch.float64) + 0.3
        mean = self.x.mean()
        std = ((self.x - mean).pow(2).mean() + eps).sqrt()
        self.xhat, self.invstd = (self.x - mean) / std, 1 / std
        output = self.weight * self.xhat + 0.2
        self.grad_input, self.grad_weight = torch.autograd.grad(
            output, [self.x, self.weight], self.dy, retain_graph=True
        )
        self.xhat, self.invstd = self.xhat.detach(), self.invstd.detach()


def collapsed(channel: Channel) -> Tensor:
    """weight * invstd * (dy - sum_dy/count - xhat * sum_dy_xhat/count)."""
    sum_dy, sum_dy_xhat = channel.dy.sum(), (channel.dy * channel.xhat).sum()
    centred = channel.dy - sum_dy / channel.count - channel.xhat * sum_dy_xhat / channel.count
    return channel.weight.detach() * channel.invstd * centred


def diagonal(channel: Channel) -> Tensor:
    """dx_i = dxhat_i / std * (1 - 1/m - xhat_i^2/m): the terms of i alone, no j != i."""
    own = 1 - 1 / channel.count - channel.xhat.pow(2) / channel.count
    return channel.dy * channel.weight.detach() * channel.invstd * own


def weighted_twice(channel: Channel) -> Tensor:
    """The collapsed form over dxhat = dy * weight, and multiplied by weight again."""
    return channel.weight.detach() * collapsed(channel)


def test_collapsed_gradient_is_autograds() -> None:
    channel = Channel()
    torch.testing.assert_close(collapsed(channel), channel.grad_input, rtol=1e-12, atol=1e-13)
    grad_weight = (channel.dy * channel.xhat).sum()
    torch.testing.assert_close(grad_weight, channel.grad_weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("formula", [diagonal, weighted_twice], ids=lambda f: f.__name__)
def test_wrong_formulas_are_wrong(formula) -> None:
    """Not by rounding: both miss the gradient by more than a tenth of it."""
    channel = Channel()
    error = (formula(channel) - channel.grad_input).norm() / channel.grad_input.norm()
    assert error > 0.1


def test_kernels_compute_the_right_one(backend: Backend) -> None:
    """On the very problem that tells the formulas apart."""
    channel = Channel()
    x = channel.x.detach().view(1, 1, -1).to(backend.device).requires_grad_()
    weight = channel.weight.detach().view(1).to(backend.device)
    output = batch_norm(x, None, None, weight, None, training=True, eps=1e-3)
    (grad,) = torch.autograd.grad(output, x, channel.dy.view(1, 1, -1).to(backend.device))
    torch.testing.assert_close(grad.cpu().flatten(), channel.grad_input, rtol=1e-12, atol=1e-13)


def test_gradient_is_orthogonal_to_what_batch_norm_removes(backend: Backend) -> None:
    """With eps = 0 the output ignores shift and scale of x: grad_input sums to 0 against both."""
    x = fill(Case((4, 3, 5), "small"), torch.float64, backend.device).requires_grad_()
    output = batch_norm(x, None, None, training=True, eps=0.0)
    (grad,) = torch.autograd.grad(output, x, torch.randn(x.shape, dtype=x.dtype).to(x.device))
    rows = grad.transpose(0, 1).flatten(1)
    values = x.detach().transpose(0, 1).flatten(1)
    zero = torch.zeros(3, dtype=x.dtype, device=x.device)
    torch.testing.assert_close(rows.sum(1), zero, rtol=0, atol=1e-13)
    torch.testing.assert_close((rows * values).sum(1), zero, rtol=0, atol=1e-13)


def test_harness_reference_is_autograds() -> None:
    """The reference's chain rule through variance and mean, against autograd of its forward."""
    x = fill(Case((4, 3, 5), "small"), torch.float64, "cpu").requires_grad_()
    p = fill_parameters(3, torch.float64, "cpu")
    weight, bias = p.weight.requires_grad_(), p.bias.requires_grad_()
    dy = torch.randn(x.shape, dtype=torch.float64)
    rows = x.transpose(0, 1).reshape(3, -1)
    centred = rows - rows.mean(1, keepdim=True)
    std = (centred.pow(2).mean(1, keepdim=True) + harness.EPS).sqrt()
    output = (centred / std * weight[:, None] + bias[:, None]).view(3, 4, 5).transpose(0, 1)
    grads = torch.autograd.grad(output, [x, weight, bias], dy)
    expected = harness.reference_backward(dy, x, p, True)
    wanted = [expected.grad_input, expected.grad_weight, expected.grad_bias]
    torch.testing.assert_close(list(grads), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(harness.reference_forward(x, p, True).output, output.detach())
