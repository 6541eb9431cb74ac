"""A fused model is the model that it was: objects, hooks, copies, and all that is done with it."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import fusion_models
import pytest
import torch
from conftest import Backend
from fusion_models import Model
from test_convert import identities
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import batchnorm_cuda
from batchnorm_cuda import convert, fusion_report, revert
from batchnorm_cuda._fusion.forecast import Found
from batchnorm_cuda._fusion.pending import Pending

TIGHT = {"rtol": 1e-10, "atol": 1e-11}  # of float64


class Block(nn.Module):
    """torchvision's BasicBlock, with a downsampling branch."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(in_place)
        self.in_place = in_place
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.in_place:
            out += self.downsample(x)
        else:
            out = out + self.downsample(x)
        return self.relu(out)

    def other(self) -> str:
        return "other"


def network() -> nn.Module:
    return nn.Sequential(Block(), Block())


TAKEN = ["relu", "add, relu", None] * 2


def taken(model: nn.Module) -> list[str | None]:
    return [row.training for row in fusion_report(model).batch_norms]


def batch(backend: Backend) -> Tensor:
    return torch.randn(2, 4, 6, 6, dtype=torch.float64).to(backend.device)


def pair(backend: Backend, make: Callable = network) -> tuple[nn.Module, nn.Module]:
    theirs = make().to(backend.device, torch.float64)
    return theirs, convert(copy.deepcopy(theirs), fuse=True)


def shape_of(model: nn.Module) -> dict[str, Any]:
    """What can be seen of a model: its objects, classes, state, hooks and text."""
    modules = dict(model.named_modules())
    return {
        "objects": identities(model),
        "classes": {name: type(module) for name, module in modules.items()},
        "attributes": {name: list(module.__dict__) for name, module in modules.items()},
        "keys": list(model.state_dict()),
        "text": repr(model),
    }


def test_only_batch_norms_change() -> None:
    model = network()
    model.register_forward_hook(lambda *_: None)
    before = shape_of(model)
    assert convert(model, fuse=True) is model
    after = shape_of(model)
    for key in ("objects", "keys", "text"):
        assert after[key] == before[key]
    for name, kind in after["classes"].items():
        exchanged = before["classes"][name] is nn.BatchNorm2d
        assert kind is (batchnorm_cuda.BatchNorm2d if exchanged else before["classes"][name])
    assert model[0].other() == "other" and taken(model) == TAKEN
    assert taken(convert(model)) == taken(convert(model, fuse=True)) == TAKEN
    revert(model)
    assert shape_of(model) == before


def test_reverted_to_the_bit(backend: Backend) -> None:
    theirs, ours = pair(backend)
    x = batch(backend)
    ours(x)
    revert(ours).load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(backend: Backend, way: str) -> None:
    _, ours = pair(backend)
    x = batch(backend)
    if way == "deepcopy":
        twin = copy.deepcopy(ours)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert taken(twin) == TAKEN
    assert torch.equal(twin(x), ours(x))
    twin.load_state_dict(ours.state_dict())


def test_hooks(backend: Backend) -> None:
    """On a batch norm, on an activation, on a container that hands the output on, on a block."""
    # Autograd forbids in-place operations on what a backward hook has seen.
    theirs, ours = pair(backend, lambda: nn.Sequential(Block(False), Block(False)))
    assert taken(ours) == TAKEN
    for model in (theirs, ours):
        model.log = []

        def record(module: nn.Module, args: Any, output: Tensor, log: list = model.log) -> None:
            log.extend([*args, output])

        for place in ("0.bn1", "0.relu", "0.downsample", "1.bn2", "1"):
            model.get_submodule(place).register_forward_hook(record)

        def backward(module: nn.Module, grads: Any, other: Any, log: list = model.log) -> None:
            log.extend([*grads, *other])

        for place in ("0.bn2", "1.bn1", "1.downsample", "1"):
            model.get_submodule(place).register_full_backward_hook(backward)
        model[1].bn1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    x = batch(backend)
    for _ in range(2):
        for model in (theirs, ours):
            model.log.clear()
            model(x.clone().requires_grad_()).sum().backward()
        torch.testing.assert_close(ours.log, theirs.log, **TIGHT)
        assert {type(tensor) for tensor in ours.log} == {Tensor}


def test_hook_that_keeps_a_container_s_output(backend: Backend) -> None:
    """And looks at it after the model has run."""
    theirs, ours = pair(backend, lambda: nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)), nn.ReLU()))
    assert taken(ours) == ["relu"]
    kept = []
    for model in (theirs, ours):
        model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    x = batch(backend)
    torch.testing.assert_close(ours(x), theirs(x), **TIGHT)
    torch.testing.assert_close(*kept, **TIGHT)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **TIGHT)


