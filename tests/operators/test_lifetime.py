"""What a result keeps alive, and that a result can be saved: over all ways of a call."""

from __future__ import annotations

import gc
import io
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import Backend
from parametrisations import both_modes
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm_cuda._ops import choice, passes
from batchnorm_cuda._ops.calls import Forward, Group
from batchnorm_cuda.functional import normalize

FORMS = [(relu, residual) for relu in (False, True) for residual in (False, True)]
Way = Callable[[Forward], Tensor]


def in_forward_mode(call: Forward) -> Tensor:
    with forward_ad.dual_level():
        return normalize(call)


def by_operators(call: Forward) -> Tensor:
    """As in a graph of torch.export's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "_dispatch_modes", lambda: 1)
        return normalize(call)


def called_directly(call: Forward) -> Tensor:
    """The operator itself, which autograd differentiates."""
    settings = call.training, call.momentum, call.eps
    if call.relu or call.residual is not None:
        fused = call.residual, call.relu, True
        return torch.ops.batchnorm_cuda.fused_forward(*call[:6], *fused, *settings)[0]
    return torch.ops.batchnorm_cuda.forward(*call[:9])[0]


def over_ranks(call: Forward) -> Tensor:
    """Over two, of which the other has the same batch."""
    if not call.training:
        return normalize(call)
    return normalize(call._replace(group=Group(2, "none")))


def compiled(call: Forward) -> Tensor:
    torch.compiler.reset()
    return torch.compile(normalize, backend="aot_eager")(call)


def no_gradients(call: Forward) -> Tensor:
    with torch.no_grad():
        return normalize(call)


def gathered(values: Tensor, *group: object) -> Tensor:
    return torch.stack([values] * 2)


def call_of(x: Tensor, training: bool) -> Forward:
    weight, bias = (torch.randn(3, device=x.device, requires_grad=True) for _ in range(2))
    running = torch.zeros(3, device=x.device), torch.ones(3, device=x.device), None
    return Forward(x, weight, bias, *running, training, 0.1, 1e-5)


WAYS = [
    normalize,
    in_forward_mode,
    by_operators,
    called_directly,
    over_ranks,
    compiled,
    no_gradients,
]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    monkeypatch.setattr(passes, "gather", gathered)
    return request.param


@pytest.fixture(params=FORMS, ids=lambda form: f"relu={form[0]}, residual={form[1]}")
def make(request: pytest.FixtureRequest, backend: Backend) -> Callable[..., Forward]:
    relu, with_residual = request.param

    def call(x: Tensor, training: bool) -> Forward:
        residual = torch.ones_like(x) if with_residual else None
        return call_of(x, training)._replace(residual=residual, relu=relu)

    return call


def intermediate(device: torch.device | str) -> Tensor:
    return torch.randn(4, 3, 5, 5, device=device, requires_grad=True) * 2


@both_modes
def test_the_input_goes_with_the_backward(
    way: Way, make: Callable[..., Forward], backend: Backend, training: bool
) -> None:
    x = intermediate(backend.device)
    seen = weakref.ref(x)
    output = way(make(x, training))
    del x
    if output.requires_grad:
        output.sum().backward()
    gc.collect()
    assert seen() is None


@both_modes
@pytest.mark.parametrize("way", [normalize, by_operators, called_directly, over_ranks])
def test_the_residual_goes_at_once(
    way: Way, backend: Backend, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """It takes no part in any gradient."""
    monkeypatch.setattr(passes, "gather", gathered)
    residual = torch.randn(4, 3, 5, 5, device=backend.device)
    seen = weakref.ref(residual)
    call = call_of(intermediate(backend.device), training)
    output = way(call._replace(residual=residual, relu=True))
    del residual
    gc.collect()
    assert seen() is None
    assert output.requires_grad


@both_modes
@pytest.mark.parametrize("way", [way for way in WAYS if way is not compiled], indirect=True)
def test_a_result_is_saved_without_a_warning(
    way: Way, make: Callable[..., Forward], backend: Backend, training: bool
) -> None:
    output = way(make(intermediate(backend.device), training))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(output, io.BytesIO())


@both_modes
def test_a_gradient_of_gradients_lets_go(
    make: Callable[..., Forward], backend: Backend, training: bool
) -> None:
    x = intermediate(backend.device)
    seen = weakref.ref(x)
    call = make(x, training)
    leaf = call.weight
    (grad,) = torch.autograd.grad(normalize(call).square().sum(), leaf, create_graph=True)
    del x, call
    grad.sum().backward()
    del grad
    gc.collect()
    assert seen() is None
