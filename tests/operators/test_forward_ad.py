"""Forward-mode AD and the transforms of torch.func, against the definition."""

from __future__ import annotations

import copy
from collections.abc import Callable

import harness
import pytest
import torch
from cases import FEW_CASES, channels_last, contiguous
from conftest import Backend
from parametrisations import both_modes, every_dtype
from test_double_backward import problem
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import batchnorm_cuda
from batchnorm_cuda import batch_norm

both_layouts = pytest.mark.parametrize("layout", [contiguous, channels_last], ids=["S", "C"])

C = 2
SHAPE = (3, C, 2, 2)


def double(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device)


class Problem:
    """batch_norm and the definition as functions of (x, weight, bias), and arguments for them."""

    def __init__(self, training: bool, device: str) -> None:
        self.training = training
        self.arguments = (double(SHAPE, device), double((C,), device), double((C,), device))
        self.mean, self.var = double((C,), device), double((C,), device).square() + 0.5

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        running = (None, None) if self.training else (self.mean, self.var)
        return batch_norm(x, *running, weight, bias, self.training, eps=harness.EPS)

    def definition(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        per_channel = (-1, 1, 1)
        mean, var = self.mean.view(per_channel), self.var.view(per_channel)
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = (x - mean).square().mean((0, 2, 3), keepdim=True)
        xhat = (x - mean) / (var + harness.EPS).sqrt()
        return xhat * weight.view(per_channel) + bias.view(per_channel)

    def compare(self, transform: Callable, *arguments: Tensor) -> None:
        """transform(f)(*arguments) is the same for both, f = ours or the definition."""
        got = transform(self.ours)(*arguments)
        expected = transform(self.definition)(*arguments)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def loss_of(function: Callable) -> Callable[..., Tensor]:
    """A scalar of the output without a symmetry that would hide terms of a derivative."""
    return lambda *arguments: function(*arguments).pow(3).sum()


@both_modes
@both_layouts
def test_gradcheck(backend: Backend, layout: Callable, training: bool) -> None:
    """Tangents of all three arguments, together and alone, against finite differences."""
    p = Problem(training, backend.device)
    x, weight, bias = (t.requires_grad_() for t in p.arguments)
    x = layout(x.detach()).requires_grad_()
    assert torch.autograd.gradcheck(p.ours, (x, weight, bias), check_forward_ad=True)


@both_modes
def test_gradgradcheck_forward_over_reverse(backend: Backend, training: bool) -> None:
    p = Problem(training, backend.device)
    arguments = tuple(t.requires_grad_() for t in p.arguments)
    assert torch.autograd.gradgradcheck(p.ours, arguments, check_fwd_over_rev=True)


@every_dtype
@both_modes
def test_tangent_matches_reference(kernels: Backend, dtype: torch.dtype, training: bool) -> None:
    """The tangent is what double backward sends to grad_output (docs/math.md)."""
    x, p, dy, tangents = problem(FEW_CASES[2], dtype, kernels.device)
    with forward_ad.dual_level():
        primals = (x, p.weight, p.bias)
        dual_x, weight, bias = map(forward_ad.make_dual, primals, tangents)
        output = batch_norm(dual_x, p.running_mean, p.running_var, weight, bias, training)
        tangent = forward_ad.unpack_dual(output).tangent
    assert tangent.dtype == dtype
    if training:
        p.running_mean = p.running_var = None
    expected = harness.reference_double_backward(tangents, dy, x, p, training)
    harness.assert_matches({"grad_grad_output": tangent}, expected, x)


@both_modes
def test_tangent_of_one_argument(backend: Backend, training: bool) -> None:
    p = Problem(training, backend.device)
    for i, argument in enumerate(p.arguments):

        def of_one(function: Callable, i: int = i) -> Callable:
            def call(value: Tensor) -> Tensor:
                return function(*p.arguments[:i], value, *p.arguments[i + 1 :])

            return lambda value, tangent: jvp(call, (value,), (tangent,))

        p.compare(of_one, argument, torch.randn_like(argument))


def test_forward_mode_without_gradients(backend: Backend) -> None:
    """no_grad() turns reverse mode off, not forward mode."""
    p = Problem(True, backend.device)
    x, *rest = p.arguments
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(p.ours(dual, *rest)).tangent
    # A shift of the whole channel changes nothing.
    torch.testing.assert_close(tangent, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_running_statistics_follow_the_primal(backend: Backend) -> None:
    x = torch.randn(SHAPE, device=backend.device)
    modules = [batchnorm_cuda.BatchNorm2d(C).to(backend.device) for _ in range(2)]
    with forward_ad.dual_level():
        modules[0](forward_ad.make_dual(x, torch.ones_like(x)))
    modules[1](x)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


def test_tangent_of_running_statistics_is_refused(kernels: Backend) -> None:
    p = Problem(False, kernels.device)
    with forward_ad.dual_level():
        p.mean = forward_ad.make_dual(p.mean, torch.ones_like(p.mean))
        with pytest.raises(RuntimeError, match="expected running_mean and running_var to have no"):
            p.ours(*p.arguments)


ALL = (0, 1, 2)
TRANSFORMS = {
    "grad": lambda f: grad(loss_of(f), ALL),
    "jacrev": lambda f: jacrev(f, ALL),
    "jacfwd": lambda f: jacfwd(f, ALL),
    "hessian": lambda f: hessian(loss_of(f), ALL),
    "reverse over forward": lambda f: jacrev(jacfwd(loss_of(f), ALL), ALL),
    "reverse over reverse": lambda f: jacrev(jacrev(loss_of(f), ALL), ALL),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@both_modes
def test_derivatives(backend: Backend, name: str, training: bool) -> None:
    p = Problem(training, backend.device)
    p.compare(TRANSFORMS[name], *p.arguments)


IN_DIMS = [(0, None, None), (None, 0, 0), (0, 0, 0), (3, None, 0), (-1, 0, None)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@both_modes
def test_vmap(backend: Backend, in_dims: tuple[int | None, ...], training: bool) -> None:
    p = Problem(training, backend.device)
    arguments = [
        argument if dim is None else torch.stack([argument, argument.square() - 1, -argument], dim)
        for argument, dim in zip(p.arguments, in_dims, strict=True)
    ]
    p.compare(lambda f: vmap(f, in_dims, out_dims=1), *arguments)
    p.compare(lambda f: vmap(grad(loss_of(f), ALL), in_dims), *arguments)
    with torch.no_grad():
        p.compare(lambda f: vmap(f, in_dims), *arguments)


@both_modes
def test_vmap_of_vmap_and_of_hessian(backend: Backend, training: bool) -> None:
    p = Problem(training, backend.device)
    x, weight, bias = p.arguments
    many = torch.stack([x, x.flip(0), x.square()])
    scales = torch.stack([weight, bias])
    p.compare(
        lambda f: vmap(vmap(f, (0, None, None)), (None, 0, None)),
        many,
        scales,
        bias,
    )
    p.compare(lambda f: vmap(hessian(loss_of(f)), (0, None, None)), many, weight, bias)


def test_functional_call(backend: Backend) -> None:
    """Without a transform it is the module, running statistics included."""
    module = batchnorm_cuda.BatchNorm2d(C).to(backend.device)
    twin = copy.deepcopy(module)
    x = torch.randn(SHAPE, device=backend.device)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.testing.assert_close(functional_call(module, state, (x,)), twin(x))
    torch.testing.assert_close(state, dict(twin.state_dict()))
    assert int(module.num_batches_tracked) == 0


@pytest.mark.parametrize("kind", ["eval", "no running statistics"])
def test_gradients_per_sample(backend: Backend, kind: str) -> None:
    """vmap over grad over functional_call, against a loop."""
    tracks = kind == "eval"
    module = batchnorm_cuda.BatchNorm2d(C, track_running_stats=tracks).double()
    module = module.to(backend.device).train(not tracks)
    parameters = dict(module.named_parameters())
    samples = double((4, *SHAPE), backend.device)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,)).pow(3).sum()

    together = vmap(grad(loss), (None, 0))(parameters, samples)
    alone = [grad(loss)(parameters, x) for x in samples]
    for name, gradients in together.items():
        torch.testing.assert_close(gradients, torch.stack([one[name] for one in alone]))


def test_ensemble(backend: Backend) -> None:
    """Models of their own parameters and statistics, in one call."""
    models = [batchnorm_cuda.BatchNorm2d(C).to(backend.device).eval() for _ in range(3)]
    for model in models:
        for tensor in (*model.parameters(), model.running_mean):
            torch.nn.init.normal_(tensor)
    x = torch.randn(SHAPE, device=backend.device)
    state = stack_module_state(models)
    together = vmap(lambda *state: functional_call(models[0], state, (x,)))(*state)
    torch.testing.assert_close(together, torch.stack([model(x) for model in models]))


@pytest.mark.parametrize("transform", [grad, vmap, jacfwd], ids=lambda f: f.__name__)
def test_updates_under_a_transform_are_refused(backend: Backend, transform: Callable) -> None:
    """Nothing is written, and the message says what to do."""
    module = batchnorm_cuda.BatchNorm2d(C).to(backend.device)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn((2, *SHAPE) if transform is vmap else SHAPE, device=backend.device)
    with pytest.raises(RuntimeError, match=r"under a transform.*use eval\(\) or track_running"):
        transform(lambda x: module(x).sum())(x)
    torch.testing.assert_close(module.state_dict(), before)


def test_forward_over_forward_is_refused(kernels: Backend) -> None:
    p = Problem(True, kernels.device)
    with pytest.raises(RuntimeError, match=r"forward mode over forward mode.* not available"):
        jacfwd(jacfwd(loss_of(p.ours)))(*p.arguments)


def test_transforms_of_an_earlier_output(backend: Backend) -> None:
    """The graph is recorded first; vmap and forward mode then go over its backward alone."""
    p = Problem(True, backend.device)
    x, *rest = p.arguments
    output = p.ours(x.requires_grad_(), *rest)
    many = double((3, *SHAPE), backend.device)

    def pull_back(dy: Tensor) -> Tensor:
        return torch.autograd.grad(output, x, dy, retain_graph=True)[0]

    alone = torch.stack([pull_back(dy) for dy in many])
    torch.testing.assert_close(vmap(pull_back)(many), alone)
    with forward_ad.dual_level():
        gradient = pull_back(forward_ad.make_dual(many[0], many[1]))
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, alone[1])
