"""What torch sees of the operators: schema, fake kernels, torch.compile; and which backend runs."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from cases import Case, contiguous, fill, fill_parameters
from conftest import ATEN, KERNELS, Backend
from parametrisations import both_modes, every_layout
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import batchnorm_cuda
from batchnorm_cuda._ops import operators as ops

DTYPES = [torch.bfloat16, torch.float64]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "double"])


def forward_arguments(
    layout, dtype: torch.dtype, training: bool, device: str = KERNELS.device
) -> tuple:
    x = fill(Case((2, 5, 4, 3), "small", layout), dtype, device)
    p = fill_parameters(5, torch.float32, device)
    return (x, p.weight, p.bias, p.running_mean, p.running_var, None, training, 0.1, 1e-5)


def backward_arguments(layout, dtype: torch.dtype, training: bool) -> tuple:
    arguments = forward_arguments(layout, dtype, training)
    x, weight, bias = arguments[:3]
    _, save_mean, save_invstd = ops.forward(*arguments)
    return (torch.randn_like(x), x, weight, bias, save_mean, save_invstd, training)


OPCHECK = ("test_schema", "test_faketensor")


@every_dtype
@every_layout
@both_modes
def test_opcheck_forward(layout, dtype: torch.dtype, training: bool) -> None:
    """Nothing is mutated that the schema does not say, and the fake kernel tells the truth."""
    arguments = forward_arguments(layout, dtype, training)
    torch.library.opcheck(torch.ops.batchnorm_cuda.forward.default, arguments, test_utils=OPCHECK)


@both_modes
@pytest.mark.parametrize("momentum", [0.1, None])
def test_opcheck_forward_with_counter(training: bool, momentum: float | None) -> None:
    x, weight, bias, mean, var, *_, eps = forward_arguments(contiguous, torch.float32, training)
    counter = torch.tensor(3, device=x.device)
    torch.library.opcheck(
        torch.ops.batchnorm_cuda.forward.default,
        (x, weight, bias, mean, var, counter, training, momentum, eps),
    )


@every_layout
@both_modes
@pytest.mark.parametrize(
    "needed", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)]
)
def test_opcheck_backward(layout, training: bool, needed: tuple[bool, ...]) -> None:
    arguments = backward_arguments(layout, torch.bfloat16, training)
    torch.library.opcheck(
        torch.ops.batchnorm_cuda.backward.default, (*arguments, *needed), test_utils=OPCHECK
    )


@every_layout
@both_modes
def test_dispatcher_and_direct_call_agree(layout, training: bool) -> None:
    """The two ways into the kernels: same results, same update of the running statistics."""
    direct, dispatched = (
        forward_arguments(layout, torch.float32, training) for _ in range(2) if seeded()
    )
    results = ops.forward(*direct), torch.ops.batchnorm_cuda.forward(*dispatched)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(direct[3], dispatched[3])
    assert torch.equal(direct[4], dispatched[4])


def seeded() -> bool:
    torch.manual_seed(3)
    return True


@both_modes
def test_version_counters(backend: Backend, training: bool) -> None:
    """Autograd must see the in-place update: a graph that saved the buffer is stale after it."""
    x, weight, bias, mean, var, *_ = forward_arguments(
        contiguous, torch.float32, training, backend.device
    )
    scale = torch.ones(5, device=x.device, requires_grad=True)
    product = scale * mean
    batchnorm_cuda.batch_norm(x, mean, var, weight, bias, training)
    if training:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
    else:
        product.sum().backward()


def test_fake_tensors_run_no_kernel(backend: Backend) -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(2, 5, 4, 3).to(backend.device)).requires_grad_()
        mean, var = (mode.from_tensor(torch.ones(5).to(backend.device)) for _ in range(2))
        output = batchnorm_cuda.batch_norm(x, mean, var, training=True)
        assert type(output) is type(x)
        output.sum().backward()
        assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("momentum", [0.1, None])
@both_modes
def test_compile_without_graph_breaks(
    backend: Backend, momentum: float | None, training: bool
) -> None:
    """One graph, with the results, gradients and state of eager."""
    torch._dynamo.reset()
    eager = batchnorm_cuda.BatchNorm2d(5, momentum=momentum).to(backend.device).train(training)
    compiled = copy.deepcopy(eager)
    graph = torch.compile(lambda x: compiled(x).relu(), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 4, 3).to(backend.device)
    dy = torch.randn(x.shape).to(backend.device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for _ in range(2):
        outputs = [eager(leaves[0]).relu(), graph(leaves[1])]
    for output in outputs:
        output.backward(dy)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    torch.testing.assert_close(compiled.weight.grad, eager.weight.grad)
    torch.testing.assert_close(dict(compiled.state_dict()), dict(eager.state_dict()))


def test_compile_for_inference(backend: Backend) -> None:
    torch._dynamo.reset()
    module = batchnorm_cuda.BatchNorm2d(5).to(backend.device).eval()
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 4, 3).to(backend.device)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), module(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_jit_trace_records_the_operator(kernels: Backend) -> None:
    """A traced graph must hold the operator, not the values of one run."""
    module = batchnorm_cuda.BatchNorm2d(5).to(kernels.device).eval()
    first, second = (torch.randn(2, 5, 4, 3).to(kernels.device) for _ in range(2))
    with torch.no_grad():
        traced = torch.jit.trace(module, first)
        torch.testing.assert_close(traced(second), module(second))


def test_make_fx_records_the_operator(kernels: Backend) -> None:
    """The same for tracing by a dispatch mode, which sees real tensors."""
    mean, var = torch.zeros(5, device=kernels.device), torch.ones(5, device=kernels.device)
    x = torch.randn(2, 5, 4).to(kernels.device)
    with torch.no_grad():
        graph = make_fx(lambda x: batchnorm_cuda.batch_norm(x, mean, var))(x)
    targets = [node.target for node in graph.graph.nodes]
    assert torch.ops.batchnorm_cuda.forward.default in targets


def test_no_function_without_gradients(kernels: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients disabled, inference does not pay for a node that nobody uses."""

    def refuse(*_: object) -> None:
        raise AssertionError("the autograd Function was applied")

    monkeypatch.setattr(batchnorm_cuda.BatchNormFunction, "apply", refuse)
    x = torch.randn(2, 5, 4).to(kernels.device)
    with torch.no_grad():
        batchnorm_cuda.batch_norm(x, None, None, training=True)