def test_hook_that_keeps_the_output(backend: Backend) -> None:
    """And looks at it after the weights have changed."""
    theirs, ours = pair(backend)
    kept = []
    x = batch(backend)
    for model in (theirs, ours):
        model[0].relu.inplace = False
        model[0].bn1.register_forward_hook(lambda module, args, output: kept.append(output))
        model(x).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(*kept, **TIGHT)


def test_hooks_before_the_conversion(backend: Backend) -> None:
    """What an activation's hooks get is not what waits; nor what a hook of a container gets."""
    theirs, _ = pair(backend, lambda: nn.Sequential(Block(False), nn.Sequential(Block(False))))
    kept = []
    for place in ("0.relu", "1.0.relu"):
        theirs.get_submodule(place).register_forward_pre_hook(lambda _, args: kept.extend(args))
    ours = convert(copy.deepcopy(theirs), fuse=True)
    rows = fusion_report(ours).batch_norms
    assert rows[0].reason == "0.relu (ReLU) has hooks, or a forward of its own"
    assert taken(ours) == [None, "add", None] * 2
    x = batch(backend)
    torch.testing.assert_close(ours(x), theirs(x), **TIGHT)
    torch.testing.assert_close(kept[:4], kept[4:], **TIGHT)


def test_folded_afterwards(backend: Backend) -> None:
    theirs, ours = pair(backend, lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Block()))
    x = batch(backend)
    theirs.eval()
    torch.testing.assert_close(batchnorm_cuda.fold(ours.eval())(x), theirs(x), **TIGHT)
    assert not fusion_report(ours).batch_norms
    assert not any("_fusion" in vars(module) for module in ours.modules())


def test_changed_after_the_conversion(backend: Backend) -> None:
    """Another activation, another path, a part of a Sequential: what runs is what counts."""
    theirs, ours = pair(backend)
    x = batch(backend)
    for model in (theirs, ours):
        model[0].relu = nn.Sigmoid()
        model[1].downsample = nn.Identity()
        model[1].relu = nn.Identity()
    torch.testing.assert_close(ours(x), theirs(x), **TIGHT)
    theirs, ours = pair(backend, lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()))
    torch.testing.assert_close(ours[:1](x), theirs[:1](x), **TIGHT)
    torch.testing.assert_close(ours[0](x) * 2, theirs[0](x) * 2, **TIGHT)
    ours[0].activation = "relu"  # the user's own, whatever follows
    torch.testing.assert_close(ours[:1](x), theirs[:2](x), **TIGHT)


def test_train_and_eval_of_a_part(backend: Backend) -> None:
    """Frozen batch norms in a model that trains."""
    theirs, ours = pair(backend)
    x = batch(backend)
    for model in (theirs, ours):
        model(x)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    torch.testing.assert_close(ours(x), theirs(x), **TIGHT)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **TIGHT)


def test_parametrised(backend: Backend) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    theirs = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).to(backend.device, torch.float64)
    parametrize.register_parametrization(theirs[0], "weight", Doubled())
    ours = convert(copy.deepcopy(theirs), fuse=True)
    assert taken(ours) == ["relu"]
    x = batch(backend)
    torch.testing.assert_close(ours(x), theirs(x), **TIGHT)
    assert type(revert(ours)[0]).__name__ == "ParametrizedBatchNorm2d"


def test_a_part_of_a_model_is_converted(backend: Backend) -> None:
    theirs, _ = pair(backend)
    ours = copy.deepcopy(theirs)
    convert(ours[1], fuse=True)
    assert taken(ours) == [None] * 3 + TAKEN[:3]
    x = batch(backend)
    torch.testing.assert_close(ours(x), theirs(x), **TIGHT)


def test_the_finder_leaves_no_trace() -> None:
    """Attributes, lists, buffers and hooks are not touched by the forward that it tries."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu, self.calls, self.seen = nn.BatchNorm2d(4), nn.ReLU(), 0, []
            self.register_buffer("count", torch.zeros(()))
            self.hooked = []
            self.register_forward_hook(lambda *_: self.hooked.append(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(x)
            self.count.add_(1)
            return self.relu(self.bn(x)) if torch.rand(()) * random.random() < 2 else x

    model = Counting()
    drawn = torch.get_rng_state(), random.getstate()
    convert(nn.Sequential(model), fuse=True)
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert (model.calls, model.seen, model.hooked, int(model.count)) == (0, [], [], 0)
    row = fusion_report(model).batch_norms[0]
    assert row.reason == "Counting sets calls, seen when it runs"


class Writes(nn.Module):
    """Cannot be traced, and overwrites what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if bool(x.abs().sum() > 0) else x


