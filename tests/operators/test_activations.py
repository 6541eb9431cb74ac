"""The activations that may follow batch norm, by the definition of each in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import FEW_CASES, Case, fill, fill_gradient
from conftest import Backend
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import batchnorm_cuda
from batchnorm_cuda import batch_norm
from batchnorm_cuda._ops import passes
from batchnorm_cuda._ops.activations import KINDS, parse
from batchnorm_cuda._ops.calls import Forward, Group
from batchnorm_cuda.functional import normalize

DEFINITIONS: dict[object, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    ("leaky_relu", 0.25): lambda z: F.leaky_relu(z, 0.25),
    ("leaky_relu", 0): torch.relu,
    ("leaky_relu", 1.0): lambda z: z,
}
every_activation = pytest.mark.parametrize("activation", DEFINITIONS, ids=str)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
with_or_without = pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])


class Problem:
    """Weights and biases of both signs, a residual and a gradient."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, with_residual: bool) -> None:
        self.x = fill(case, dtype, device)
        c = self.x.shape[1]
        self.weight = torch.linspace(-1.5, 1, c, device=device)
        self.bias = torch.linspace(0.5, -0.5, c, device=device)
        self.running = torch.zeros(c, device=device), torch.full((c,), 2.0, device=device)
        self.residual = fill(case, dtype, device).flip(0) if with_residual else None
        self.dy = fill_gradient(self.x, dtype)

    def run(
        self, function: Callable[..., Tensor], training: bool, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Output and gradients; `function` takes x, residual, weight, bias and statistics."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        of_inputs = [leaf(self.x), leaf(self.residual)]
        of_parameters = [leaf(self.weight), leaf(self.bias)]
        running = [each.to(dtype, copy=True) for each in self.running]
        output = function(*of_inputs, *of_parameters, *running, training)
        names = ("grad_input", "grad_residual", "grad_weight", "grad_bias")
        leaves = dict(zip(names, [*of_inputs, *of_parameters], strict=True))
        leaves = {name: tensor for name, tensor in leaves.items() if tensor is not None}
        grads = torch.autograd.grad(output, list(leaves.values()), self.dy.to(output.dtype))
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def by_definition(activation: object) -> Callable[..., Tensor]:
    def function(x: Tensor, residual: Tensor | None, w: Tensor, b: Tensor, *rest: object) -> Tensor:
        mean, var, training = rest
        z = F.batch_norm(x, mean, var, w, b, training, 0.1, 1e-5)
        return DEFINITIONS[activation](z if residual is None else z + residual)

    return function


def ours(activation: object) -> Callable[..., Tensor]:
    def function(x: Tensor, residual: Tensor | None, w: Tensor, b: Tensor, *rest: object) -> Tensor:
        mean, var, training = rest
        added = {"residual": residual, "activation": activation}
        return batch_norm(x, mean, var, w, b, training, 0.1, 1e-5, **added)

    return function


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], x: Tensor) -> None:
    """Within one rounding of the result's dtype, and what a sum of float32 terms may be off.

    grad_input takes sums over `count` rounded gradients, each off by half a unit of the dtype.
    """
    of_input = torch.finfo(x.dtype).eps
    acc = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    count = x.numel() // x.shape[1]
    for name, result in results.items():
        reference = expected[name]
        of_sums = count * max(acc, of_input / 2) if name in ("grad_weight", "grad_bias") else 0
        scale = reference.abs().max().clamp_min(1)
        unit = torch.finfo(result.dtype).eps
        atol = (64 * acc + of_sums + (4 * of_input if name == "grad_input" else 0)) * float(scale)
        torch.testing.assert_close(result.double(), reference, rtol=unit, atol=atol, msg=name)


@every_activation
@every_dtype
@both_modes
@with_or_without
def test_by_definition(
    backend: Backend, activation: object, dtype: torch.dtype, training: bool, with_residual: bool
) -> None:
    for case in FEW_CASES[:3]:
        problem = Problem(case, dtype, backend.device, with_residual)
        expected = problem.run(by_definition(activation), training, torch.float64)
        assert_close(problem.run(ours(activation), training), expected, problem.x)


