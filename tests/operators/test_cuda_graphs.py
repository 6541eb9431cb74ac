"""CUDA graphs, streams and devices; and, without a GPU, that nothing of a step waits for one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from cases import channels_last, contiguous
from conftest import NO_GPU, Backend
from parametrisations import both_modes
from strategies import FORCED
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import batchnorm_cuda

C = 24
SHAPES = {contiguous: (8, C, 20, 28), channels_last: (4, C, 15, 15)}
every_strategy = pytest.mark.parametrize("strategy", FORCED)
every_place = pytest.mark.parametrize(
    "place", [contiguous, channels_last], ids=["contiguous", "channels last"]
)
both_momenta = pytest.mark.parametrize("momentum", [0.1, None])
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"{NO_GPU} beside the first")


def tensors(device: str | torch.device, place: Callable = contiguous) -> tuple[Tensor, Tensor]:
    """x, a leaf that requires a gradient, and dy."""
    x, dy = (place(torch.randn(SHAPES[place])).to(device) for _ in range(2))
    return x.requires_grad_(), dy


def make(device: str | torch.device, momentum: float | None = 0.1) -> nn.Module:
    return batchnorm_cuda.BatchNorm2d(C, momentum=momentum).to(device)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    output = module(x)
    return [output.detach(), *torch.autograd.grad(output, [x, *module.parameters()], dy)]


def penalised_step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The gradients of a gradient penalty, through the double backward."""
    (grad,) = torch.autograd.grad(module(x), x, dy, create_graph=True)
    return list(torch.autograd.grad(grad.square().sum(), [x, module.weight]))


STEPS = {"step": step, "penalised": penalised_step}
every_step = pytest.mark.parametrize("run", STEPS.values(), ids=STEPS)


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def assert_same_state(module: nn.Module, expected: nn.Module) -> None:
    assert_equal(list(module.state_dict().values()), list(expected.state_dict().values()))


# --- what can be rehearsed anywhere -------------------------------------------------------------


@every_step
@both_momenta
@both_modes
def test_a_step_allocates_and_launches(
    kernels: Backend, run: Callable, momentum: float | None, training: bool
) -> None:
    """It reads nothing back, copies nothing and has no operator of torch's launch a kernel."""
    module = make(kernels.device, momentum).train(training)
    x, dy = tensors(kernels.device)
    run(module, x, dy)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run(module, x, dy)
    names = {event.name for event in record.events() if event.name.startswith("aten::")}
    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    assert "aten::empty_like" in names and not names & waiting
    if run is step:  # the other has operators of the test's own
        working = {"aten::add_", "aten::add", "aten::zero_", "aten::fill_", "aten::reciprocal"}
        assert not names & (working | {"aten::copy_", "aten::to", "aten::clone"})


# --- graphs -------------------------------------------------------------------------------------


def capture(run: Callable, module: nn.Module, x: Tensor, dy: Tensor) -> tuple:
    """The graph of a step, after steps on a side stream, as torch.cuda.graph wants them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(module, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(module, x, dy)
    return graph, results


def refill(x: Tensor) -> None:
    with torch.no_grad():
        x.copy_(torch.randn(x.shape).to(x))


@pytest.mark.gpu
@every_strategy
@every_place
@both_momenta
def test_replays_are_steps(
    plan_options: Callable, strategy: str, place: Callable, momentum: float | None
) -> None:
    """Each replay gives the bits of an eager step on the new input, the running state included."""
    plan_options(FORCED[strategy])
    module = make("cuda", momentum)
    x, dy = tensors("cuda", place)
    graph, results = capture(step, module, x, dy)
    eager = copy.deepcopy(module)
    for _ in range(3):
        refill(x)
        graph.replay()
        assert_equal(results, step(eager, x, dy))
        assert_same_state(module, eager)


@pytest.mark.gpu
@both_modes
def test_double_backward_replays(training: bool) -> None:
    module = make("cuda").train(training)
    x, dy = tensors("cuda")
    graph, results = capture(penalised_step, module, x, dy)
    eager = copy.deepcopy(module)
    for _ in range(2):
        refill(x)
        graph.replay()
        assert_equal(results, penalised_step(eager, x, dy))


@pytest.mark.gpu
@every_strategy
def test_graphs_on_two_streams(plan_options: Callable, strategy: str) -> None:
    """Two graphs at once do not share the words by which the blocks of a launch wait."""
    plan_options(FORCED[strategy])
    modules = [make("cuda") for _ in range(2)]
    inputs = [tensors("cuda") for _ in modules]
    graphs = [capture(step, m, *given) for m, given in zip(modules, inputs, strict=True)]
    eager = copy.deepcopy(modules)
    streams = [torch.cuda.Stream() for _ in modules]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, results), module, expected, given in zip(graphs, modules, eager, inputs, strict=True):
        for _ in range(20):
            wanted = step(expected, *given)
        assert_equal(results, wanted)
        assert_same_state(module, expected)


@pytest.mark.gpu
@both_momenta
def test_graphed_callable(momentum: float | None) -> None:
    """torch's own way to graph a module for training, forward and backward."""
    module = nn.Sequential(make("cuda", momentum), nn.SiLU())
    eager = copy.deepcopy(module)
    x, _ = tensors("cuda")
    graphed = torch.cuda.make_graphed_callables(module, (x.detach().clone().requires_grad_(),))
    module.load_state_dict(eager.state_dict())  # its warm-up has counted, too
    for _ in range(3):
        refill(x)
        results = []
        for net in (graphed, eager):
            output = net(x)
            wanted = [x, *net.parameters()]
            results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
        torch.testing.assert_close(*results)
    torch.testing.assert_close(dict(module.state_dict()), dict(eager.state_dict()))