OVERWRITE: dict[str, Callable] = {
    "in place": lambda m, z: z.mul_(2),
    "data": lambda m, z: z.data.mul_(2),
    "view": lambda m, z: z.view(-1).mul_(2),
    "transposed": lambda m, z: z.mT.mul_(2),
    "cast": lambda m, z: z.double().mul_(2),
    "out": lambda m, z: torch.mul(z, 2, out=z),
    "dropout": lambda m, z: m.drop(z).mul_(2),
    "functional dropout": lambda m, z: torch.nn.functional.dropout(z, 0.5, False).mul_(2),
    "activation": lambda m, z: m.relu_(z),
    "opaque": lambda m, z: m.writes(z),
}


@pytest.mark.parametrize("way", OVERWRITE)
@pytest.mark.parametrize("place", ["input", "residual"])
def test_what_it_is_computed_from_is_overwritten(backend: Backend, way: str, place: str) -> None:
    """Before the activation, in ways of which version counters do not show all."""

    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu, self.relu_ = nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU(inplace=True)
            self.drop, self.writes = nn.Dropout(), Writes()

        def forward(self, x: Tensor) -> Tensor:
            z = x * 3
            y = self.bn(z if place == "input" else x)
            y = y + z if place == "residual" else y
            OVERWRITE[way](self, z)
            return self.relu(y) + z

    theirs, ours = pair(backend, Overwritten)
    x = batch(backend)
    with torch.no_grad():
        assert fusion_report(ours).batch_norms[0].evaluation is None
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **TIGHT)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_modes_stay(aten: Backend) -> None:
    """Of scripted parts, too, which keep theirs in C++."""
    scripted = torch.jit.script(nn.Dropout(0.5))  # in training mode
    model = nn.Sequential(nn.BatchNorm2d(4).eval(), nn.ReLU(), scripted, nn.Dropout())
    before = [module.training for module in model.modules()]
    convert(model, fuse=True)
    assert [module.training for module in model.modules()] == before
    assert taken(model) == ["relu"]