@every_activation
@with_or_without
def test_over_ranks(
    backend: Backend,
    activation: object,
    with_residual: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks with the same batch are one."""
    monkeypatch.setattr(passes, "gather", lambda values, *group: torch.stack([values] * 2))
    problem = Problem(FEW_CASES[0], torch.float32, backend.device, with_residual)
    relu, name, parameter = parse(activation)

    def function(x: Tensor, residual: Tensor | None, w: Tensor, b: Tensor, *rest: object) -> Tensor:
        mean, var, training = rest
        call = Forward(x, w, b, mean, var, None, training, 0.1, 1e-5, residual, relu)
        group = Group(2, "none")
        return normalize(call._replace(group=group, activation=name, parameter=parameter))

    results = problem.run(function, True)
    assert_close(results, problem.run(by_definition(activation), True, torch.float64), problem.x)


@every_activation
@both_modes
@with_or_without
def test_gradients_of_gradients(
    backend: Backend, activation: object, training: bool, with_residual: bool
) -> None:
    """Numerically; far from where the slope jumps."""
    torch.manual_seed(0)
    x, residual = (torch.randn(3, 2, 2, dtype=torch.float64, device=backend.device) for _ in "ab")
    residual = (residual.sign() * (residual.abs() + 4)) if with_residual else None
    w, b = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in ([-1.5, 0.5], [7.0, -7.0]))
    running = torch.zeros_like(w), torch.ones_like(w)

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ours(activation)(x, residual, w, b, *(v.clone() for v in running), training)

    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_nothing_more_is_saved(kernels: Backend) -> None:
    """Of the activation a bit an element."""
    x = torch.randn(4, 3, 8, 8, device=kernels.device, dtype=torch.float16)
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        leaf = x.clone().requires_grad_()
        batch_norm(leaf, None, None, training=True, residual=x, activation="leaky_relu")
    assert sorted(sizes) == sorted([x.nbytes, 12, 12, x.nbytes // 16])


@every_activation
def test_special_values(backend: Backend, activation: object) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[inf, -inf, nan, 0.0, -0.0, 3.0, -3.0, 6.0, 7.5]], device=backend.device).T
    running = torch.zeros(1, device=x.device), torch.ones(1, device=x.device)
    y = batch_norm(x, *running, eps=0.0, activation=activation)
    torch.testing.assert_close(y, DEFINITIONS[activation](x), equal_nan=True)


@every_activation
@every_dtype
def test_infinite_gradients(backend: Backend, activation: object, dtype: torch.dtype) -> None:
    """Also of an infinite output: what torch's activation gives, to the bit."""
    inf = torch.inf
    z = torch.tensor([[-1.0, 1.0, inf, -inf, -2.0, 3.0, -3.0, 0.0]], device=backend.device).T
    dy = torch.tensor([[inf, inf, 1.0, 1.0, -inf, -inf, 2.0, inf]], device=backend.device).T
    z, dy = z.to(dtype).requires_grad_(), dy.to(dtype)
    x = torch.zeros_like(z)
    statistics = torch.zeros(1, device=z.device), torch.ones(1, device=z.device)
    y = batch_norm(x, *statistics, residual=z, activation=activation)
    (got,) = torch.autograd.grad(y, z, dy)
    (expected,) = torch.autograd.grad(DEFINITIONS[activation](z), z, dy)
    assert torch.equal(got, expected)


def test_compiled_module(backend: Backend) -> None:
    torch.compiler.reset()
    module = batchnorm_cuda.BatchNorm2d(3, activation=("leaky_relu", 0.2), device=backend.device)
    x = torch.randn(4, 3, 5, 5, device=backend.device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    assert repr(module).endswith("activation=('leaky_relu', 0.2))")


@pytest.mark.parametrize(
    "activation",
    [
        "gelu",
        "",
        (),
        1,
        ("relu", 0.1),
        ("relu6", 6.0),
        ("leaky_relu", 0.1, 0.2),
        ("leaky_relu", "a"),
    ],
    ids=str,
)
def test_unknown_activation(backend: Backend, activation: object) -> None:
    x = torch.randn(4, 3, device=backend.device)
    with pytest.raises(ValueError) as error:
        batch_norm(x, None, None, training=True, activation=activation)
    assert str(error.value) == (
        'batch_norm: expected activation to be None, "relu", "relu6", "leaky_relu" or '
        f'("leaky_relu", number), got {activation!r}'
    )


@pytest.mark.parametrize("slope", [-0.1, 1.5, torch.nan])
def test_slope_out_of_range(backend: Backend, slope: float) -> None:
    x = torch.randn(4, 3, device=backend.device)
    with pytest.raises(ValueError, match=r"parameter of 'leaky_relu' to lie between 0.0 and 1.0"):
        batch_norm(x, None, None, training=True, activation=("leaky_relu", slope))


def test_the_kernels_know_the_same_names(kernels: Backend, extension: object) -> None:
    x = torch.zeros(2, 3, device=kernels.device)
    arguments = (x, *(None,) * 6, True, False, True, 0.1, 1e-5)
    for name in KINDS:
        extension.fused_forward(*arguments, name, 0.0)
    with pytest.raises(ValueError, match='expected activation to be one that there is, got "elu"'):
        extension.fused_forward(*arguments, "elu", 0.0)
