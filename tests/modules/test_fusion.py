"""`convert(fuse=True)`: what is fused, what stays as it was, and what a forecast is worth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import fusion_models
import pytest
import torch
from conftest import Backend
from fusion_models import AWKWARD, FUSED, Model
from torch import Tensor, nn

from batchnorm_cuda import convert, fusion_report, modules
from batchnorm_cuda._fusion.forecast import Found, Fusion
from batchnorm_cuda._ops.calls import Forward

TIGHT = {"rtol": 1e-10, "atol": 1e-11}  # of float64
every_model = pytest.mark.parametrize("behind", AWKWARD, ids=lambda f: f.__name__)
fused_models = pytest.mark.parametrize("behind", FUSED, ids=lambda f: f.__name__)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each batch norm that was computed did beside: "add", "relu", "add, relu" or ""."""
    seen = []
    normalize = modules.normalize

    def record(call: Forward) -> Tensor:
        residual = ["add"] * (call.residual is not None)
        seen.append(", ".join([*residual, call.activation] if call.relu else residual))
        return normalize(call)

    monkeypatch.setattr(modules._KernelForward, "_normalize", staticmethod(record))
    return seen


def pair(behind: Callable, backend: Backend, training: bool = True) -> tuple[Model, Model]:
    """The model as it was, and fused."""
    theirs = Model(behind).to(backend.device, torch.float64).train(training)
    return theirs, convert(copy.deepcopy(theirs), fuse=True)


def inputs(backend: Backend, count: int = 3) -> Iterator[Tensor]:
    for i in range(count):
        x = torch.randn(2, fusion_models.C, 5, 5, dtype=torch.float64) + 0.3 * (i - 1)
        yield x.to(backend.device)


def step(model: Callable, owner: nn.Module, x: Tensor, grad: bool) -> dict[str, Any]:
    """Outputs, the state after them, and gradients."""
    leaf = x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        output = model(leaf * 1)  # which may be overwritten, as a leaf may not
    results = {f"state of {k}": v.clone() for k, v in owner.state_dict().items()}
    output = output if isinstance(output, tuple) else (output,)
    if grad:
        owner.zero_grad()
        loss = sum(tensor.double().pow(2).sum() for tensor in output)
        loss.backward()
        wanted = {"input": leaf, **dict(owner.named_parameters())}
        results |= {f"gradient of {k}": v.grad for k, v in wanted.items() if v.grad is not None}
    return {**results, **{f"output {i}": tensor.detach() for i, tensor in enumerate(output)}}


def refuses_reentrant(behind: Callable) -> bool:
    return behind is fusion_models.reentrant_checkpoint_ends_between


# --- what is fused ------------------------------------------------------------------------------


