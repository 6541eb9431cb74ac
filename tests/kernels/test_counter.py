"""num_batches_tracked: counted by the kernel that updates the running statistics."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from cases import channels_last, contiguous
from conftest import Backend
from strategies import FORCED, force, launched
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import batchnorm_cuda
from batchnorm_cuda._ops import operators as ops

C = 24
# A channel, or a slab of channels, is work for three blocks, and not too much for one.
SHAPES = {contiguous: (8, C, 20, 28), channels_last: (4, C, 15, 15)}
every_strategy = pytest.mark.parametrize("strategy", FORCED)
both_momenta = pytest.mark.parametrize("momentum", [0.25, None])


@pytest.fixture
def forced(
    strategy: str,
    extension: ModuleType,
    plan_options: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(strategy, extension, plan_options, monkeypatch)


def batch(backend: Backend, place: Callable = contiguous) -> Tensor:
    return place(torch.randn(SHAPES[place])).to(backend.device)


def module_at(count: int, backend: Backend, momentum: float | None) -> nn.Module:
    module = batchnorm_cuda.BatchNorm2d(C, momentum=momentum).to(backend.device)
    module.num_batches_tracked.fill_(count)
    return module


@every_strategy
@both_momenta
@pytest.mark.parametrize("place", [contiguous, channels_last], ids=["contiguous", "channels last"])
def test_every_strategy_counts(
    kernels: Backend,
    forced: None,
    monkeypatch: pytest.MonkeyPatch,
    momentum: float | None,
    place: Callable,
) -> None:
    """Whichever channel's thread comes first or last, in blocks of any order."""
    module, expected = module_at(2, kernels, momentum), nn.BatchNorm2d(C, momentum=momentum)
    expected.num_batches_tracked.fill_(2)
    for seed in ("1", "7"):
        monkeypatch.setenv("BATCHNORM_CUDA_EMULATE_SEED", seed)
        x = batch(kernels, place)
        module(x)
        expected(x.cpu())
    torch.testing.assert_close(dict(module.cpu().state_dict()), dict(expected.state_dict()))


@every_strategy
@both_momenta
def test_counting_costs_no_launch(
    kernels: Backend, forced: None, extension: ModuleType, momentum: float | None
) -> None:
    """The kernels are those of a module without a counter, and torch launches none beside them."""
    x = batch(kernels)
    module, uncounted = module_at(0, kernels, momentum), module_at(0, kernels, 0.25)
    uncounted.num_batches_tracked = None
    uncounted(x)  # the first of a stream fills what teams wait by
    names = [launched(extension, lambda m=m: m(x)) for m in (module, uncounted)]
    assert names[0] == names[1] and 1 <= len(names[0]) <= 3
    with profile(activities=[ProfilerActivity.CPU]) as record:
        module(x)
    operators = {event.name for event in record.events() if event.name.startswith("aten::")}
    allocations = {"aten::empty", "aten::empty_like", "aten::empty_strided"}
    assert operators and operators <= allocations
    assert int(module.num_batches_tracked) == 2


