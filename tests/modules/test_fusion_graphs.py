"""Fused models in recorded graphs: torch.compile, torch.export, torch.fx, torch.jit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import fusion_models
import pytest
import torch
from conftest import Backend
from fusion_models import AWKWARD, FUSED, Model
from test_fusion import TIGHT, inputs, pair, step
from torch import Tensor, fx, nn

import batchnorm_cuda
from batchnorm_cuda import convert, fusion_report
from batchnorm_cuda._fusion.forecast import Found, Fusion
from batchnorm_cuda._fusion.pending import Pending

fuses = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)  # see `pending`
graphs_fuse = pytest.mark.skipif(not fuses, reason="graphs of this torch are not fused")
# They break the graph by themselves.
BREAKS = {
    fusion_models.branch_on_data,
    fusion_models.branch_on_the_input,
    fusion_models.reentrant_checkpoint_ends_between,
}
if not fuses:  # hooks within a graph need compiled autograd
    BREAKS.add(fusion_models.hook_on_the_output)
# Compiling takes a third of a second. Those that are fused are compiled below.
COMPILED = [behind for behind in AWKWARD if behind not in BREAKS and behind not in FUSED]


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch._dynamo.reset()


class Recorder:
    """A backend that keeps the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs.append(graph)
        return graph

    def functions(self) -> set[str]:
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return {n.target if isinstance(n.target, str) else n.target.__name__ for n in nodes}


IN_TRAINING = [pytest.param(behind, True, id=behind.__name__) for behind in COMPILED]
IN_TRAINING.append(pytest.param(fusion_models.added, True, id="added"))
IN_EVALUATION = [
    pytest.param(behind, False, id=f"eval-{behind.__name__}")
    for behind in (fusion_models.added, fusion_models.training_mode_only, fusion_models.unused)
]


@pytest.mark.parametrize(("behind", "training"), [*IN_TRAINING, *IN_EVALUATION])
def test_compiled_as_a_whole(aten: Backend, behind: Callable, training: bool) -> None:
    theirs, ours = pair(behind, aten, training)
    # A checkpoint needs a backend that knows it, and does not update statistics twice then.
    checkpoints = "checkpoint" in behind.__name__
    backend = "aot_eager" if checkpoints else "eager"
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    expected = torch.compile(theirs, backend=backend, fullgraph=True) if checkpoints else theirs
    for x in inputs(aten, 2):
        want = step(expected, theirs, x, True)
        got = step(compiled, ours, x, True)
        assert all(type(value) is Tensor for value in got.values())
        torch.testing.assert_close(got, want, **TIGHT)


@graphs_fuse
@pytest.mark.parametrize("behind", FUSED, ids=lambda f: f.__name__)
def test_fused_in_the_graph(kernels: Backend, behind: Callable) -> None:
    """With the operators of the kernels: none is left for what stands behind."""
    theirs, ours = pair(behind, kernels)
    recorder = Recorder()
    x = next(inputs(kernels))
    with torch.no_grad():
        got = torch.compile(ours, backend=recorder, fullgraph=True)(x * 1)
        torch.testing.assert_close(got, theirs(x * 1), **TIGHT)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **TIGHT)
    assert len(recorder.graphs) == 1
    called = recorder.functions()
    assert "fused_forward.default" in called or "fused_forward" in called
    assert not called & {"relu", "relu_"}


@graphs_fuse
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.25), nn.ReLU6()], ids=str)
def test_other_activations_in_the_graph(kernels: Backend, activation: nn.Module) -> None:
    theirs = nn.Sequential(nn.BatchNorm2d(4), activation).to(kernels.device, torch.float64)
    ours = convert(copy.deepcopy(theirs), fuse=True)
    recorder = Recorder()
    compiled = torch.compile(ours, backend=recorder, fullgraph=True)
    x = 8 * next(inputs(kernels))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), theirs(x), **TIGHT)
    assert not recorder.functions() & {"leaky_relu", "relu6", "hardtanh"}


@graphs_fuse
def test_aot(kernels: Backend) -> None:
    """Two training steps through AOTAutograd."""
    theirs, ours = pair(fusion_models.added_later, kernels)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for x in inputs(kernels, 2):
        torch.testing.assert_close(
            step(compiled, ours, x, True), step(theirs, theirs, x, True), **TIGHT
        )


def test_a_graph_break_in_between(aten: Backend) -> None:
    """What waits leaves one compiled region and enters another."""

    def broken(m: Model, y: Tensor, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        y = y + x
        torch._dynamo.graph_break()
        return m.relu(y)

    theirs, ours = pair(broken, aten)
    assert fusion_report(ours).fused
    compiled = torch.compile(ours, backend="aot_eager")
    for x in inputs(aten):
        torch.testing.assert_close(
            step(compiled, ours, x, True), step(theirs, theirs, x, True), **TIGHT
        )


def test_as_an_argument_of_a_batch_norm(aten: Backend) -> None:
    """Against the forecast."""

    def chained(m: Model, y: Tensor, x: Tensor) -> Tensor:
        return m.bn(m.bn(y), m.bn(x))

    theirs, ours = pair(chained, aten)
    convert(theirs)
    ours.bn._fusion = Fusion(Found(True, "relu"), Found(True, "relu"))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = next(inputs(aten))
    torch.testing.assert_close(
        step(compiled, ours, x, True), step(theirs, theirs, x, True), **TIGHT
    )


@pytest.mark.parametrize("part", ["bn", "relu"])
def test_a_compiled_part(aten: Backend, part: str) -> None:
    theirs, ours = pair(fusion_models.module, aten)
    ours.get_submodule(part).compile(backend="aot_eager")
    for x in inputs(aten):
        torch.testing.assert_close(
            step(ours, ours, x, True), step(theirs, theirs, x, True), **TIGHT
        )


def test_converted_after_compiling(aten: Backend) -> None:
    theirs, _ = pair(fusion_models.added, aten)
    ours = copy.deepcopy(theirs)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = next(inputs(aten))
    step(compiled, ours, x, True)
    ours.load_state_dict(theirs.state_dict())
    convert(compiled, fuse=True)
    assert fusion_report(compiled).batch_norms[0].training == "add, relu"
    torch.testing.assert_close(
        step(compiled, ours, x, True), step(theirs, theirs, x, True), **TIGHT
    )


def test_symbolic_trace_keeps_batch_norms_as_leaves(aten: Backend) -> None:
    _, ours = pair(fusion_models.added, aten)
    graph = fx.symbolic_trace(ours)
    assert [node.target for node in graph.graph.nodes if node.target == "bn"] == ["bn"]
    x = next(inputs(aten))
    torch.testing.assert_close(graph(x), ours(x), **TIGHT)


@pytest.mark.parametrize("strict", [True, False])
def test_export(aten: Backend, strict: bool) -> None:
    theirs, ours = pair(fusion_models.added, aten, training=False)
    x = next(inputs(aten))
    program = torch.export.export(ours, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), theirs(x), **TIGHT)


def test_jit_trace(aten: Backend) -> None:
    theirs, ours = pair(fusion_models.added, aten, training=False)
    x = next(inputs(aten))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, x)
    torch.testing.assert_close(traced(x), theirs(x), **TIGHT)


def test_fake_tensors_do_not_wait(aten: Backend) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), fuse=True)
        y: Any = model[0](torch.randn(2, 3, 4, 4))
    assert type(y) is not Pending and type(model[0]) is batchnorm_cuda.BatchNorm2d