@fused_models
@both_modes
def test_every_way_to_write_it(
    backend: Backend, runs: list[str], behind: Callable, training: bool
) -> None:
    theirs, ours = pair(behind, backend, training)
    (row,) = fusion_report(ours).batch_norms
    assert (row.name, row.training, row.evaluation, row.reason) == (
        *("bn", FUSED[behind], FUSED[behind]),
        None,
    )
    for x in inputs(backend):
        for grad in (True, False):
            runs.clear()
            got = step(ours, ours, x, grad)
            assert runs == [FUSED[behind]]
            torch.testing.assert_close(got, step(theirs, theirs, x, grad), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(backend: Backend, dtype: torch.dtype) -> None:
    """relu(bn(x) + x) is that of the fused call to the bit, and not that of two roundings."""
    _, ours = pair(fusion_models.added, backend)
    ours.to(dtype).bn.float()
    x = next(inputs(backend)).to(dtype)
    expected = copy.deepcopy(ours.bn)
    del expected._fusion
    expected.activation = "relu"
    want = expected(ours.conv(x), x)
    assert torch.equal(ours(x), want)


def test_one_mode_only(backend: Backend, runs: list[str]) -> None:
    theirs, ours = pair(fusion_models.training_mode_only, backend)
    (row,) = fusion_report(ours).batch_norms
    assert (row.training, row.evaluation) == ("relu", None)
    assert row.reason == "its output goes to mul"
    assert str(row) == "bn: relu in training, not fused in evaluation (its output goes to mul)"
    for training in (True, False, True):
        for net in (theirs, ours):
            net.train(training)
        for x in inputs(backend, 1):
            torch.testing.assert_close(
                step(ours, ours, x, True), step(theirs, theirs, x, True), **TIGHT
            )
    assert runs == ["relu", "", "relu"]


@pytest.mark.parametrize("kind", ["1d", "3d", "sync", "lazy"])
def test_other_batch_norms(backend: Backend, runs: list[str], kind: str) -> None:
    shape = {"1d": (4, 3, 5), "3d": (2, 3, 2, 3, 2)}.get(kind, (2, 3, 4, 4))
    batch_norm = {
        "1d": nn.BatchNorm1d(3),
        "3d": nn.BatchNorm3d(3),
        "sync": nn.BatchNorm2d(3),
        "lazy": nn.LazyBatchNorm2d(),
    }[kind]
    model = nn.Sequential(batch_norm, nn.ReLU()).to(backend.device)
    expected = nn.Sequential(getattr(nn, f"BatchNorm{len(shape) - 2}d")(3), nn.ReLU())
    expected.to(backend.device)
    convert(model, fuse=True, sync=kind == "sync")
    assert fusion_report(model).batch_norms[0].training == "relu"
    x = torch.randn(shape).to(backend.device)
    torch.testing.assert_close(model(x), expected(x))
    if kind != "sync":
        assert runs == ["relu"]


def test_report_of_a_model() -> None:
    class Users(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Users(3), nn.BatchNorm2d(3))
    assert str(fusion_report(convert(model))) == (
        "0 of 3 batch norms fused\n"
        "0: not fused (convert(model, fuse=True) has not seen it)\n"
        "2: not fused (Users is not a class that convert exchanges)\n"
        "3: not fused (convert(model, fuse=True) has not seen it)"
    )
    model = convert(model, fuse=True)
    model[0].register_forward_hook(lambda *_: None)
    assert [row.reason for row in fusion_report(model).batch_norms] == [
        "a forward hook gets its output",
        "Users is not a class that convert exchanges",
        "its output goes to the caller",
    ]
    assert fusion_report(nn.BatchNorm2d(3)).batch_norms[0].reason is not None
    alone = convert(nn.BatchNorm2d(3), fuse=True)
    assert fusion_report(alone).batch_norms[0].reason == "it is the whole model"
    with pytest.raises(TypeError, match=r"fusion_report: expected model.*got Tensor"):
        fusion_report(torch.zeros(1))


REASONS = {
    "used_twice": r"its output is used 2 times, by relu \(ReLU\) and add",
    "returned_alone": "its output goes to the caller",
    "residual_modified": "mul_ overwrites what it is computed from",
    "added_in_place_to_the_other": "it is added in place to another tensor",
    "shared": "it is called 3 times",
    "branch_on_data": "torch.fx cannot trace the model, which calls it: TraceError: .*control flow",
    "every_second_call": "Model sets calls when it runs",
    "activation_without_gradient": r"a checkpoint or a gradient mode ends between it and relu.*",
    "other_activation": "its output goes to softplus",
    "own_function": "its output goes to Halved",
    "unused": "its output is not used",
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(aten: Backend, name: str) -> None:
    _, ours = pair(getattr(fusion_models, name), aten)
    assert_matches(fusion_report(ours).batch_norms[0].reason, REASONS[name])


def assert_matches(text: str | None, pattern: str) -> None:
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        raise ValueError(text)


# --- what is never wrong ------------------------------------------------------------------------


@every_model
@both_modes
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_same_results(backend: Backend, behind: Callable, training: bool) -> None:
    theirs, ours = pair(behind, backend, training)
    for x in inputs(backend):
        for grad in (True, False):
            want = step(theirs, theirs, x, grad)
            torch.testing.assert_close(step(ours, ours, x, grad), want, **TIGHT)


# With a forecast that is wrong. What leaves the model before anybody looks at it is late with the
# running statistics; two calls of one batch norm at once update them in the order of their uses; a
# checkpoint does not update them again. None of these has such a forecast.
LATE = {
    "returned_alone",
    "branch_on_the_input",
    "every_second_call",
    "evaluation_only",
    "both_sides",
    "checkpoint_ends_between",
}
# An error, because what is needed is not there any more, or cannot be intercepted.
REFUSED = {
    "residual_modified": "expected what a batch norm with fuse=True is computed from to stay",
    "own_function": "got a use past them, such as by torch.autograd.Function",
    "own_function_that_does_not_look": "got a use past them, such as by torch.autograd.Function",
    "reentrant_checkpoint_ends_between": "got a use past them",
}


def waits_too_long(name: str, found: Found) -> bool:
    return name != "residual_modified" or found.waits


@every_model
@both_modes
@pytest.mark.parametrize("found", [Found(True, "relu"), Found(True)], ids=str)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_wrong_forecast(aten: Backend, behind: Callable, training: bool, found: Found) -> None:
    """The model is computed as it runs, whatever has been expected of it."""
    theirs, ours = pair(behind, aten, training)
    ours.bn._fusion = Fusion(found, found)
    name = behind.__name__
    for x in inputs(aten):
        for grad in (True, False):
            want = step(theirs, theirs, x, grad)
            if name in REFUSED and (grad or "own" not in name) and waits_too_long(name, found):
                with pytest.raises(RuntimeError, match=REFUSED[name]):
                    step(ours, ours, x, grad)
                return
            got = step(ours, ours, x, grad)
            if name in LATE:
                got, want = ({k: v for k, v in r.items() if "state" not in k} for r in (got, want))
                ours.load_state_dict(theirs.state_dict())
            torch.testing.assert_close(got, want, **TIGHT)


# --- several batch norms in a sum ---------------------------------------------------------------


class Sum(nn.Module):
    """Branches that are added in one of several ways, and a ReLU: RepVGG and its like."""

    def __init__(self, branches: int, total: Callable) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(fusion_models.C) for _ in range(branches))
        self.relu = nn.ReLU(inplace=True)
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.total([norm(x * (i + 1)) for i, norm in enumerate(self.norms)]))


