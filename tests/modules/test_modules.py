"""The modules behave as torch.nn's do: constructor, state, errors, and every mode of training."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import Backend
from parametrisations import both_modes
from torch import Tensor, nn

import batchnorm_cuda

PAIRS = [
    (batchnorm_cuda.BatchNorm1d, nn.BatchNorm1d, (6, 5, 4)),
    (batchnorm_cuda.BatchNorm1d, nn.BatchNorm1d, (9, 5)),
    (batchnorm_cuda.BatchNorm2d, nn.BatchNorm2d, (3, 5, 4, 2)),
    (batchnorm_cuda.BatchNorm3d, nn.BatchNorm3d, (2, 5, 2, 3, 4)),
]
every_pair = pytest.mark.parametrize(
    ("ours", "theirs", "shape"), PAIRS, ids=["1d", "1d without length", "2d", "3d"]
)
BIAS_IS_AN_ARGUMENT = "bias" in inspect.signature(nn.BatchNorm2d).parameters  # since torch 2.13
ARGUMENTS = [
    {},
    {"eps": 1e-3, "momentum": 0.5},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float16},
    *([{"bias": False}] if BIAS_IS_AN_ARGUMENT else []),
]


def twins(
    ours: type, theirs: type, backend: Backend, dtype: torch.dtype = torch.float64, **arguments
) -> tuple[nn.Module, nn.Module]:
    """One module of each kind with the same random state, in the dtype that hides no error."""
    expected = theirs(5, **arguments).to(backend.device, dtype)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.uniform_(0.5, 1.5)
    module = ours(5, **arguments).to(backend.device, dtype)
    module.load_state_dict(expected.state_dict())
    return module, expected


def assert_same_step(module: nn.Module, expected: nn.Module, x: Tensor) -> None:
    """Output, gradients and state after one forward and backward."""
    leaves = [x.detach().requires_grad_() for _ in range(2)]
    dy = torch.randn_like(x)
    results = []
    for net, leaf in zip((module, expected), leaves, strict=True):
        net.zero_grad()
        output = net(leaf)
        output.backward(dy)
        results.append([output, leaf.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)
    assert_same_state(module, expected)


def assert_same_state(module: nn.Module, expected: nn.Module) -> None:
    state, wanted = module.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    torch.testing.assert_close(dict(state), dict(wanted), rtol=1e-12, atol=1e-13)


@every_pair
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_constructor_and_state(ours: type, theirs: type, shape, arguments: dict) -> None:
    module, expected = ours(5, **arguments), theirs(5, **arguments)
    assert isinstance(module, theirs)
    assert repr(module) == repr(expected)
    assert module.extra_repr() == expected.extra_repr()
    state, wanted = module.state_dict(), expected.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in wanted.items()
    }
    assert [name for name, _ in module.named_parameters()] == [
        name for name, _ in expected.named_parameters()
    ]
    expected.load_state_dict(state)
    module.load_state_dict(wanted)
    signature = inspect.signature(ours)
    *parameters, added = signature.parameters.values()
    assert (added.name, added.kind, added.default) == ("activation", added.KEYWORD_ONLY, None)
    assert signature.replace(parameters=parameters) == inspect.signature(theirs)


@every_pair
@pytest.mark.parametrize("shape_given", [(5,), (2, 5), (2, 5, 3), (2, 5, 3, 3), (2, 5, 3, 3, 3)])
def test_same_ranks_accepted(
    backend: Backend, ours: type, theirs: type, shape, shape_given: tuple[int, ...]
) -> None:
    x = torch.randn(shape_given).to(backend.device)
    module, expected = twins(ours, theirs, backend, torch.float32)
    error = refused(expected, x)
    assert refused(module, x) == error
    if error:
        assert int(module.num_batches_tracked) == 0


def refused(module: nn.Module, x: Tensor) -> tuple[type, str] | None:
    try:
        module(x)
    except ValueError as error:
        return type(error), str(error)
    return None


@every_pair
def test_one_value_per_channel(backend: Backend, ours: type, theirs: type, shape) -> None:
    """The same error as torch's, but the batch is not counted."""
    x = torch.randn(1, 5, *(1 for _ in shape[2:])).to(backend.device)
    module, expected = twins(ours, theirs, backend, torch.float32)
    assert refused(module, x) == refused(expected, x) is not None
    assert int(module.num_batches_tracked) == 0


