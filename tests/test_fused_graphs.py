"""Fused batch norm in recorded graphs and under transforms: operators, torch.compile, torch.export,
torch.fx, torch.jit, torch.func."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import fused
import pytest
import torch
from cases import (
    Case,
    Parameters,
    channels_last,
    contiguous,
    expanded,
    fill,
    fill_parameters,
    permuted,
    spatial_slice,
)
from conftest import KERNELS, Backend
from fused import FORMS, both_modes, every_form, extras
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap

import batchnorm_cuda
from batchnorm_cuda import batch_norm, fused_ops, sync_ops

C = 5
operators = torch.ops.batchnorm_cuda


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch._dynamo.reset()


# --- operators ----------------------------------------------------------------------------------

LAYOUTS = [contiguous, channels_last, permuted, spatial_slice, expanded]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])


def forward_arguments(
    layout: Callable, dtype: torch.dtype, form: str, training: bool, need_mask: bool
) -> tuple:
    x, residual = (fill(Case((2, C, 4, 3), "small", layout), dtype, KERNELS.device) for _ in "xr")
    p = fill_parameters(C, torch.float64 if dtype == torch.float64 else torch.float32, x.device)
    added, relu = FORMS[form]
    tensors = (x, p.weight, p.bias, p.running_mean, p.running_var, None)
    return (*tensors, residual if added else None, relu, need_mask, training, 0.1, 1e-5)


@every_layout
@every_dtype
@every_form
def test_opcheck_forward(layout: Callable, dtype: torch.dtype, form: str) -> None:
    for need_mask in {False, FORMS[form][1]}:
        arguments = forward_arguments(layout, dtype, form, True, need_mask)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators.fused_forward.default, arguments, test_utils=tests)


@every_form
@both_modes
def test_opcheck_forward_with_gradients(form: str, training: bool) -> None:
    x, weight, bias, mean, var, _, residual, *rest = forward_arguments(
        contiguous, torch.float64, form, training, FORMS[form][1]
    )
    for tensor in (x, weight, bias, residual):
        if tensor is not None:
            tensor.requires_grad_()
    counter = torch.tensor(2).to(x.device)
    arguments = (x, weight, bias, mean, var, counter, residual, *rest)
    torch.library.opcheck(operators.fused_forward.default, arguments)


def backward_arguments(layout: Callable, dtype: torch.dtype, training: bool) -> tuple:
    arguments = forward_arguments(layout, dtype, "residual and relu", training, True)
    x, weight, bias, *_ = arguments
    _, mean, invstd, mask = fused_ops.fused_forward(*arguments)
    return torch.randn_like(x), x, weight, bias, mean, invstd, mask, training


@every_layout
@both_modes
@pytest.mark.parametrize(
    "needed",
    [
        (True, True, True, True),
        (True, False, False, False),
        (False, True, True, False),
        (False, False, False, True),
        (False, False, True, True),
    ],
)
def test_opcheck_backward(layout: Callable, training: bool, needed: tuple[bool, ...]) -> None:
    arguments = (*backward_arguments(layout, torch.bfloat16, training), *needed)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operators.fused_backward.default, arguments, test_utils=tests)


@both_modes
def test_dispatcher_and_direct_call_agree(training: bool) -> None:
    """The two ways into the kernels, forward and backward."""
    results = []
    for direct in (True, False):
        torch.manual_seed(3)
        arguments = forward_arguments(contiguous, torch.float32, "relu", training, True)
        call = fused_ops.fused_forward if direct else operators.fused_forward
        forward = call(*arguments)
        torch.manual_seed(4)
        backward = backward_arguments(channels_last, torch.float32, training)
        call = fused_ops.fused_backward if direct else operators.fused_backward
        results.append([*forward[:3], *arguments[3:5], *call(*backward, *(True,) * 4)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("operator", ["forward", "reduce", "elementwise", "residual only"])
def test_opcheck_synchronised(backend: Backend, operator: str) -> None:
    x = torch.randn(3, 4, 5, 2).to(memory_format=torch.channels_last).to(backend.device)
    w, b, mean, var = torch.rand(4, 4).to(backend.device).unbind()
    running = mean.clone(), var.clone()
    row = sync_ops.sync_statistics(x)
    rows, sums = torch.stack([row, row]), torch.randn(2, 4).to(backend.device)
    count = torch.tensor([60]).to(backend.device)
    before = (x, w, b, *running, None, rows, x.clone())
    *_, mask = sync_ops.sync_fused_forward(*before, True, True, 0.1, 1e-5)
    elementwise = (x.contiguous(), x, w, mean, var, sums, count, mask)
    calls = {
        "forward": [
            (operators.sync_fused_forward, (*before, True, True, 0.1, 1e-5)),
            (operators.sync_fused_forward, (*before, True, False, 0.1, 1e-5)),
        ],
        "reduce": [
            (operators.sync_fused_backward_reduce, (x, x, w, b, mean, var, mask, True, True)),
            (operators.sync_fused_backward_reduce, (x, x, w, b, mean, var, mask, False, True)),
        ],
        "elementwise": [(operators.sync_fused_backward_elementwise, (*elementwise, True, True))],
        "residual only": [(operators.sync_fused_backward_elementwise, (*elementwise, False, True))],
    }
    for operator_packet, arguments in calls[operator]:
        torch.library.opcheck(operator_packet.default, arguments)


def test_fake_tensors_run_no_kernel(backend: Backend) -> None:
    with FakeTensorMode() as mode:
        x, r = (mode.from_tensor(torch.randn(2, C, 4).to(backend.device)) for _ in "xr")
        output = batch_norm(
            x.requires_grad_(), None, None, training=True, residual=r, activation="relu"
        )
        assert type(output) is type(x)
        output.sum().backward()
        assert x.grad.stride() == x.stride()


# --- networks -----------------------------------------------------------------------------------


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
    for module in (traced, pickle.loads(pickle.dumps(traced))):
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


class Seen(Tensor):
    """Records the functions that are called with it."""

    calls: ClassVar[list[Callable]] = []

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


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


# --- transforms ---------------------------------------------------------------------------------


def per_example(call: Callable, form: str) -> Callable:
    """Training mode without running statistics, of one example."""

    def function(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return call(x, Parameters(weight, None, None, None), True, **extras(form, residual))

    return function


def tensors(backend: Backend, *batch: int) -> tuple[Tensor, ...]:
    """x, residual, weight in float64; the first two with batch dimensions in front."""
    shapes = ((*batch, 3, C, 4), (*batch, 3, C, 4), (C,))
    return tuple(torch.randn(s, dtype=torch.float64).to(backend.device) for s in shapes)


@every_form
@pytest.mark.parametrize("in_dims", [(0, 0, None), (0, None, None), (None, 0, None)], ids=str)
def test_vmap(backend: Backend, form: str, in_dims: tuple) -> None:
    given = [
        t if dim == 0 or index == 2 else t[0]
        for index, (t, dim) in enumerate(zip(tensors(backend, 2), in_dims, strict=True))
    ]
    results = [vmap(per_example(f, form), in_dims)(*given) for f in (fused.ours, fused.torchs)]
    torch.testing.assert_close(*results)


@every_form
def test_gradients_under_transforms(backend: Backend, form: str) -> None:
    """grad, vmap of grad, grad of grad, and jvp, as of torch's operators."""

    def results(call: Callable) -> list[Any]:
        function = per_example(call, form)

        def loss(*arguments: Tensor) -> Tensor:
            return function(*arguments).pow(3).sum()

        def penalty(*arguments: Tensor) -> Tensor:
            return grad(loss)(*arguments).square().sum()

        one, several = tensors(backend), tensors(backend, 2)
        tangents = tensors(backend)
        return [
            grad(loss, (0, 1, 2))(*one),
            grad(penalty, (0, 1, 2))(*one),
            vmap(grad(loss, (0, 1)), (0, 0, None))(*several),
            jvp(function, one, tangents),
        ]

    outcomes = []
    for call in (fused.ours, fused.torchs):
        torch.manual_seed(0)
        outcomes.append(results(call))
    torch.testing.assert_close(*outcomes)