def test_what_cannot_be_traced_is_a_single_step() -> None:
    """The modules in it are looked at by themselves, and those around it go on without it."""

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.inner(x) if x.sum() > 0 else x)

    inner = nn.Sequential(nn.BatchNorm2d(4), Opaque())
    model = nn.Sequential(inner, nn.BatchNorm2d(4), nn.ReLU())
    convert(model, fuse=True)
    rows = {row.name: (row.training, row.reason) for row in fusion_report(model).batch_norms}
    assert rows["0.1.inner.0"] == ("relu", None) and rows["1"] == ("relu", None)
    assert rows["0.0"] == (None, "its output goes to 0.1 (Opaque)")
    assert rows["0.1.inner.2"][1] == "its output goes to the caller"
    assert rows["0.1.bn"][1].startswith("torch.fx cannot trace 0.1, which calls it: TraceError: ")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpoint_ends_in_between(aten: Backend, reentrant: bool) -> None:
    """What is computed anew for the backward is computed as it was."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(checkpoint(lambda x: self.bn(x * x), x, use_reentrant=reentrant))

    theirs, ours = pair(aten, Checkpointed)
    assert taken(ours) == [None]
    x = batch(aten)
    for model in (theirs, ours):
        model(x.clone().requires_grad_()).sum().backward()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **TIGHT)
    torch.testing.assert_close(ours.bn.weight.grad, theirs.bn.weight.grad, **TIGHT)


# --- the waiting output -------------------------------------------------------------------------


def waiting(backend: Backend, found: Found | None = None) -> tuple[Pending, nn.Module]:
    """An output that waits, and the model that made it."""
    _, ours = pair(backend, lambda: Model(fusion_models.module))
    y = ours.bn(batch(backend).requires_grad_())
    assert type(y) is Pending
    return y, ours


LOOKS = {
    "shape": lambda y: y.shape,
    "grad_fn": lambda y: y.grad_fn.name(),
    "repr": repr,
    "numpy": lambda y: y.detach().numpy(),
    "deepcopy": lambda y: copy.deepcopy(y.detach()),
    "pickle": lambda y: pickle.dumps(y),
    "len": len,
    "iter": list,
    "index": lambda y: y[0],
    "compare": lambda y: bool((y == y).all()),
    "assignment": lambda y: y.__setitem__(0, 0.0),
    "data_ptr": lambda y: y.data_ptr(),
    "functional": lambda y: torch.nn.functional.max_pool2d(y, 2),
    "list": lambda y: torch.cat([y, y]),
    "operator": lambda y: torch.ops.aten.sin(y),
    "dlpack": lambda y: torch.from_dlpack(y.detach()),
}


@pytest.mark.parametrize("look", LOOKS)
def test_any_look_makes_it_an_ordinary_tensor(aten: Backend, look: str) -> None:
    y, ours = waiting(aten)
    alias = y
    assert isinstance(y, Tensor)
    LOOKS[look](y)
    assert type(y) is Tensor and alias is y and not y.__dict__
    assert int(ours.bn.num_batches_tracked) == 1
    y.sum().backward()
    assert ours.bn.weight.grad is not None


def test_unused_outputs_update_the_statistics(backend: Backend) -> None:
    theirs, ours = pair(backend, lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    x = batch(backend)
    theirs[0](x)
    assert type(ours[0](x)) is Pending
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **TIGHT)
    y = ours[0](x)
    z = ours[1](y)
    assert torch.equal(z, y.relu())  # y is computed once more, without counting the batch twice
    del y
    assert int(ours[0].num_batches_tracked) == 2


def test_as_an_argument_of_a_batch_norm(backend: Backend) -> None:
    y, ours = waiting(backend)
    x = y.call.record.input
    expected = copy.deepcopy(ours.bn)
    del expected._fusion
    fused = batchnorm_cuda.BatchNorm2d(4, activation="relu").to(backend.device, torch.float64)
    want = fused(x, expected(x))
    torch.testing.assert_close(fused(x, y), want, **TIGHT)
    assert type(y) is Tensor and want.requires_grad
    y = ours.bn(x)
    torch.testing.assert_close(fused(y), fused(expected(x)), **TIGHT)
    torch.testing.assert_close(fused(x, ours.bn(x)), fused(x, expected(x)), **TIGHT)


def test_weak_references(aten: Backend) -> None:
    import weakref

    y, ours = waiting(aten)
    reference = weakref.ref(y)
    value = y * 1
    assert reference() is y
    assert torch.equal(y * 1, value) and torch.equal(torch.relu(y), value.relu())
    assert int(ours.bn.num_batches_tracked) == 1


@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_changes_while_it_waits_are_errors(aten: Backend, name: str) -> None:
    _, ours = pair(aten, lambda: Model(fusion_models.added))
    with torch.no_grad():
        x = batch(aten)
        residual = x * 2
        y = ours.bn(x) + residual
        changed = {"input": x, "residual": residual, **dict(ours.bn.named_parameters())}[name]
        changed.mul_(2)
        with pytest.raises(RuntimeError, match="got a change in place before"):
            ours.relu(y)


def test_changed_statistics_in_evaluation(aten: Backend) -> None:
    _, ours = pair(aten, lambda: Model(fusion_models.module))
    ours.eval()
    with torch.no_grad():
        y = ours.bn(batch(aten))
        ours.bn.running_var.mul_(2)
        with pytest.raises(RuntimeError, match="got a change in place before"):
            y.sum()


def test_inference_mode(backend: Backend) -> None:
    theirs, ours = pair(backend)
    x = batch(backend)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x * 1), theirs.eval()(x * 1), **TIGHT)


def test_transforms(aten: Backend) -> None:
    """torch.func and forward mode count on what runs when: nothing waits there."""
    theirs, ours = pair(aten)
    x = batch(aten)
    theirs.eval(), ours.eval()
    kinds = []
    torch.func.vmap(lambda x: kinds.append(type(ours[0].bn1(x))) or x)(x[None])
    assert kinds == [Tensor]
    results = []
    for model in (theirs, ours):
        call = lambda x, model=model: torch.func.functional_call(model, dict(model.state_dict()), x)  # noqa: E731
        results.append(
            [
                torch.func.vmap(call)(x[None])[0],
                torch.func.grad(lambda x: call(x).sum())(x),  # noqa: B023
                torch.func.jvp(call, (x,), (x,))[1],
            ]
        )
    torch.testing.assert_close(*results, **TIGHT)


def test_double_backward(backend: Backend) -> None:
    theirs, ours = pair(backend)
    x = batch(backend)
    grads = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).pow(2).sum(), leaf, create_graph=True)
        grads.append(torch.autograd.grad(grad.pow(2).sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)