@every_pair
@pytest.mark.parametrize("arguments", ARGUMENTS[:-1], ids=str)
def test_steps_match_torch(
    backend: Backend, ours: type, theirs: type, shape, arguments: dict
) -> None:
    """Three training steps, one in eval, one more in training: everything as torch.nn has it."""
    arguments = {k: v for k, v in arguments.items() if k != "dtype"}
    module, expected = twins(ours, theirs, backend, **arguments)
    for training in (True, True, True, False, True):
        module.train(training)
        expected.train(training)
        x = torch.randn(shape, dtype=torch.float64) * 2 + 0.5
        assert_same_step(module, expected, x.to(backend.device))


@every_pair
def test_weight_without_bias(backend: Backend, ours: type, theirs: type, shape) -> None:
    """bias=False of torch 2.13, made by hand so that older versions are covered, too."""
    module, expected = twins(ours, theirs, backend)
    for net in (module, expected):
        net.register_parameter("bias", None)
    for training in (True, False):
        module.train(training)
        expected.train(training)
        x = torch.randn(shape, dtype=torch.float64).to(backend.device)
        assert_same_step(module, expected, x)


def test_running_statistics_by_hand(backend: Backend) -> None:
    """k steps of the recursion, written out."""
    module = batchnorm_cuda.BatchNorm2d(3, momentum=0.25).to(backend.device, torch.float64)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for _ in range(4):
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64) + 1
        module(x.to(backend.device))
        mean = 0.75 * mean + 0.25 * x.mean((0, 2, 3))
        var = 0.75 * var + 0.25 * x.var((0, 2, 3))
    torch.testing.assert_close(module.running_mean.cpu(), mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(module.running_var.cpu(), var, rtol=1e-12, atol=1e-13)
    assert int(module.num_batches_tracked) == 4


def test_cumulative_average(backend: Backend) -> None:
    """momentum=None: after k batches the plain mean of k statistics; the start value is gone."""
    module = batchnorm_cuda.BatchNorm1d(3, momentum=None).to(backend.device, torch.float64)
    module.running_mean.fill_(99.0)
    batches = [torch.randn(7, 3, dtype=torch.float64) for _ in range(5)]
    for x in batches:
        module(x.to(backend.device))
    mean = torch.stack([x.mean(0) for x in batches]).mean(0)
    var = torch.stack([x.var(0) for x in batches]).mean(0)
    torch.testing.assert_close(module.running_mean.cpu(), mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(module.running_var.cpu(), var, rtol=1e-12, atol=1e-13)


def test_cumulative_average_does_not_wait(backend: Backend) -> None:
    """torch.nn reads num_batches_tracked back to the host at each step; we do not."""
    module = batchnorm_cuda.BatchNorm1d(3, momentum=None).to(backend.device)
    x = torch.randn(7, 3).to(backend.device)
    module(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
    names = {event.name for event in profile.events()}
    assert any(name.startswith("aten::") for name in names)  # the profiler saw the step
    assert not names & {"aten::item", "aten::_local_scalar_dense"}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_missing_counter(backend: Backend, momentum: float | None) -> None:
    """Without num_batches_tracked and momentum torch updates nothing; so do we."""
    module, expected = twins(batchnorm_cuda.BatchNorm1d, nn.BatchNorm1d, backend, momentum=momentum)
    module.num_batches_tracked = expected.num_batches_tracked = None
    assert_same_step(module, expected, torch.randn(7, 5, dtype=torch.float64).to(backend.device))


def test_buffers_removed(backend: Backend) -> None:
    """Buffers set to None normalise by the batch in eval, too."""
    module, expected = twins(batchnorm_cuda.BatchNorm1d, nn.BatchNorm1d, backend)
    for net in (module, expected):
        net.running_mean = net.running_var = None
        net.eval()
    assert_same_step(module, expected, torch.randn(7, 5, dtype=torch.float64).to(backend.device))


def test_tracking_switched_off_later(backend: Backend) -> None:
    """Buffers that are there but not tracked are not updated in training, and used in eval."""
    module, expected = twins(batchnorm_cuda.BatchNorm1d, nn.BatchNorm1d, backend)
    before = copy.deepcopy(module.state_dict())
    for training in (True, False):
        for net in (module, expected):
            net.train(training).track_running_stats = False
        x = torch.randn(7, 5, dtype=torch.float64) + 3
        assert_same_step(module, expected, x.to(backend.device))
    assert_same_values(module.state_dict(), before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_refused_input_changes_nothing(backend: Backend, momentum: float | None) -> None:
    """The backend's own checks come before the counter, too."""
    module = batchnorm_cuda.BatchNorm2d(5, momentum=momentum).to(backend.device)
    before = copy.deepcopy(module.state_dict())
    for bad in (torch.zeros(2, 4, 3, 3), torch.zeros(2, 5, 3, 3, dtype=torch.int64)):
        with pytest.raises((TypeError, ValueError), match="batch_norm: expected"):
            module(bad.to(backend.device))
    assert_same_values(module.state_dict(), before)


def assert_same_values(state: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(backend: Backend, duplicate: Callable) -> None:
    module = batchnorm_cuda.BatchNorm2d(5).to(backend.device)
    x = torch.randn(2, 5, 3, 3).to(backend.device)
    module(x)
    twin = duplicate(module)
    assert type(twin) is batchnorm_cuda.BatchNorm2d
    assert_same_values(twin.state_dict(), module.state_dict())
    before = copy.deepcopy(module.state_dict())
    assert torch.equal(twin(x), module(x))
    assert_same_values(twin.state_dict(), module.state_dict())
    twin(x)
    assert int(module.num_batches_tracked) == int(before["num_batches_tracked"]) + 1


def test_checkpoint_from_before_the_counter(backend: Backend) -> None:
    """Version 1 checkpoints lack num_batches_tracked and load all the same."""
    module = batchnorm_cuda.BatchNorm2d(5).to(backend.device)
    state = module.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    module.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_modes
def test_half_input_with_float32_parameters(
    backend: Backend, dtype: torch.dtype, training: bool
) -> None:
    """What autocast produces: no cast is needed, and the gradients stay float32."""
    module, expected = twins(
        batchnorm_cuda.BatchNorm2d, nn.BatchNorm2d, backend, dtype=torch.float32
    )
    module.train(training)
    expected.train(training)
    x = torch.randn(3, 5, 4, 4).to(backend.device, dtype).requires_grad_()
    output = module(x)
    output.sum().backward()
    assert output.dtype == x.grad.dtype == dtype
    assert module.weight.grad.dtype == module.running_mean.dtype == torch.float32
    wanted = expected(x.detach().float())
    torch.testing.assert_close(output, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(
        module.running_var, expected.running_var, rtol=1e-6, atol=0, check_dtype=True
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_module(backend: Backend, dtype: torch.dtype) -> None:
    """model.half() makes parameters and buffers half, too; they are updated in their own dtype."""
    module = batchnorm_cuda.BatchNorm2d(5).to(backend.device, dtype)
    x = (torch.randn(3, 5, 4, 4) + 2).to(backend.device, dtype)
    assert module(x).dtype == dtype
    assert module.running_mean.dtype == dtype
    expected = 0.1 * x.double().mean((0, 2, 3))
    torch.testing.assert_close(
        module.running_mean.double(), expected, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=0
    )


def test_autocast_leaves_it_alone(backend: Backend) -> None:
    module = batchnorm_cuda.BatchNorm2d(5).to(backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert module(torch.randn(2, 5, 3, 3).to(backend.device)).dtype == torch.float32
        half = torch.randn(2, 5, 3, 3).to(backend.device, torch.bfloat16)
        assert module(half).dtype == torch.bfloat16


def test_functional_call(backend: Backend) -> None:
    """Parameters and buffers may be handed in; the module's own stay as they are."""
    module = batchnorm_cuda.BatchNorm2d(5).to(backend.device)
    before = copy.deepcopy(module.state_dict())
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state["weight"].fill_(2.0)
    x = torch.randn(2, 5, 3, 3).to(backend.device)
    output = torch.func.functional_call(module, state, (x,))
    torch.testing.assert_close(output, 2 * normalised(x))
    assert_same_values(module.state_dict(), before)
    assert int(state["num_batches_tracked"]) == 1


def normalised(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


def test_shared_module_accumulates(backend: Backend) -> None:
    """One module applied twice in a graph: both gradients are right and add up."""
    module, expected = twins(batchnorm_cuda.BatchNorm2d, nn.BatchNorm2d, backend)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64).to(backend.device)
    for net in (module, expected):
        net(torch.relu(net(x)) + x).pow(2).sum().backward()
    grads = [[p.grad for p in net.parameters()] for net in (module, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)
    assert_same_state(module, expected)


def test_converts_to_torchs_sync_batch_norm() -> None:
    net = nn.Sequential(batchnorm_cuda.BatchNorm2d(5))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(net)[0]) is nn.SyncBatchNorm
