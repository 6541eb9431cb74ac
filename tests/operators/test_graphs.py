"""What records a network: torch.compile, torch.export, AOTAutograd, torch.fx, torch.jit."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import channels_last, contiguous
from conftest import Backend
from functorch.compile import aot_function, aot_module, nop
from harness import Seen, with_pickled
from parametrisations import both_modes
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import batchnorm_cuda
from batchnorm_cuda import convert
from batchnorm_cuda._ops import operators as ops

C = 5


class Functional(nn.Module):
    """`batch_norm` with buffers and parameters of a module's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        return batchnorm_cuda.batch_norm(
            input, self.mean, self.var, self.weight, None, self.training, 0.3
        )


def lazy(channels: int) -> nn.Module:
    module = batchnorm_cuda.LazyBatchNorm2d()
    module(torch.randn(2, channels, 3, 3))
    return module


# How a module is made, and its input but for the batch.
KINDS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], Callable]] = {
    "1d": (batchnorm_cuda.BatchNorm1d, (4,), contiguous),
    "1d without length": (batchnorm_cuda.BatchNorm1d, (), contiguous),
    "2d": (batchnorm_cuda.BatchNorm2d, (4, 3), contiguous),
    "2d channels last": (batchnorm_cuda.BatchNorm2d, (4, 3), channels_last),
    "3d": (batchnorm_cuda.BatchNorm3d, (2, 3, 2), contiguous),
    "lazy": (lazy, (4, 3), contiguous),
    "sync": (batchnorm_cuda.SyncBatchNorm, (4, 3), contiguous),
    "functional": (Functional, (4, 3), contiguous),
}
ARGUMENTS = [
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]
VARIANTS = [(kind, {}) for kind in KINDS] + [("2d", arguments) for arguments in ARGUMENTS]
every_variant = pytest.mark.parametrize(("kind", "arguments"), VARIANTS, ids=str)


def make(kind: str, arguments: dict[str, Any], backend: Backend, training: bool) -> nn.Module:
    return KINDS[kind][0](C, **arguments).to(backend.device).train(training)


def twins(
    kind: str, arguments: dict[str, Any], backend: Backend, training: bool
) -> tuple[nn.Module, nn.Module]:
    """Two modules of the same state: one to record, one to compare with."""
    module = make(kind, arguments, backend, training)
    return module, copy.deepcopy(module)


