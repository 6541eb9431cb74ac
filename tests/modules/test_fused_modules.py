"""Modules with an activation and a residual: constructor, state, copies, conversion, autocast."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import Backend
from parametrisations import both_modes
from torch import Tensor, nn

import batchnorm_cuda
from batchnorm_cuda import SyncBatchNorm, convert, revert

C = 5
PAIRS = {
    "1d": (batchnorm_cuda.BatchNorm1d, nn.BatchNorm1d, (6, C, 4)),
    "1d without length": (batchnorm_cuda.BatchNorm1d, nn.BatchNorm1d, (9, C)),
    "2d": (batchnorm_cuda.BatchNorm2d, nn.BatchNorm2d, (3, C, 4, 2)),
    "3d": (batchnorm_cuda.BatchNorm3d, nn.BatchNorm3d, (2, C, 2, 3, 4)),
    "sync": (SyncBatchNorm, nn.BatchNorm2d, (3, C, 4, 2)),
}
LAZY = {
    "1d": batchnorm_cuda.LazyBatchNorm1d,
    "2d": batchnorm_cuda.LazyBatchNorm2d,
    "3d": batchnorm_cuda.LazyBatchNorm3d,
}
every_pair = pytest.mark.parametrize("kind", PAIRS)
TIGHT = {"rtol": 1e-11, "atol": 1e-12}  # of float64


def batch(shape: tuple[int, ...], backend: Backend) -> list[Tensor]:
    """Input, residual and gradient."""
    return [torch.randn(shape, dtype=torch.float64).to(backend.device) for _ in range(3)]


def step(call: Callable, module: nn.Module, x: Tensor, r: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients and, copied, the state after them."""
    leaves = {"input": x.detach().requires_grad_(), "residual": r.detach().requires_grad_()}
    wanted = leaves | dict(module.named_parameters())
    output = call(*leaves.values())
    grads = torch.autograd.grad(output, wanted.values(), dy)
    state = {f"state of {k}": v.clone() for k, v in module.state_dict().items()}
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True)), **state}


@every_pair
@pytest.mark.parametrize("momentum", [0.1, None])
def test_steps_like_torchs(backend: Backend, kind: str, momentum: float | None) -> None:
    """Training, training, evaluation, in float64, beside torch.nn's module, add and ReLU."""
    ours, theirs, shape = PAIRS[kind]
    module = ours(C, momentum=momentum, activation="relu").to(backend.device, torch.float64)
    expected = theirs(C, momentum=momentum).to(backend.device, torch.float64)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.uniform_(0.5, 1.5)
    module.load_state_dict(expected.state_dict())
    for training in (True, True, False):
        data = batch(shape, backend)
        got = step(module.train(training), module, *data)
        expected.train(training)
        want = step(lambda x, r: (expected(x) + r).relu(), expected, *data)
        torch.testing.assert_close(got, want, **TIGHT)


@every_pair
def test_one_of_the_two(backend: Backend, kind: str) -> None:
    """An activation without a residual, and a residual without an activation."""
    ours, _, shape = PAIRS[kind]
    x, residual, _ = batch(shape, backend)
    plain, relu = (
        ours(C, activation=activation).to(backend.device, torch.float64)
        for activation in (None, "relu")
    )
    output = plain(x)
    torch.testing.assert_close(relu(x), output.relu(), **TIGHT)
    torch.testing.assert_close(plain(x, residual), output + residual, **TIGHT)
    torch.testing.assert_close(relu(x, residual=residual), (output + residual).relu(), **TIGHT)


@every_pair
def test_what_shows(kind: str) -> None:
    """The activation is seen when printed, and is no part of the state."""
    ours, theirs, _ = PAIRS[kind]
    module = ours(C, activation="relu")
    assert list(module.state_dict()) == list(theirs(C).state_dict())
    assert module.extra_repr() == f"{theirs(C).extra_repr()}, activation='relu'"
    assert "activation" not in repr(ours(C))


@every_pair
def test_copies_keep_it(backend: Backend, kind: str) -> None:
    ours, _, shape = PAIRS[kind]
    module = ours(C, activation="relu").to(backend.device, torch.float64)
    x, residual, dy = batch(shape, backend)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    expected = step(module, module, x, residual, dy)
    for twin in copies:
        torch.testing.assert_close(step(twin, twin, x, residual, dy), expected)
        assert twin.activation == "relu"


