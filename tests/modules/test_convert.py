"""`convert` and `revert` change the class of a batch norm and nothing else about the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from conftest import Backend
from torch import Tensor, nn
from torch.nn.utils import parametrize

import batchnorm_cuda
from batchnorm_cuda import SyncBatchNorm, convert, modules, revert
from batchnorm_cuda._ops.calls import Forward

PAIRS = [
    (getattr(nn, name), getattr(batchnorm_cuda, name))
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
]
LAZY_PAIRS = [
    (getattr(nn, name), getattr(batchnorm_cuda, name))
    for name in ("LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d")
]
every_pair = pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=lambda kind: kind.__module__)


class UsersBatchNorm(nn.BatchNorm2d):
    """What a user may derive from torch's class."""


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The inputs' shapes of all forwards that went through our modules so far."""
    seen = []
    normalize = modules.normalize

    def record(call: Forward) -> Tensor:
        seen.append(call.input.shape)
        return normalize(call)

    monkeypatch.setattr(modules._KernelForward, "_normalize", staticmethod(record))
    return seen


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def identities(model: nn.Module) -> dict[str, int]:
    """The objects that a model consists of."""
    members = [*tensors(model), *model.named_modules(remove_duplicate=False)]
    return {name: id(member) for name, member in members}


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4, eps=1e-3, momentum=None),
        nn.ReLU(),
        nn.ModuleDict({"block": nn.ModuleList([nn.Sequential(nn.BatchNorm2d(4))])})["block"][0],
        nn.Flatten(),
        nn.BatchNorm1d(100, affine=False),
        nn.Linear(100, 3),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, backend: Backend) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        x = torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=generator).to(backend.device)
        loss = model(x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_pair
def test_a_batch_norm_itself(theirs: type, ours: type) -> None:
    module = theirs(5, eps=1e-3, momentum=None, affine=False, dtype=torch.float64).eval()
    before, text = dict(module.__dict__), repr(module)
    assert convert(module) is module
    assert type(module) is ours
    assert module.__dict__ == before and repr(module) == text
    assert type(convert(module)) is ours  # once more changes nothing
    assert revert(module) is module
    assert type(module) is theirs
    assert module.__dict__ == before
    assert type(revert(module)) is theirs


@pytest.mark.usefixtures("one_thread")
def test_trains_on_with_the_optimizer_from_before(
    backend: Backend, calls: list[torch.Size]
) -> None:
    """Momentum buffers included: three steps before, three after the conversion, three after
    going back, against a model that stays torch's."""
    expected = make_network().to(backend.device, torch.float64)
    model = copy.deepcopy(expected)
    nets = (expected, model)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9) for net in nets]
    objects, keys = identities(model), list(model.state_dict())
    for change, ran in ((lambda m: m, 0), (convert, 9), (revert, 9)):
        change(model)
        assert identities(model) == objects
        assert list(model.state_dict()) == keys
        losses = [train(*pair, backend) for pair in zip(nets, optimizers, strict=True)]
        assert len(calls) == ran  # three batch norms, three steps
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-9, atol=1e-10
    )


def test_nested_and_shared_modules(backend: Backend) -> None:
    shared = nn.BatchNorm2d(3)
    model = nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.BatchNorm2d(3), nn.Sequential(shared)]),
            "again": shared,
            "tied": nn.BatchNorm2d(3),
        }
    )
    model["tied"].weight = model["list"][0].weight
    objects = identities(model)
    convert(model)
    assert identities(model) == objects
    assert model["again"] is model["list"][1][0] is shared
    assert model["tied"].weight is model["list"][0].weight
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert kinds == [batchnorm_cuda.BatchNorm2d] * 3
    model.to(backend.device)
    x = torch.randn(2, 3, 4, 4).to(backend.device)
    model["again"](model["list"][1](x))
    assert int(shared.num_batches_tracked) == 2


