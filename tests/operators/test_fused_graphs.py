"""Fused batch norm in recorded graphs: torch.compile, torch.export, torch.fx, torch.jit."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from cases import channels_last, contiguous
from conftest import Backend
from fused import FORMS, every_form
from harness import Seen, with_pickled
from parametrisations import both_modes
from torch import Tensor, nn

import batchnorm_cuda
from batchnorm_cuda import batch_norm

C = 5
operators = torch.ops.batchnorm_cuda


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch._dynamo.reset()


class Functional(nn.Module):
    def __init__(self, channels: int, activation: str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return batch_norm(
            input,
            self.mean,
            self.var,
            self.weight,
            None,
            self.training,
            0.3,
            residual=residual,
            activation=self.activation,
        )


KINDS = {
    "2d": batchnorm_cuda.BatchNorm2d,
    "sync": batchnorm_cuda.SyncBatchNorm,
    "functional": Functional,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """One normalisation in one of the forms, on two inputs or one."""

    def __init__(self, kind: str, form: str) -> None:
        super().__init__()
        self.added, relu = FORMS[form]
        self.norm = KINDS[kind](C, activation="relu" if relu else None)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return self.norm(input, residual) if self.added else self.norm(input) * residual


def make(kind: str, form: str, backend: Backend, training: bool) -> nn.Module:
    return Net(kind, form).to(backend.device).train(training)


def data(backend: Backend, size: int, place: Callable = contiguous) -> list[Tensor]:
    return [place(torch.randn(size, C, 4, 3)).to(backend.device) for _ in range(2)]


def step(call: Callable, module: nn.Module, x: Tensor, r: Tensor) -> dict[str, Tensor]:
    leaves = {"input": x.detach().requires_grad_(), "residual": r.detach().requires_grad_()}
    wanted = leaves | dict(module.named_parameters())
    output = call(*leaves.values())
    grads = torch.autograd.grad(output.pow(3).sum(), wanted.values())
    state = {f"state of {k}": v.clone() for k, v in module.state_dict().items()}
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True)), **state}


@every_kind
@every_form
@both_modes
@pytest.mark.parametrize("place", [contiguous, channels_last], ids=["contiguous", "channels last"])
def test_one_graph_for_every_batch_size(
    backend: Backend, kind: str, form: str, training: bool, place: Callable
) -> None:
    """The second size makes the batch a symbol; from then on nothing is compiled again."""
    eager = make(kind, form, backend, training)
    module = copy.deepcopy(eager)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    for index, size in enumerate((2, 3, 4, 33)):
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            inputs = data(backend, size, place)
            got, expected = step(graph, module, *inputs), step(eager, eager, *inputs)
            torch.testing.assert_close(got, expected)
            for name in ("output", "input"):
                assert got[name].stride() == expected[name].stride(), name


def test_compiled_inference(backend: Backend) -> None:
    module = make("2d", "residual and relu", backend, False)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in (2, 3):
            inputs = data(backend, size)
            torch.testing.assert_close(graph(*inputs), module(*inputs))


def test_inductor(backend: Backend) -> None:
    eager = make("2d", "residual and relu", backend, True)
    module = copy.deepcopy(eager)
    graph = torch.compile(module, fullgraph=True, dynamic=True)
    for size in (2, 3):
        inputs = data(backend, size, channels_last)
        torch.testing.assert_close(step(graph, module, *inputs), step(eager, eager, *inputs))


@every_kind
@every_form
@both_modes
def test_exported_program_trains(backend: Backend, kind: str, form: str, training: bool) -> None:
    """On another batch size, and after a round trip through a file."""
    eager = make(kind, form, backend, training)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(
        copy.deepcopy(eager), tuple(data(backend, 2)), dynamic_shapes=(batch, batch), strict=False
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    inputs = data(backend, 6)
    for candidate in (program, torch.export.load(file)):
        module, twin = candidate.module(), copy.deepcopy(eager)
        torch.testing.assert_close(step(module, module, *inputs), step(twin, twin, *inputs))


def test_exported_from_inputs_without_gradients(kernels: Backend) -> None:
    """Its operator asks for no mask; when it is trained all the same, there is one."""

    class Plain(nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return batch_norm(x, None, None, training=True, residual=residual, activation="relu")

    inputs = data(kernels, 3)
    with torch.no_grad():
        module = torch.export.export(Plain(), tuple(inputs), strict=False).module()
    torch.testing.assert_close(step(module, module, *inputs), step(Plain(), Plain(), *inputs))


@pytest.mark.parametrize("kind", ["2d", "sync"])
@both_modes
def test_fx_keeps_modules_as_leaves(backend: Backend, kind: str, training: bool) -> None:
    net = make(kind, "residual and relu", backend, training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert node.target == "norm" and len(node.args) == 2
    inputs = data(backend, 3)
    for module in with_pickled(traced):
        twin = copy.deepcopy(net)
        torch.testing.assert_close(step(module, module, *inputs), step(twin, twin, *inputs))


def test_fx_residual_of_a_buffer(backend: Backend) -> None:
    """Only one of the two is traced."""
    norm = batchnorm_cuda.BatchNorm2d(C, activation="relu").to(backend.device)
    known, x = data(backend, 3)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm
            self.register_buffer("known", known)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.known, x) + self.norm(x, self.known)

    module = Outer()
    traced = torch.fx.symbolic_trace(module)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["norm", "norm"]
    torch.testing.assert_close(traced(x), module(x))


@every_form
def test_fx_keeps_the_function(backend: Backend, form: str) -> None:
    net = make("functional", form, backend, True)
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    assert batch_norm in [n.target for n in traced.graph.nodes if n.op == "call_function"]
    inputs = data(backend, 3)
    torch.testing.assert_close(step(traced, traced, *inputs), step(net, net, *inputs))


@pytest.mark.parametrize("place", ["input", "residual"])
def test_torch_function(backend: Backend, place: str) -> None:
    """Tensor subclasses see the function with all of its arguments, wherever they come."""
    given = dict(zip(("input", "residual"), data(backend, 3), strict=True))
    settings = {"running_mean": None, "running_var": None, "training": True, "activation": "relu"}
    expected = batch_norm(**given, **settings)
    given[place] = given[place].as_subclass(Seen)
    Seen.calls.clear()
    output = batch_norm(**given, **settings)
    assert batch_norm in Seen.calls
    assert torch.equal(output.as_subclass(Tensor), expected)


@both_modes
def test_jit_trace(kernels: Backend, training: bool) -> None:
    """The operator, for any batch size, and it trains."""
    net = make("2d", "residual and relu", kernels, training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, tuple(data(kernels, 2)), check_trace=False)
    inputs, twin = data(kernels, 3), copy.deepcopy(net)
    torch.testing.assert_close(step(traced, net, *inputs), step(twin, twin, *inputs))