def test_gradient_modes_agree(backend: Backend) -> None:
    x, weight, bias, mean, var, *_ = forward_arguments(
        contiguous, torch.float32, False, backend.device
    )
    x.requires_grad_()
    with_grad = batchnorm_cuda.batch_norm(x, mean, var, weight, bias)
    with torch.no_grad():
        without = batchnorm_cuda.batch_norm(x, mean, var, weight, bias)
    with torch.inference_mode():
        inference = batchnorm_cuda.batch_norm(x, mean, var, weight, bias)
    assert with_grad.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_grad, without)
    assert torch.equal(with_grad, inference)


def test_inference_mode_updates_statistics(backend: Backend) -> None:
    """Training under inference_mode: nothing to differentiate, statistics move all the same."""
    x, weight, bias, mean, var, *_ = forward_arguments(
        contiguous, torch.float32, True, backend.device
    )
    expected = 0.9 * mean + 0.1 * x.mean((0, 2, 3))
    with torch.inference_mode():
        batchnorm_cuda.batch_norm(x, mean, var, weight, bias, training=True)
    torch.testing.assert_close(mean, expected)


def test_backend_for(backend: Backend) -> None:
    assert batchnorm_cuda.backend_for(torch.empty(0, device=backend.device)) == backend.name


def test_backend_for_other_devices(kernels: Backend) -> None:
    """Emulation is of CPU tensors only; whatever has no kernels takes the composite, and runs."""
    x = torch.empty(2, 3, 4, device="meta")
    assert batchnorm_cuda.backend_for(x) == ATEN.name
    assert batchnorm_cuda.batch_norm(x, None, None, training=True).shape == x.shape


@pytest.mark.parametrize("value", ["", "0", "no"])
def test_emulation_must_be_asked_for(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("BATCHNORM_CUDA_EMULATE", value)
    assert batchnorm_cuda.backend_for(torch.empty(0)) == "aten"


def test_signature_is_torchs() -> None:
    """What is added to it goes by keyword only, and is absent unless given."""
    ours = list(inspect.signature(batchnorm_cuda.batch_norm).parameters.values())
    torchs = inspect.signature(F.batch_norm).parameters.values()
    added = [p for p in ours if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in added] == [("residual", None), ("activation", None)]
    assert [(p.name, p.default, p.kind) for p in ours if p not in added] == [
        (p.name, p.default, p.kind) for p in torchs
    ]


def test_public_names() -> None:
    assert all(hasattr(batchnorm_cuda, name) for name in batchnorm_cuda.__all__)
    documented = [getattr(batchnorm_cuda, name) for name in batchnorm_cuda.__all__]
    assert all(inspect.getdoc(item) for item in documented)


def other_stream_result(x: Tensor, module: torch.nn.Module) -> Tensor:
    """The output computed on a side stream that is kept busy first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        doubled = x * 2
        output = module(doubled)
        result = output + 1
    torch.cuda.current_stream().wait_stream(stream)
    return result


@pytest.mark.gpu
def test_current_stream_is_used() -> None:
    """Kernels on another stream than the current would read x * 2 before it is there."""
    module = batchnorm_cuda.BatchNorm2d(16).cuda().train()
    x = torch.randn(8, 16, 32, 32, device="cuda")
    expected = torch.nn.BatchNorm2d(16).cuda()(x * 2) + 1
    torch.testing.assert_close(other_stream_result(x, module), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_device_of_the_input_is_used() -> None:
    """The current device may be another; with one GPU, it is the same and must stay so."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    module = batchnorm_cuda.BatchNorm2d(16).to(device)
    x = torch.randn(4, 16, 8, 8, device=device, requires_grad=True)
    with torch.cuda.device(0):
        output = module(x)
        output.sum().backward()
        assert torch.cuda.current_device() == 0
    assert output.device == x.grad.device == device
    expected = torch.nn.BatchNorm2d(16).to(device)(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_cuda_graph_replays() -> None:
    """Capture holds no host synchronisation, and replays update the statistics each time."""
    module = batchnorm_cuda.BatchNorm2d(16, momentum=None).cuda().train()
    x = torch.randn(4, 16, 8, 8, device="cuda")
    module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(x)
    for _ in range(3):
        x.copy_(torch.randn(x.shape, device="cuda"))
        graph.replay()
        expected = torch.nn.functional.batch_norm(x, None, None, training=True)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert int(module.num_batches_tracked) == 4