def test_users_subclasses_are_left_alone() -> None:
    instance_norm = nn.InstanceNorm2d(3, affine=True)
    parametrised = parametrize.register_parametrization(UsersBatchNorm(3), "weight", Doubled())
    model = nn.Sequential(UsersBatchNorm(3), instance_norm, nn.GroupNorm(1, 3), parametrised)
    kinds = [type(module) for module in model]
    for change in (convert, revert):
        assert [type(module) for module in change(model)] == kinds


def test_mode_flags_and_attributes() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).to(torch.bfloat16)
    model[0].eval()
    model[0].weight.requires_grad_(False)
    model[0].register_buffer("mask", torch.ones(3), persistent=False)
    model[0].running_var = None
    model[1].note = "kept"
    convert(model)
    assert [m.training for m in model.modules()] == [True, False, True]
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert "mask" in dict(model[0].named_buffers()) and "0.mask" not in model.state_dict()
    assert model[0].running_var is None and model[1].note == "kept"
    assert {tensor.dtype for _, tensor in tensors(model)} == {
        torch.bfloat16,
        torch.float32,  # the mask
        torch.int64,
    }


def test_hooks_are_kept(backend: Backend) -> None:
    module = nn.BatchNorm2d(3)
    log = []
    module.register_forward_pre_hook(lambda *_: log.append("pre"))
    module.register_forward_hook(lambda *_, **__: log.append("post"), with_kwargs=True)
    module.register_full_backward_pre_hook(lambda *_: log.append("backward pre"))
    handle = module.register_full_backward_hook(lambda *_: log.append("backward"))
    module.register_state_dict_pre_hook(lambda *_: log.append("saving"))
    module.register_state_dict_post_hook(lambda *_: log.append("saved"))
    module.register_load_state_dict_pre_hook(lambda *_: log.append("loading"))
    module.register_load_state_dict_post_hook(lambda *_: log.append("loaded"))
    convert(module).to(backend.device)
    assert module._is_full_backward_hook is True
    x = torch.randn(2, 3, 2, 2).to(backend.device).requires_grad_()
    module(x).sum().backward()
    module.load_state_dict(module.state_dict())
    passes = ["pre", "post", "backward pre", "backward"]
    assert log == [*passes, "saving", "saved", "loading", "loaded"]
    handle.remove()  # a handle from before still works
    module(x).sum().backward()
    assert log[8:] == passes[:3]