def in_place(branches: list[Tensor]) -> Tensor:
    total = branches[0] + branches[1]
    for branch in branches[2:]:
        total += branch
    return total


def backwards_in_place(branches: list[Tensor]) -> Tensor:
    return in_place(branches[::-1])


def all_in_place(branches: list[Tensor]) -> Tensor:
    total, *others = branches
    for branch in others:
        total += branch
    return total


def chained(branches: list[Tensor]) -> Tensor:
    total, *others = branches
    for branch in others:
        total = total + branch
    return total


def balanced(branches: list[Tensor]) -> Tensor:
    return (branches[0] + branches[1]) + (branches[2] + branches[3])


def by_sum(branches: list[Tensor]) -> Tensor:
    return sum(branches)


def from_zero_in_place(branches: list[Tensor]) -> Tensor:
    total = branches[0] + 0
    for branch in branches[1:]:
        total += branch
    return total + 0


def copied_by_zero(branches: list[Tensor]) -> Tensor:
    first = branches[0] + 0
    first += branches[1]
    return first + branches[0]


def used_in_between(branches: list[Tensor]) -> Tensor:
    total = branches[0] + branches[1]
    twice = 2 * total
    total += branches[2]
    return total + twice + branches[3]


# What is computed, in this order.
SUMS = {
    in_place: ["", "add", "add", "add, relu"],
    backwards_in_place: ["", "add", "add", "add, relu"],
    all_in_place: ["", "add", "add", "add, relu"],
    chained: ["", "add", "add", "add, relu"],
    balanced: ["", "", "add", "add"],
    by_sum: ["", "add", "add", "add, relu"],
    from_zero_in_place: ["", "add", "add", "add, relu"],
    copied_by_zero: None,
    used_in_between: None,
}


@pytest.mark.parametrize("total", SUMS, ids=lambda f: f.__name__)
@both_modes
def test_sums(backend: Backend, runs: list[str], total: Callable, training: bool) -> None:
    theirs = Sum(4, total).to(backend.device, torch.float64).train(training)
    ours = convert(copy.deepcopy(theirs), fuse=True)
    for x in inputs(backend):
        for grad in (True, False):
            runs.clear()
            got = step(ours, ours, x, grad)
            assert SUMS[total] is None or runs == SUMS[total]
            torch.testing.assert_close(got, step(theirs, theirs, x, grad), **TIGHT)


def with_forecast(backend: Backend) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """A batch norm, and one that expects a ReLU behind it."""
    theirs = nn.BatchNorm2d(fusion_models.C).to(backend.device)
    model = nn.Sequential(copy.deepcopy(theirs), nn.ReLU())
    ours, _ = convert(model, fuse=True)
    return theirs, ours


def test_statistics_after_an_error(backend: Backend) -> None:
    """What was added is refused; the batch norm itself is used afterwards, and counts once."""
    theirs, ours = with_forecast(backend)
    (x,) = inputs(backend, 1)
    results = []
    for module in (theirs, ours):
        y = module(x.float())
        with pytest.raises(RuntimeError):
            torch.relu(y + torch.empty_like(y, device="meta"))
        results.append((torch.relu(y), module.num_batches_tracked, module.running_mean))
    torch.testing.assert_close(*results)


def test_a_sparse_residual(backend: Backend) -> None:
    theirs, ours = with_forecast(backend)
    (x,) = inputs(backend, 1)
    residual = torch.eye(5, device=x.device).expand_as(x).to_sparse()
    results = [torch.relu(module(x.float()) + residual) for module in (theirs, ours)]
    torch.testing.assert_close(*results)