def test_pickled_before_there_were_activations(backend: Backend) -> None:
    module = batchnorm_cuda.BatchNorm2d(C).to(backend.device)
    del module.__dict__["activation"]
    module = pickle.loads(pickle.dumps(module))
    x = torch.randn(3, C, 4, 2).to(backend.device)
    assert module(x).min() < 0
    assert "activation" not in repr(module)


@pytest.mark.parametrize("kind", [*PAIRS, "lazy"])
def test_refused_activation(kind: str) -> None:
    make = LAZY["2d"] if kind == "lazy" else lambda **settings: PAIRS[kind][0](C, **settings)
    with pytest.raises(ValueError, match=r"expected activation to be None, .*, got 'gelu'"):
        make(activation="gelu")


def test_activation_set_later(backend: Backend) -> None:
    module = batchnorm_cuda.BatchNorm2d(C).to(backend.device)
    x = torch.randn(3, C, 4, 2).to(backend.device)
    module.activation = "relu"
    assert module(x).min() == 0
    module.activation = "tanh"
    with pytest.raises(ValueError, match="expected activation"):
        module(x)
    assert int(module.num_batches_tracked) == 1


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("by_name", [False, True], ids=["by place", "by name"])
def test_lazy(backend: Backend, kind: str, by_name: bool) -> None:
    """The first call may have a residual already."""
    ours, theirs, shape = PAIRS[kind]
    module = LAZY[kind](dtype=torch.float64, device=backend.device, activation="relu")
    x, residual, _ = batch(shape, backend)
    output = module(x, residual=residual) if by_name else module(x, residual)
    assert type(module) is ours
    expected = theirs(C).to(backend.device, torch.float64)
    torch.testing.assert_close(output, (expected(x) + residual).relu(), **TIGHT)


@every_pair
def test_refused_residual_leaves_every_buffer(backend: Backend, kind: str) -> None:
    ours, _, shape = PAIRS[kind]
    module = ours(C, activation="relu").to(backend.device, torch.float64)
    before = copy.deepcopy(module.state_dict())
    x, residual, _ = batch(shape, backend)
    with pytest.raises(ValueError, match="expected residual to have shape"):
        module(x, residual[:1])
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


# --- conversion ---------------------------------------------------------------------------------


def test_convert_keeps_it() -> None:
    """Exchanges classes only: what had an activation keeps it, and what had none gets none."""
    net = nn.Sequential(
        batchnorm_cuda.BatchNorm1d(C, activation="relu"), nn.BatchNorm1d(C), nn.ReLU()
    )
    convert(net, sync=True)
    assert [type(module) for module in net] == [SyncBatchNorm, SyncBatchNorm, nn.ReLU]
    assert [module.activation for module in net[:2]] == ["relu", None]
    again = SyncBatchNorm.convert_sync_batchnorm(net)
    assert [module.activation for module in again[:2]] == ["relu", None]


@pytest.mark.parametrize("kind", ["1d", "sync"])
def test_revert_refuses_it(kind: str) -> None:
    """torch.nn's module would leave out the ReLU; nothing is changed."""
    ours = PAIRS[kind][0]
    net = nn.Sequential(batchnorm_cuda.BatchNorm1d(C), ours(C, activation="relu"))
    with pytest.raises(ValueError, match=r"^revert: expected .* activation='relu' at '1'"):
        revert(net)
    assert type(net[0]) is batchnorm_cuda.BatchNorm1d
    net[1].activation = None
    assert not isinstance(revert(net)[1], ours)


# --- autocast -----------------------------------------------------------------------------------


@both_modes
def test_autocast(backend: Backend, training: bool) -> None:
    """As the plain module: takes what the convolution gives, with float32 parameters."""
    conv = nn.Conv2d(C, C, 1).to(backend.device)
    norm = batchnorm_cuda.BatchNorm2d(C, activation="relu").to(backend.device).train(training)
    plain = batchnorm_cuda.BatchNorm2d(C).to(backend.device).train(training)
    x = torch.randn(3, C, 4, 2).to(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        values = conv(x)
        residual = conv(x.flip(0))
        output = norm(values, residual)
        expected = (plain(values).double() + residual).relu()
    assert values.dtype == output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected, rtol=2**-7, atol=2**-7)
    output.sum().backward()
    assert norm.weight.grad.dtype == conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(norm.running_var, plain.running_var)