@pytest.mark.gpu
@every_step
@every_strategy
@both_modes
def test_the_host_does_not_wait(
    plan_options: Callable, run: Callable, strategy: str, training: bool
) -> None:
    plan_options(FORCED[strategy])
    module = make("cuda", None).train(training)
    x, dy = tensors("cuda")
    run(module, x, dy)  # the first call queries the device and loads the kernels
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(module, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode(before)


# --- streams ------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_strategy
@every_place
def test_streams_do_not_disturb_each_other(
    plan_options: Callable, strategy: str, place: Callable
) -> None:
    """Several modules train at once, each on its own stream; the bits are those of one by one."""
    plan_options(FORCED[strategy])
    modules = [make("cuda") for _ in range(4)]
    eager = copy.deepcopy(modules)
    inputs = [tensors("cuda", place) for _ in modules]
    streams = [torch.cuda.Stream() for _ in modules]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in modules]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i] = step(modules[i], *inputs[i])
    torch.cuda.synchronize()
    for module, expected, given, got in zip(modules, eager, inputs, results, strict=True):
        for _ in range(10):
            wanted = step(expected, *given)
        assert_equal(got, wanted)
        assert_same_state(module, expected)


@pytest.mark.gpu
def test_module_moves_from_stream_to_stream() -> None:
    """With the streams in order the memory of one call, freed on one, is safe to use again."""
    module, eager = (m := make("cuda")), copy.deepcopy(m)
    x, dy = tensors("cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    previous = torch.cuda.current_stream()
    for stream in (*streams, *streams):
        stream.wait_stream(previous)
        with torch.cuda.stream(stream):
            results = step(module, x, dy)
        previous = stream
    torch.cuda.current_stream().wait_stream(previous)
    for _ in range(6):
        wanted = step(eager, x, dy)
    torch.cuda.synchronize()
    assert_equal(results, wanted)
    assert_same_state(module, eager)


# --- devices ------------------------------------------------------------------------------------


@pytest.mark.gpu
@two_gpus
@every_strategy
def test_every_device_while_another_is_current(plan_options: Callable, strategy: str) -> None:
    plan_options(FORCED[strategy])
    module = make("cuda:0")
    x, dy = tensors("cuda:0")
    start = copy.deepcopy(module)
    expected = step(module, x, dy)
    for index in range(1, torch.cuda.device_count()):
        there = torch.device("cuda", index)
        moved = copy.deepcopy(start).to(there)
        leaf = x.detach().to(there).requires_grad_()
        with torch.cuda.device(0):
            got = step(moved, leaf, dy.to(there))
            assert torch.cuda.current_device() == 0
        assert all(result.device == there for result in got)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@two_gpus
def test_devices_at_once() -> None:
    """A thread a device, as data parallelism in one process has it."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    modules, inputs = [make(d) for d in devices], [tensors(d) for d in devices]
    alone = copy.deepcopy(modules)
    results: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        for _ in range(10):
            results[index] = step(modules[index], *inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, module in enumerate(alone):
        for _ in range(10):
            expected = step(module, *inputs[index])
        assert_equal(results[index], expected)
        assert_same_state(modules[index], module)


@pytest.mark.gpu
@two_gpus
def test_tensors_on_two_devices() -> None:
    x, _ = tensors("cuda:1")
    module = make("cuda:0")
    with pytest.raises(RuntimeError, match="expected weight to be on cuda:1, the device of input"):
        module(x)
    assert int(module.num_batches_tracked) == 0
