"""torch.func's transforms, and what autograd offers around a backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from parametrisations import both_modes
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import batchnorm_cuda
from batchnorm_cuda import batch_norm

REFUSED = "batch_norm: expected running_mean and running_var to be None, or training to be False"
B, C = 4, 3


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(function: Callable[[Callable], object]) -> None:
    """What `function` makes of our batch_norm is what it makes of torch's."""
    torch.testing.assert_close(function(batch_norm), function(F.batch_norm))


@pytest.fixture
def tensors(backend: Backend) -> dict[str, Tensor]:
    """`x` holds B examples, and so do `w` and `means`; `mean` and `var` are one example's."""
    values = {
        "x": double(B, 6, C, 5, 2),
        "w": double(B, C, seed=1),
        "means": double(B, C, seed=2),
        "mean": double(C, seed=3),
        "var": double(C, seed=4).abs() + 0.5,
    }
    return {name: value.to(backend.device) for name, value in values.items()}


# Each maps (batch_norm, tensors) to a result of vmap.
VMAPS = {
    "evaluation": lambda bn, t: vmap(lambda x: bn(x, t["mean"], t["var"], t["w"][0]))(t["x"]),
    "batch statistics": lambda bn, t: vmap(lambda x: bn(x, None, None, training=True))(t["x"]),
    "weights only": lambda bn, t: vmap(lambda w: bn(t["x"][0], None, None, w, w, training=True))(
        t["w"]
    ),
    "statistics only": lambda bn, t: vmap(lambda m: bn(t["x"][0], m, t["var"]))(t["means"]),
    "other dimensions": lambda bn, t: vmap(
        lambda x, w: bn(x, None, None, w, training=True), in_dims=(2, 1), out_dims=3
    )(t["x"].movedim(0, 2), t["w"].t()),
    "channels-last": lambda bn, t: vmap(lambda x: bn(x, t["mean"], t["var"], t["w"][0]))(
        t["x"].flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (B, 6))
    ),
    "vmap of vmap": lambda bn, t: vmap(
        vmap(lambda x, w: bn(x, None, None, w, training=True), in_dims=(0, None)), in_dims=(None, 0)
    )(t["x"], t["w"]),
    "one value per channel": lambda bn, t: vmap(lambda x: bn(x, t["mean"], t["var"]))(
        t["x"][:, :1, :, :1, :1]
    ),
}


@pytest.mark.parametrize("name", VMAPS)
def test_vmap(backend: Backend, tensors: dict[str, Tensor], name: str) -> None:
    with torch.no_grad():
        assert_same(lambda bn: VMAPS[name](bn, tensors))


@both_modes
def test_around_a_backward(backend: Backend, training: bool) -> None:
    """A transform of a function that differentiates what was computed outside of it."""
    batch_norms = batch_norm, F.batch_norm
    mean, var = torch.zeros(C), torch.ones(C)
    x, dy, weighing = (torch.randn(B, C, 2).to(backend.device) for _ in range(3))
    results = []
    for function in batch_norms:
        leaf = x.clone().requires_grad_()
        running = (mean.to(leaf), var.to(leaf)) if not training else (None, None)
        y = function(leaf, *running, training=training)

        def of_the_gradient(z: Tensor, y: Tensor = y, leaf: Tensor = leaf) -> Tensor:
            gradient = torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]
            return (z * gradient).sum()

        results.append(grad(of_the_gradient)(weighing))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_what_outlived_its_transform(backend: Backend, grad_enabled: bool) -> None:
    """A tensor that a transform wrapped, and that was kept, is the tensor that it was."""
    kept: list[Tensor] = []
    x = torch.randn(B, C, 2, device=backend.device)
    torch.func.grad(lambda wrapped: (kept.append(wrapped), wrapped.sum())[1])(x)
    weight = torch.ones(C, device=backend.device, requires_grad=True)
    with torch.set_grad_enabled(grad_enabled):
        result, expected = (batch_norm(t, None, None, weight, training=True) for t in (*kept, x))
    torch.testing.assert_close(result, expected)
    assert result.requires_grad == grad_enabled
    if grad_enabled:
        grads = (torch.autograd.grad(y.pow(3).sum(), weight)[0] for y in (result, expected))
        torch.testing.assert_close(*grads)


def test_vmap_counts_the_values_of_one_example(
    backend: Backend, tensors: dict[str, Tensor]
) -> None:
    x = tensors["x"][:, :1, :, :1, :1]
    with torch.no_grad(), pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        vmap(lambda x: batch_norm(x, None, None, training=True))(x)