@pytest.mark.parametrize("count", [0, -3, 2**24, 2**40])
def test_any_count(backend: Backend, count: int) -> None:
    """The count is an integer of 64 bits also while the kernel uses some of them."""
    module, expected = module_at(count, backend, None), nn.BatchNorm2d(C, momentum=None)
    expected.num_batches_tracked.fill_(count)
    for net in (module, expected):
        net.running_mean.fill_(1.0)
    x = batch(backend)
    module(x)
    expected(x.cpu())
    torch.testing.assert_close(dict(module.cpu().state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("channels", [1, 255, 256, 4097])
def test_any_number_of_channels(kernels: Backend, channels: int) -> None:
    module = batchnorm_cuda.BatchNorm1d(channels, momentum=None).to(kernels.device)
    expected = nn.BatchNorm1d(channels, momentum=None)
    for _ in range(2):
        x = torch.randn(6, channels)
        module(x.to(kernels.device))
        expected(x)
    torch.testing.assert_close(dict(module.cpu().state_dict()), dict(expected.state_dict()))


@both_momenta
@pytest.mark.parametrize("removed", [True, False], ids=["no statistics", "empty batch"])
def test_counted_without_update(backend: Backend, momentum: float | None, removed: bool) -> None:
    """As torch.nn, which counts whatever comes."""
    module = module_at(4, backend, momentum)
    if removed:
        module.running_mean = module.running_var = None
    module(batch(backend) if removed else torch.empty(0, C, 3, 3, device=backend.device))
    assert int(module.num_batches_tracked) == 5
    if not removed:
        assert not module.running_mean.any()


def test_not_counted_in_eval(kernels: Backend) -> None:
    """The operator takes a counter there and leaves it alone."""
    mean, var = torch.zeros(C, device=kernels.device), torch.ones(C, device=kernels.device)
    for x in (batch(kernels), torch.empty(0, C, device=kernels.device)):
        counter = torch.tensor(3, device=kernels.device)
        ops.forward(x, None, None, mean, var, counter, False, None, 1e-5)
        assert int(counter) == 3 and counter._version == 0


def test_autograd_sees_the_count(backend: Backend) -> None:
    module = module_at(0, backend, 0.1)
    before = module.num_batches_tracked._version
    module(batch(backend))
    assert module.num_batches_tracked._version > before


@both_momenta
@pytest.mark.parametrize("values", [0, 1, 5])
def test_counted_over_ranks(backend: Backend, momentum: float | None, values: int) -> None:
    """Also where all ranks together have too few values to learn from."""
    x = torch.full((values, 3), 7.0, device=backend.device)
    gathered = torch.stack([ops.sync_statistics(x)])
    mean, var = torch.ones(2, 3, device=backend.device).unbind()
    mean, var, counter = mean.clone(), var.clone(), torch.tensor(3, device=backend.device)
    ops.sync_forward(x, None, None, mean, var, counter, gathered, momentum, 1e-5)
    assert int(counter) == 4
    factor = 0.25 if momentum is None else momentum
    learnt = 1 + 6 * factor if values > 1 else 1.0
    torch.testing.assert_close(mean.cpu(), torch.full((3,), learnt))


def test_counted_over_no_channels(kernels: Backend) -> None:
    x, nothing = (torch.empty(n, device=kernels.device) for n in ((4, 0), (0,)))
    gathered = torch.stack([ops.sync_statistics(x)])
    counter = torch.tensor(3, device=kernels.device)
    ops.sync_forward(x, None, None, nothing, nothing, counter, gathered, None, 1e-5)
    assert int(counter) == 4


BAD_COUNTERS = {
    "dtype": (torch.ones(()), TypeError, "to have dtype torch.int64, got torch.float32"),
    "shape": (torch.ones(2, dtype=torch.int64), ValueError, "to have one element, got shape [2]"),
    "device": (
        torch.ones((), dtype=torch.int64, device="meta"),
        RuntimeError,
        "to be on {device}, the device of input, got meta",
    ),
}


@both_momenta
@pytest.mark.parametrize("bad", BAD_COUNTERS.values(), ids=BAD_COUNTERS)
@pytest.mark.parametrize("sync", [False, True], ids=["plain", "sync"])
def test_bad_counter(backend: Backend, momentum: float | None, bad: tuple, sync: bool) -> None:
    counter, error, message = bad
    counter = counter if counter.is_meta else counter.to(backend.device)
    x = batch(backend)
    module = module_at(0, backend, momentum)
    module.num_batches_tracked = counter
    with pytest.raises(error) as raised:
        if sync:
            buffers = module.running_mean, module.running_var, counter
            gathered = torch.stack([ops.sync_statistics(x)])
            ops.sync_forward(x, None, None, *buffers, gathered, momentum, 1e-5)
        else:
            module(x)
    expected = f"batch_norm: expected num_batches_tracked {message.format(device=x.device)}"
    assert str(raised.value) == expected
    assert not module.running_mean.any()
    assert counter.is_meta or (counter == 1).all()


@both_momenta
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_that_ends_with_batch_norm(
    kernels: Backend, momentum: float | None, use_reentrant: bool
) -> None:
    """The recomputation may stop where the last tensor is saved: the batch is counted by then."""
    module, expected = module_at(0, kernels, momentum), nn.BatchNorm2d(C, momentum=momentum)
    for net, device in ((module, kernels.device), (expected, "cpu")):
        x = torch.ones(2, C, 3, 3).cumsum(3).to(device).requires_grad_()
        checkpoint(net, x, use_reentrant=use_reentrant).sum().backward()
    assert int(module.num_batches_tracked) == 2
    torch.testing.assert_close(dict(module.cpu().state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("batched", [True, False], ids=["own counters", "one counter"])
def test_vmap(backend: Backend, batched: bool) -> None:
    """An ensemble by functional_call over the state that torch.func.stack_module_state makes."""
    nets = [batchnorm_cuda.BatchNorm1d(3).to(backend.device) for _ in range(2)]
    nets[1].num_batches_tracked.fill_(5)
    parameters, buffers = torch.func.stack_module_state(nets)
    dims = dict.fromkeys(buffers, 0)
    if not batched:
        buffers["num_batches_tracked"] = torch.tensor(5, device=backend.device)
        dims["num_batches_tracked"] = None
    x = torch.randn(2, 7, 3, device=backend.device)

    def call(parameters: dict, buffers: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(nets[0], (parameters, buffers), (x,))

    output = torch.vmap(call, in_dims=(0, dims, 0))(parameters, buffers, x)
    for net, own_x, own_output in zip(nets, x, output, strict=True):
        torch.testing.assert_close(own_output, net(own_x))
    assert buffers["num_batches_tracked"].tolist() == ([1, 6] if batched else 6)
    means = torch.stack([net.running_mean for net in nets])
    torch.testing.assert_close(buffers["running_mean"], means)