def inputs(kind: str, backend: Backend, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    _, rest, place = KINDS[kind]
    for size in sizes:
        yield place(torch.randn(size, C, *rest)).to(backend.device)


def step(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and, copied, the state after them."""
    leaf = x.detach().requires_grad_()
    wanted = {"input": leaf, **dict(module.named_parameters())}
    output = function(leaf)
    grads = torch.autograd.grad(output.pow(3).sum(), wanted.values())
    state = {f"state of {name}": value.clone() for name, value in module.state_dict().items()}
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True)), **state}


def assert_same_steps(
    function: Callable[[Tensor], Tensor], module: nn.Module, eager: nn.Module, x: Tensor
) -> None:
    got, expected = step(function, module, x), step(eager, eager, x)
    torch.testing.assert_close(got, expected)
    for name in ("output", "input"):
        assert got[name].stride() == expected[name].stride(), name


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch._dynamo.reset()


# --- torch.compile ------------------------------------------------------------------------------


@every_variant
@both_modes
def test_one_graph_for_every_batch_size(
    backend: Backend, kind: str, arguments: dict[str, Any], training: bool
) -> None:
    """The second size makes the batch a symbol; from then on nothing is compiled again."""
    module, eager = twins(kind, arguments, backend, training)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    sizes = inputs(kind, backend, (2, 3, 4, 7, 33))
    for x in (next(sizes), next(sizes)):
        assert_same_steps(graph, module, eager, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in sizes:
            assert_same_steps(graph, module, eager, x)


@both_modes
@pytest.mark.parametrize("place", [contiguous, channels_last], ids=["contiguous", "channels last"])
def test_every_size_a_symbol(backend: Backend, place: Callable, training: bool) -> None:
    module, eager = twins("2d", {}, backend, training)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for index, shape in enumerate([(2, C, 4, 3), (3, C, 6, 5), (7, C, 9, 8)]):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            assert_same_steps(graph, module, eager, place(torch.randn(shape)).to(backend.device))


def test_environment_is_not_guarded(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program sets for others, between two calls, is no reason to compile again."""
    graph = torch.compile(make("2d", {}, backend, True), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, C, 4, 3, device=backend.device)
    graph(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        monkeypatch.setenv("BATCHNORM_CUDA_UNRELATED", "1")
        graph(x)
        monkeypatch.delenv("BATCHNORM_CUDA_UNRELATED")
        graph(x)


def test_inductor(backend: Backend) -> None:
    net = nn.Sequential(batchnorm_cuda.BatchNorm2d(C, momentum=None), nn.SiLU())
    eager = net.to(backend.device)
    module = copy.deepcopy(eager)
    graph = torch.compile(module, fullgraph=True, dynamic=True)
    for x in inputs("2d channels last", backend, (2, 3)):
        assert_same_steps(graph, module, eager, x)


# --- torch.export -------------------------------------------------------------------------------


def exported(module: nn.Module, x: Tensor, strict: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)


@every_variant
@both_modes
def test_export(backend: Backend, kind: str, arguments: dict[str, Any], training: bool) -> None:
    """The program runs on other batch sizes, also after a round trip through a file."""
    eager = make(kind, arguments, backend, training)
    x, other = inputs(kind, backend, (2, 6))
    program = exported(copy.deepcopy(eager), x, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    before = copy.deepcopy(eager)
    for candidate in (program, torch.export.load(file)):
        module = candidate.module()
        expected = copy.deepcopy(before)
        torch.testing.assert_close(module(other), expected(other))
        torch.testing.assert_close(dict(module.state_dict()), dict(expected.state_dict()))


@both_modes
def test_strict_export(backend: Backend, training: bool) -> None:
    eager = make("2d", {}, backend, training)
    x, other = inputs("2d", backend, (2, 6))
    module = exported(copy.deepcopy(eager), x, strict=True).module()
    torch.testing.assert_close(module(other), eager(other))
    state = {name: eager.state_dict()[name] for name in module.state_dict()}  # those in use
    assert training == ("num_batches_tracked" in state)
    torch.testing.assert_close(dict(module.state_dict()), state)


def test_export_says_what_is_updated(backend: Backend) -> None:
    module = make("2d", {"momentum": None}, backend, True)
    program = exported(module, next(inputs("2d", backend, (2,))), strict=False)
    updated = program.run_decompositions().graph_signature.buffers_to_mutate.values()
    assert sorted(updated) == ["num_batches_tracked", "running_mean", "running_var"]


@every_variant
@both_modes
def test_exported_program_trains(
    backend: Backend, kind: str, arguments: dict[str, Any], training: bool
) -> None:
    eager = make(kind, arguments, backend, training)
    x, other = inputs(kind, backend, (2, 6))
    module = exported(copy.deepcopy(eager), x, strict=False).module()
    got, expected = step(module, module, other), step(eager, eager, other)
    torch.testing.assert_close(got, expected)


# --- AOTAutograd --------------------------------------------------------------------------------


@every_variant
@both_modes
def test_aot_module(backend: Backend, kind: str, arguments: dict[str, Any], training: bool) -> None:
    module, eager = twins(kind, arguments, backend, training)
    graph = aot_module(module, fw_compiler=nop, bw_compiler=nop)
    (x,) = inputs(kind, backend, (2,))
    for _ in range(2):
        torch.testing.assert_close(step(graph, module, x), step(eager, eager, x))


@both_modes
def test_aot_function(backend: Backend, training: bool) -> None:
    """All of the arguments' gradients, and the update of the running statistics."""

    def function(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return batchnorm_cuda.batch_norm(x, mean, var, weight, bias, training).square()

    (x,) = inputs("2d", backend, (3,))
    results = []
    for call in (function, aot_function(function, fw_compiler=nop, bw_compiler=nop)):
        torch.manual_seed(1)
        leaves = [x.detach().requires_grad_(), *torch.rand(2, C).to(x).requires_grad_().unbind()]
        running = [vector.clone() for vector in torch.rand(2, C).to(x)]
        output = call(*leaves, *running)
        grads = torch.autograd.grad(output, leaves, output.detach() + 1)
        results.append([output, *grads, *running])
    torch.testing.assert_close(*results)


# --- the operators, as a recorded graph calls them ----------------------------------------------


def operator_arguments(training: bool) -> dict[str, tuple]:
    """Arguments of each operator, of which all that can require a gradient do."""
    from conftest import KERNELS

    x, dy, ddx = (torch.randn(3, C, 4, 2).to(KERNELS.device).requires_grad_() for _ in range(3))
    w, b, dw, db = (torch.rand(C).to(KERNELS.device).requires_grad_() for _ in range(4))
    mean, var = torch.zeros(C).to(w), torch.ones(C).to(w)
    counter = torch.tensor(2).to(KERNELS.device)
    with torch.no_grad():
        state = (mean.clone(), var.clone())
        _, save_mean, invstd = ops.forward(x, w, b, *state, None, training, 0.1, 1e-5)
    statistics = (save_mean, invstd, training)
    return {
        "forward": (x, w, b, mean, var, counter, training, None, 1e-5),
        "backward": (dy, x, w, b, *statistics, True, True, True),
        "double_backward": (ddx, dw, db, dy, x, w, *statistics, True, True, True),
    }


@both_modes
@pytest.mark.parametrize("operator", ["forward", "backward", "double_backward"])
def test_opcheck_with_gradients(operator: str, training: bool) -> None:
    """Everything that opcheck looks at: schema, fake kernel, registration, AOTAutograd."""
    arguments = operator_arguments(training)[operator]
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if operator == "forward":  # a compiler differentiates once
        checks.append("test_aot_dispatch_dynamic")
    overload = getattr(torch.ops.batchnorm_cuda, operator).default
    torch.library.opcheck(overload, arguments, test_utils=checks)


@both_modes
@pytest.mark.parametrize("operator", ["forward", "backward"])
def test_operator_gradients(operator: str, training: bool) -> None:
    """Against the public function, to the bit: autograd through the operators."""
    arguments = operator_arguments(training)["forward"]
    x, w, b = arguments[:3]
    results = []
    for call in (torch.ops.batchnorm_cuda.forward, ops.forward):
        if call is ops.forward:
            output = batchnorm_cuda.autograd.BatchNormFunction.apply(*arguments)
        else:
            output = call(*arguments)[0]
        grads = torch.autograd.grad(output.pow(3).sum(), (x, w, b), create_graph=True)
        if operator == "backward":
            grads = torch.autograd.grad(grads[0].pow(2).sum(), (x, w))
        results.append([g.detach() for g in grads])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_operator_in_forward_mode() -> None:
    x, *rest = operator_arguments(True)["forward"]
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent)
        got, expected = (
            torch.autograd.forward_ad.unpack_dual(output).tangent
            for output in (
                torch.ops.batchnorm_cuda.forward(dual, *rest)[0],
                batchnorm_cuda.batch_norm(dual, None, None, *rest[:2], training=True),
            )
        )
    assert got is not None and torch.equal(got, expected)


# --- torch.fx -----------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, C, 3),
        nn.BatchNorm2d(C),
        nn.ReLU(),
        nn.Sequential(nn.SyncBatchNorm(C), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C, affine=False)),
        nn.Flatten(),
        nn.LazyBatchNorm1d(),
    )


def initialised(net: nn.Module, x: Tensor) -> nn.Module:
    net.eval()(x)  # the lazy layer takes its size; SyncBatchNorm of torch evaluates on the CPU
    return net


@both_modes
def test_symbolic_trace_of_a_converted_network(backend: Backend, training: bool) -> None:
    """The graph that torch.nn's network has, and it trains."""
    x = torch.randn(4, 3, 6, 6).to(backend.device)
    theirs = initialised(network().to(backend.device), x)
    ours = convert(copy.deepcopy(theirs)).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(ours))
    nodes, expected = (
        [(node.op, node.target) for node in torch.fx.symbolic_trace(net).graph.nodes]
        for net in (ours, theirs)
    )
    assert nodes == expected
    assert [node[0] for node in nodes].count("call_module") == 8
    for module in with_pickled(traced):
        twin = copy.deepcopy(ours)
        torch.testing.assert_close(step(module, module, x), step(twin, twin, x))


def test_module_that_is_not_in_the_traced_one() -> None:
    """torch.fx's own error, as for a layer of torch.nn."""
    norm = batchnorm_cuda.BatchNorm1d(C)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return norm(x)

    with pytest.raises(NameError, match="not installed as a submodule"):
        torch.fx.symbolic_trace(Outer())


@both_modes
def test_symbolic_trace_of_the_function(backend: Backend, training: bool) -> None:
    module = make("functional", {}, backend, training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(module))
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [
        batchnorm_cuda.batch_norm
    ]
    (x,) = inputs("functional", backend, (3,))
    for graph in with_pickled(traced):
        twin = copy.deepcopy(module)
        torch.testing.assert_close(step(graph, graph, x), step(twin, twin, x))


@pytest.mark.parametrize("place", ["input", "weight"])
def test_torch_function(backend: Backend, place: str) -> None:
    """Tensor subclasses see the function, wherever they come, as they see torch's."""
    arguments = {"input": torch.randn(4, C).to(backend.device), "running_mean": None}
    arguments |= {"running_var": None, "weight": torch.rand(C).to(backend.device)}
    expected = batchnorm_cuda.batch_norm(**arguments, training=True)
    arguments[place] = arguments[place].as_subclass(Seen)
    results = []
    for function in (batchnorm_cuda.batch_norm, F.batch_norm):
        Seen.calls.clear()
        output = function(**arguments, training=True)
        assert function in Seen.calls
        results.append(output)
    assert [type(output) for output in results] == [Seen, Seen]
    assert torch.equal(results[0].as_subclass(Tensor), expected)


# --- torch.jit.trace ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["1d without length", "2d", "2d channels last"])
@both_modes
def test_jit_trace_without_warnings(kernels: Backend, kind: str, training: bool) -> None:
    """No size of the example is taken for a constant: another batch size goes through."""
    assert_traced(kernels, kind, training)


@pytest.mark.parametrize("kind", ["1d without length", "2d", "2d channels last"])
def test_jit_trace_of_the_composite(aten: Backend, kind: str) -> None:
    """In eval mode. Of a training batch, the number of values is a constant, with a warning."""
    assert_traced(aten, kind, False)


def assert_traced(backend: Backend, kind: str, training: bool) -> None:
    module = make(kind, {}, backend, training)
    x, other = inputs(kind, backend, (2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, x, check_trace=False)
    for _ in range(2):
        twin = copy.deepcopy(module)
        torch.testing.assert_close(step(traced, module, other), step(twin, twin, other))


def test_compiled_autograd(kernels: Backend) -> None:
    """The backward's graph as a compiler takes it, with the extension's node in it."""
    torch.compiler.reset()
    module = batchnorm_cuda.BatchNorm2d(3, activation="relu").to(kernels.device)
    x, residual, dy = (torch.randn(4, 3, 5, 5).to(kernels.device) for _ in range(3))
    leaves = [x.requires_grad_(), residual.requires_grad_(), module.weight, module.bias]
    expected = torch.autograd.grad(module(x, residual), leaves, dy)
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        module(x, residual).backward(dy)
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), expected)