def test_vmap_updates_batched_statistics(backend: Backend, tensors: dict[str, Tensor]) -> None:
    """As for an ensemble: each example has running statistics of its own, wherever their examples
    lie; torch itself loses the update of a mean whose examples are its second dimension."""
    x, mean, var = tensors["x"], tensors["means"].t().contiguous(), tensors["w"].abs()
    wanted_mean, wanted_var = mean.clone(), var.clone()

    def update(x: Tensor, mean: Tensor, var: Tensor, function: Callable = batch_norm) -> Tensor:
        return function(x, mean, var, training=True, momentum=0.3)

    with torch.no_grad():
        output = vmap(update, in_dims=(0, 1, 0))(x, mean, var)
    examples = zip(x, wanted_mean.unbind(1), wanted_var, strict=True)
    wanted = torch.stack([update(*example, F.batch_norm) for example in examples])
    torch.testing.assert_close([output, mean, var], [wanted, wanted_mean, wanted_var])


def test_ensemble(backend: Backend) -> None:
    """stack_module_state and functional_call: B modules in one call, each with its own state."""
    nets = [batchnorm_cuda.BatchNorm1d(C).to(backend.device, torch.float64) for _ in range(B)]
    x = double(B, 7, C).to(backend.device)
    for index, net in enumerate(nets):
        nn.init.constant_(net.weight, index + 1.0)
    parameters, buffers = stack_module_state(nets)
    with torch.no_grad():
        output = vmap(lambda p, b, x: functional_call(nets[0], (p, b), x))(parameters, buffers, x)
        expected = torch.stack([net(part) for net, part in zip(nets, x, strict=True)])
    torch.testing.assert_close(output, expected)
    for name, stacked in buffers.items():
        torch.testing.assert_close(stacked, torch.stack([net.get_buffer(name) for net in nets]))


@pytest.mark.parametrize("transform", [vmap, grad, lambda f: vmap(grad(f))])
def test_statistics_that_a_transform_cannot_update(
    backend: Backend, tensors: dict[str, Tensor], transform: Callable
) -> None:
    mean, var = tensors["mean"], tensors["var"]
    before = mean.clone()
    f = transform(lambda x: batch_norm(x, mean, var, training=True).sum())
    with torch.no_grad(), pytest.raises(RuntimeError, match=REFUSED):
        f(tensors["x"])
    assert torch.equal(mean, before)


def test_statistics_shared_by_an_inner_vmap(kernels: Backend) -> None:
    """The operator's own rule refuses what only an outer transform would see."""
    x, mean, var = double(B, 6, C).to(kernels.device), torch.zeros(C), torch.ones(C)
    mean, var = mean.to(x), var.to(x)
    arguments = (None, None, mean, var, None, True, 0.1, 1e-5)
    with pytest.raises(RuntimeError, match=REFUSED):
        vmap(lambda x: torch.ops.batchnorm_cuda.forward(x, *arguments)[0])(x)
    counters = torch.ones(B, dtype=torch.int64, device=x.device)
    means, variances = mean.repeat(B, 1), var.repeat(B, 1)
    with pytest.raises(NotImplementedError, match="expected momentum to be a number"):
        vmap(
            lambda x, m, v, n: torch.ops.batchnorm_cuda.forward(
                x, None, None, m, v, n, True, None, 1e-5
            )[0]
        )(x, means, variances, counters)
    assert torch.equal(means, mean.repeat(B, 1))


BACKWARD_DIMS = {
    "all": (0, 0, 0, 0, 0, 0),
    "gradient only": (0, None, None, None, None, None),
    "weight only": (None, None, 0, 0, None, None),
}


@pytest.mark.parametrize("dims", BACKWARD_DIMS.values(), ids=BACKWARD_DIMS)
@pytest.mark.parametrize("needed", [(True, True, True), (False, True, True), (True, False, False)])
@both_modes
def test_vmap_of_the_backward_operator(
    kernels: Backend, dims: tuple, needed: tuple[bool, ...], training: bool
) -> None:
    shapes = [(B, 6, C, 5), (B, 6, C, 5), (B, C), (B, C), (B, C), (B, C)]
    values = [double(*shape, seed=i).to(kernels.device) for i, shape in enumerate(shapes)]
    arguments = [v if dim == 0 else v[0] for v, dim in zip(values, dims, strict=True)]

    def backward(*tensors: Tensor) -> list[Tensor]:
        return torch.ops.batchnorm_cuda.backward(*tensors, training, *needed)

    examples = [
        backward(*(a[i] if dim == 0 else a for a, dim in zip(arguments, dims, strict=True)))
        for i in range(B)
    ]
    expected = [torch.stack(grads) for grads in zip(*examples, strict=True)]
    torch.testing.assert_close(vmap(backward, in_dims=dims)(*arguments), expected)