@pytest.mark.parametrize(("theirs", "ours"), LAZY_PAIRS, ids=lambda kind: kind.__module__)
def test_lazy(backend: Backend, calls: list[torch.Size], theirs: type, ours: type) -> None:
    module = theirs(momentum=0.5)
    assert convert(module) is module and type(module) is ours
    assert type(revert(module)) is theirs
    convert(module)
    shape = (4, 3, 2, 2, 2)[: 2 + int(ours.__name__[-2])]
    x = torch.randn(shape)
    output = module.to(backend.device)(x.to(backend.device))
    assert len(calls) == 1  # the first forward, too
    assert type(module) is getattr(batchnorm_cuda, ours.__name__.removeprefix("Lazy"))
    assert not module._forward_pre_hooks and not module._load_state_dict_pre_hooks
    expected = theirs(momentum=0.5)
    torch.testing.assert_close(output.cpu(), expected(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.running_var.cpu(), expected.running_var)
    assert int(module.num_batches_tracked) == 1


def test_parametrised(backend: Backend, calls: list[torch.Size]) -> None:
    """The parametrisation goes on working and can be removed."""
    module = parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", Doubled())
    expected = copy.deepcopy(module).to(backend.device)
    objects, keys = identities(module), list(module.state_dict())
    assert convert(module) is module
    module.to(backend.device)
    assert identities(module) == objects and list(module.state_dict()) == keys
    assert type(module).__name__ == "ParametrizedBatchNorm2d"
    assert isinstance(module, batchnorm_cuda.BatchNorm2d)
    assert not isinstance(expected, batchnorm_cuda.BatchNorm2d)
    x = torch.randn(2, 3, 4, 4).to(backend.device)
    torch.testing.assert_close(module(x), expected(x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
    convert(module)  # twice
    module(x).sum().backward()
    assert module.parametrizations.weight.original.grad is not None
    revert(module)
    assert parametrize.type_before_parametrizations(module) is nn.BatchNorm2d
    convert(module)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is batchnorm_cuda.BatchNorm2d
    assert torch.equal(module.weight, expected.weight)  # a copy had the same class of its own


def test_duplicates_of_a_converted_model(backend: Backend) -> None:
    model = convert(make_network()).to(backend.device, torch.float64)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64).to(backend.device)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin] == [type(m) for m in model]
        assert torch.equal(twin(x), model(x))
        model.load_state_dict(twin.state_dict())


def test_compiled_before_the_conversion(backend: Backend, calls: list[torch.Size]) -> None:
    """A compiled module notices that its class has changed."""
    torch._dynamo.reset()
    module = nn.BatchNorm2d(3).to(backend.device)
    compiled = torch.compile(module, backend="eager")
    x = torch.randn(2, 3, 4, 4).to(backend.device)
    compiled(x)
    convert(compiled)
    module.compile(backend="eager")
    module(x)
    assert type(compiled._orig_mod) is batchnorm_cuda.BatchNorm2d
    compiled(x)
    assert calls
    assert int(module.num_batches_tracked) == 3


def test_graph_module(backend: Backend, calls: list[torch.Size]) -> None:
    """Models that torch.fx has traced call their modules by name."""
    graph = torch.fx.symbolic_trace(make_network()).to(backend.device)
    convert(graph)
    graph(torch.randn(3, 2, 5, 5).to(backend.device))
    assert len(calls) == 3


def test_torchs_sync_batch_norm_stays_synchronised() -> None:
    group = object()
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.BatchNorm2d(3))
    convert(model)
    assert type(model[0]) is SyncBatchNorm and model[0].process_group is group
    assert type(model[1]) is batchnorm_cuda.BatchNorm2d
    revert(model)
    assert type(model[0]) is nn.SyncBatchNorm and model[0].process_group is group
    assert type(model[1]) is nn.BatchNorm2d


@every_pair
@pytest.mark.parametrize("converted", [False, True])
def test_sync(theirs: type, ours: type, converted: bool) -> None:
    """Local batch norms become synchronised, and come back as what they were."""
    module = (ours if converted else theirs)(3, eps=1e-3)
    before, objects = dict(module.__dict__), identities(module)
    assert convert(module, sync=True) is module
    assert type(module) is SyncBatchNorm and module.process_group is None
    assert identities(module) == objects
    module = copy.deepcopy(convert(module, sync=True))
    assert type(convert(module)) is SyncBatchNorm
    assert type(revert(module)) is theirs
    assert list(module.__dict__) == list(before)


def test_sync_of_a_parametrised_module() -> None:
    module = parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", Doubled())
    convert(module, sync=True)
    assert parametrize.type_before_parametrizations(module) is SyncBatchNorm
    revert(module)
    assert parametrize.type_before_parametrizations(module) is nn.BatchNorm2d


def test_users_subclass_of_sync_batch_norm() -> None:
    class Users(nn.SyncBatchNorm):
        pass

    model = nn.Sequential(Users(3), nn.SyncBatchNorm(3))
    assert [type(m) for m in convert(model, sync=True)] == [Users, SyncBatchNorm]
    assert [type(m) for m in revert(model)] == [Users, nn.SyncBatchNorm]


@pytest.mark.parametrize("kind", [nn.LazyBatchNorm2d, batchnorm_cuda.LazyBatchNorm2d])
def test_sync_refuses_lazy_modules_before_any_change(kind: type) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), kind())
    with pytest.raises(ValueError, match=r"no lazy batch norms.*got LazyBatchNorm2d at '1'"):
        convert(model, sync=True)
    assert [type(m) for m in model] == [nn.BatchNorm2d, kind]
    with pytest.raises(ValueError, match="LazyBatchNorm2d at 'its root'"):
        convert(model[1], sync=True)


@pytest.mark.parametrize("change", [convert, revert])
def test_no_module(change) -> None:
    with pytest.raises(TypeError, match=r"expected model to be a torch.nn.Module, got type"):
        change(nn.BatchNorm2d)