def test_refused_residual_under_transforms(backend: Backend) -> None:
    x, residual, weight = tensors(backend, 2)
    function = per_example(fused.ours, "residual and relu")
    with pytest.raises(ValueError, match="expected residual to have shape"):
        vmap(function, (0, 0, None))(x, residual[:, :1], weight)


def test_functional_call_updates_what_it_is_given(backend: Backend) -> None:
    module = batchnorm_cuda.BatchNorm1d(C, activation="relu").to(backend.device, torch.float64)
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    x, residual, _ = tensors(backend)

    def loss(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        return functional_call(module, {**state, "weight": weight}, (x, residual)).sum()

    got = grad(loss)(state["weight"], state)
    output = module(x, residual)
    (expected,) = torch.autograd.grad(output.sum(), module.weight)
    torch.testing.assert_close(got, expected)


@both_modes
def test_operators_under_vmap(kernels: Backend, training: bool) -> None:
    """As a program that torch.export has made meets them: forward and backward, example by example.

    The mask is each example's own.
    """
    x, residual, weight = tensors(kernels, 2)
    state = torch.rand(2, C, dtype=x.dtype).to(x.device) + 0.5

    def forward(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        running = (None, None) if training else state
        arguments = (x, weight, None, *running, None, residual, True, True, training, 0.1, 1e-5)
        output, mean, invstd, mask = operators.fused_forward(*arguments)
        backward = (x.square(), x, weight, None, mean, invstd, mask, training)
        return output, mask, *operators.fused_backward(*backward, True, True, False, True)

    got = vmap(forward)(x, residual)
    one_by_one = [forward(*example) for example in zip(x, residual, strict=True)]
    torch.testing.assert_close(got, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


@pytest.mark.parametrize("counters", ["none", "shared", "of examples"])
def test_operator_under_vmap_updates_its_statistics(kernels: Backend, counters: str) -> None:
    x, residual, _ = tensors(kernels, 2)
    counter = {
        "none": None,
        "shared": torch.tensor(3).to(x.device),
        "of examples": torch.tensor([3, 5]).to(x.device),
    }[counters]
    momentum = 0.1 if counter is None else None
    mean, var = (torch.ones(2, C, dtype=x.dtype, device=x.device) for _ in range(2))
    twins = [(m.clone(), v.clone()) for m, v in zip(mean, var, strict=True)]
    counts = [None, None] if counter is None else counter.expand(2).clone()

    def forward(x: Tensor, mean: Tensor, var: Tensor, counter: Tensor | None) -> Tensor:
        settings = (residual[0], True, False, True, momentum, 1e-5)
        return operators.fused_forward(x, None, None, mean, var, counter, *settings)[0]

    in_dims = (0, 0, 0, 0 if counters == "of examples" else None)
    got = vmap(forward, in_dims)(x, mean, var, counter)
    examples = zip(x, twins, counts, strict=True)
    torch.testing.assert_close(got, torch.stack([forward(e, *s, n) for e, s, n in examples]))
    torch.testing.assert_close([mean[0], var[1]], [twins[0][0], twins[1][1]])
    if counter is not None:
        assert torch.equal(counter.expand(2), counts)
    with pytest.raises(RuntimeError, match="running_mean and running_var to be None, or training"):
        vmap(forward, (0, None, None, None))(x, mean[0], var[0], None)


def test_operator_in_forward_mode(kernels: Backend) -> None:
    x, residual, weight = tensors(kernels)
    settings = (True, False, True, 0.1, 1e-5)
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        dual = forward.make_dual(x, torch.randn_like(x))
        outputs = [
            operators.fused_forward(dual, weight, *(None,) * 4, residual, *settings)[0],
            batch_norm(dual, None, None, weight, None, True, residual=residual, activation="relu"),
        ]
        got, expected = (forward.unpack_dual(output).tangent for output in outputs)
    assert got is not None
    torch.testing.assert_close(got, expected)


def test_operators_twice_differentiated(kernels: Backend) -> None:
    """Of a recorded graph: the gradient's gradient, as the public function has it."""
    results = []
    x, residual, weight = (t.requires_grad_() for t in tensors(kernels))
    for direct in (True, False):
        if direct:
            output = batch_norm(
                x, None, None, weight, None, True, residual=residual, activation="relu"
            )
        else:
            settings = (residual, True, True, True, 0.1, 1e-5)
            output = operators.fused_forward(x, weight, *(None,) * 4, *settings)[0]
        first = torch.autograd.grad(output.pow(3).sum(), (x, residual, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, residual, weight))
        results.append([*first, *second])
    torch.testing.assert_close(*results)