def cubed(bn: Callable, *statistics: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    running = statistics or (None, None)
    return lambda w, x: bn(x, *running, w, training=not statistics).pow(3).sum()


# Each maps (batch_norm, tensors) to a result of grad.
GRADS = {
    "batch statistics": lambda bn, t: grad(cubed(bn), argnums=(0, 1))(t["w"][0], t["x"][0]),
    "evaluation": lambda bn, t: grad(cubed(bn, t["mean"], t["var"]), argnums=(0, 1))(
        t["w"][0], t["x"][0]
    ),
    "per example": lambda bn, t: vmap(grad(cubed(bn), argnums=(0, 1)), in_dims=(None, 0))(
        t["w"][0], t["x"]
    ),
    "per example, evaluation": lambda bn, t: vmap(
        grad(cubed(bn, t["mean"], t["var"])), in_dims=(None, 0)
    )(t["w"][0], t["x"]),
    "of vmap": lambda bn, t: grad(lambda w: vmap(cubed(bn))(w, t["x"]).sum())(t["w"]),
    "jacrev": lambda bn, t: jacrev(lambda w: bn(t["x"][0], None, None, w, training=True))(
        t["w"][0]
    ),
}


@pytest.mark.parametrize("name", GRADS)
def test_grad(backend: Backend, tensors: dict[str, Tensor], name: str) -> None:
    assert_same(lambda bn: GRADS[name](bn, tensors))


def test_grad_updates_statistics_among_its_arguments(backend: Backend) -> None:
    x = double(6, C).to(backend.device)

    def step(bn: Callable) -> list[Tensor]:
        mean, var = torch.zeros_like(x[0]), torch.ones_like(x[0])
        loss = grad(lambda x, m, v: bn(x, m, v, training=True).pow(3).sum())
        return [loss(x, mean, var), mean, var]

    assert_same(step)


# --- Around one backward pass -------------------------------------------------------------------


def twin_modules(backend: Backend) -> tuple[nn.Module, nn.Module, Tensor]:
    theirs = nn.BatchNorm2d(C).to(backend.device, torch.float64)
    nn.init.uniform_(theirs.weight, 0.5, 1.5)
    ours = batchnorm_cuda.convert(copy.deepcopy(theirs))
    return ours, theirs, double(4, C, 5, 2).to(backend.device).requires_grad_()


def test_two_forwards_before_a_backward(backend: Backend) -> None:
    """Nothing of the first forward is kept in the module, where the second would overwrite it."""
    ours, theirs, x = twin_modules(backend)
    other = double(4, C, 5, 2, seed=9).to(backend.device).requires_grad_()
    results = []
    for net in (ours, theirs):
        first, second = net(x).pow(3).sum(), net(other * 2).pow(3).sum()
        results.append([*torch.autograd.grad(first, [x, *net.parameters()])])
        results[-1] += torch.autograd.grad(second, [other, *net.parameters()])
    torch.testing.assert_close(*results)


def test_retain_graph(backend: Backend) -> None:
    ours, theirs, x = twin_modules(backend)
    for training in (True, False):
        results = []
        for net in (ours, theirs):
            output = net.train(training)(x).pow(3).sum()
            leaves = [x, *net.parameters()]
            once = torch.autograd.grad(output, leaves, retain_graph=True)
            again = torch.autograd.grad(output, leaves)
            assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
            results.append(again)
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                torch.autograd.grad(output, leaves)
        torch.testing.assert_close(*results)


@both_modes
def test_saved_tensors_hooks(backend: Backend, training: bool) -> None:
    """All that the backward holds on to goes through the hooks, and what they return is used."""
    ours, _, x = twin_modules(backend)
    ours.train(training)
    packed = []

    def pack(tensor: Tensor) -> tuple[Tensor, ...]:
        packed.append(tensor)
        return (tensor.detach().clone(),)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(ours(x).pow(3).sum(), [x, *ours.parameters()]))

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept[0]):
        torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)
    assert any(tensor.numel() == x.numel() for tensor in packed)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t * 0,), lambda kept: kept[0]):
        output = ours(x).sum()
    assert torch.autograd.grad(output, ours.weight)[0].count_nonzero() == 0

    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)


def test_input_may_not_change_before_the_backward(kernels: Backend) -> None:
    ours, _, x = twin_modules(kernels)
    data = x * 1
    output = ours(data)
    data.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
