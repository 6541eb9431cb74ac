"""What `fold` leaves as it is, with the reason: whatever it might get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from fold_cases import IN, OUT, assert_folds, assert_stays, both, filled, folds, image, pair, square
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm

import batchnorm_cuda
from batchnorm_cuda import convert, fold, fold_report


class Block(nn.Module):
    """A convolution and a batch norm, in a forward that a test gives."""

    def __init__(self, forward: Callable) -> None:
        super().__init__()
        self.conv = nn.Conv2d(IN, OUT, 3, padding=1)
        self.norm = nn.BatchNorm2d(OUT)
        self.other = nn.Conv2d(IN, OUT, 3, padding=1)
        self.run = forward
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def twice(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y) + y


def returned(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    y = block.conv(x)
    return block.norm(y), y


def in_a_list(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    block.kept.append(y)
    return block.norm(y)


def in_an_attribute(block: Block, x: Tensor) -> Tensor:
    block.last = block.conv(x)
    return block.norm(block.last)


def in_a_closure(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    block.later = lambda: y
    return block.norm(y)


def changed_in_place(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    y.add_(1)
    return block.norm(y)


def changed_through_a_view(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    y[:, 0].zero_()
    return block.norm(y)


def assigned_to(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    y[:, 0] = 0
    return block.norm(y)


def two_layers(block: Block, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + block.norm(block.other(x))


def conv_again(block: Block, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + block.conv(x).relu()


def norm_again(block: Block, x: Tensor) -> Tensor:
    y = block.norm(block.conv(x))
    return block.norm(y) + y


def weight_used(block: Block, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) * block.conv.weight.norm()


def weight_returned(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    return block.norm(block.conv(x)), block.conv.weight


def weights_regularised(block: Block, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + sum(p.square().sum() for p in block.parameters())


def by_function(block: Block, x: Tensor) -> Tensor:
    return block.norm(F.conv2d(x, block.conv.weight))


def past_call(block: Block, x: Tensor) -> Tensor:
    return block.norm.forward(block.conv(x)) + block.norm(block.conv(x))


def not_a_layer(block: Block, x: Tensor) -> Tensor:
    return block.norm(block.conv(x).relu())


def by_the_data(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y) if x.mean() > 100 else y


def by_the_batch(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y) if x.shape[0] == 1 else y


def asks_for_tensors(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y) + y if isinstance(x, Tensor) else block.norm(y)


def given_to_a_function(block: Block, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + first_weight(block, x)


@torch.fx.wrap
def first_weight(block: nn.Module, x: Tensor) -> Tensor:
    return next(block.parameters()).sum() + x.sum()


REFUSED = {
    asks_for_tensors: "what 'conv' (Conv2d) gives is used more than once",
    given_to_a_function: "may be used by the model (Block), which cannot be followed: it is given",
    twice: "what 'conv' (Conv2d) gives is used more than once",
    returned: "goes to who calls the block, or keeps what it gives",
    in_a_list: "goes to who calls the block, or keeps what it gives",
    in_an_attribute: "goes to who calls the block, or keeps what it gives",
    in_a_closure: "goes to who calls the block, or keeps what it gives",
    changed_in_place: "what 'conv' (Conv2d) gives is used more than once",
    changed_through_a_view: "what 'conv' (Conv2d) gives is used more than once",
    assigned_to: "what 'conv' (Conv2d) gives is used more than once",
    two_layers: "it is shared: ",
    conv_again: "'conv' (Conv2d) is also called without it",
    norm_again: "before it is no layer to fold it into, but 'norm' (BatchNorm2d)",
    weight_used: "the weight or bias of 'conv' (Conv2d) is used by itself",
    weight_returned: "the weight or bias of 'conv' (Conv2d) is used by itself",
    weights_regularised: "the weight or bias of 'conv' (Conv2d) is used by itself",
    by_function: "before it is no layer to fold it into, but conv2d",
    past_call: "",  # torch.nn's and ours are seen in other ways
    not_a_layer: "before it is no layer to fold it into, but relu",
    by_the_data: "cannot be followed: TraceError: symbolically traced variables cannot be used",
    by_the_batch: "cannot be followed: TraceError: symbolically traced variables cannot be used",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda forward: forward.__name__)
@both
def test_forwards_that_need_it(aten: Backend, forward: Callable, converted: bool) -> None:
    model = Block(forward)
    assert_stays(convert(model) if converted else model, image(), REFUSED[forward])


# --- modules that are not what they seem --------------------------------------------------------


def hooked(model: nn.Sequential, at: int, kind: str) -> nn.Sequential:
    getattr(model[at], f"register_{kind}")(lambda *_: None)
    return model


def parametrised(model: nn.Sequential, at: int) -> nn.Sequential:
    parametrize.register_parametrization(model[at], "weight", nn.Identity())
    return model


def with_norm(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(IN, OUT, 3), norm)


def replaced_forward() -> nn.Sequential:
    model = pair()
    original = model[0].forward
    model[0].forward = lambda x: 2 * original(x)
    return model


class UsersBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
UNUSUAL = {
    **{
        f"{kind} of {at}": (lambda at=at, kind=kind: hooked(pair(), at, kind), "hooks")
        for at in (0, 1)
        for kind in [*HOOKS, "state_dict_post_hook"]
    },
    "parametrised layer": (lambda: parametrised(pair(), 0), "'0' (ParametrizedConv2d) is param"),
    "parametrised norm": (lambda: parametrised(pair(), 1), "it is parametrised"),
    "spectral norm": (lambda: nn.Sequential(spectral_norm(pair()[0]), pair()[1]), "'0' (Conv2d) h"),
    "pruned": (lambda: nn.Sequential(pruned(pair()[0]), pair()[1]), "'0' (Conv2d) has hooks"),
    "forward of its own": (replaced_forward, "a forward of its own"),
    "subclass": (lambda: with_norm(UsersBatchNorm(OUT)), "its class, UsersBatchNorm, may compute"),
    "statistics of the batch": (
        lambda: with_norm(nn.BatchNorm2d(OUT, track_running_stats=False)),
        "it has no running statistics, and takes those of its batch",
    ),
    "ours of the batch": (
        lambda: with_norm(batchnorm_cuda.BatchNorm2d(OUT, track_running_stats=False)),
        "it has no running statistics, and takes those of its batch",
    ),
    "first": (lambda: nn.Sequential(nn.BatchNorm2d(IN)), "no layer to fold it into, but an input"),
    "before the layer": (
        lambda: nn.Sequential(nn.Conv2d(IN, OUT, 3), nn.ReLU(), nn.BatchNorm2d(OUT)),
        "before it is no layer to fold it into, but '1' (ReLU)",
    ),
    "alone": (lambda: nn.ModuleList([nn.BatchNorm2d(IN)]), "may be used by the model (ModuleList)"),
}


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 3)


@pytest.mark.parametrize("case", UNUSUAL)
def test_modules_that_are_not_what_they_seem(aten: Backend, case: str) -> None:
    make, reason = UNUSUAL[case]
    model = filled(make())
    name = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fold(model)
    assert list(fold_report(model)) == name
    assert reason in fold_report(model)[name[0]]
    assert folds(model) == []
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_training_mode_of_one(aten: Backend) -> None:
    model = nn.Sequential(*pair(), nn.Conv2d(OUT, OUT, 1), nn.BatchNorm2d(OUT)).eval()
    model[1].train()
    assert folds(fold(model)) == ["3"]
    assert fold_report(model)["1"] == "stays: it is in training mode"


def test_training_mode_is_refused() -> None:
    model = pair()
    with pytest.raises(ValueError, match=r"^fold: expected model to be in evaluation mode, got"):
        fold(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert fold_report(model) == {"1": "stays: fold has not seen it"}


@pytest.mark.parametrize("function", [fold, fold_report])
def test_no_module(function: Callable) -> None:
    with pytest.raises(TypeError, match=r"^fold\w*: expected model to be a torch.nn.Module, got "):
        function(nn.BatchNorm2d)


def test_without_values() -> None:
    assert "meta device" in fold_report(fold(pair().to("meta").eval()))["1"]
    lazy = nn.Sequential(nn.Conv2d(IN, OUT, 3), nn.LazyBatchNorm2d()).eval()
    assert "it is lazy" in fold_report(fold(lazy))["1"]
    lazy = nn.Sequential(nn.LazyConv2d(OUT, 3), nn.BatchNorm2d(OUT)).eval()
    assert "'0' (LazyConv2d)" in fold_report(fold(lazy))["1"]


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (nn.Conv2d(IN, OUT, 3), nn.BatchNorm2d(OUT + 1)),
        (nn.Conv2d(IN, OUT, 3), nn.BatchNorm3d(OUT)),
        (nn.Linear(IN, OUT), nn.BatchNorm2d(OUT)),
    ],
    ids=["channels", "dimensions", "linear"],
)
def test_batch_norms_that_do_not_fit(layer: nn.Module, norm: nn.Module) -> None:
    model = nn.Sequential(layer, norm).eval()
    assert (
        f"{norm.num_features} channels of a {type(norm).__name__} are not what a"
        in fold_report(fold(model))["1"]
    )


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_hooks_around(aten: Backend, kind: str) -> None:
    """A hook that sees what the convolution gives, or may exchange it, keeps the batch norm; one
    that sees the block as a whole does not, and is not called while the model is traced."""
    seen = []
    stem, rest = nn.Sequential(nn.Conv2d(IN, OUT, 3)), nn.Sequential(nn.BatchNorm2d(OUT))
    part = stem if kind == "forward_hook" else rest
    getattr(part, f"register_{kind}")(lambda module, *values: seen.append(values))
    model = filled(nn.Sequential(stem, rest)).double()
    assert "hooks of the Sequential around it" in fold_report(fold(model))["1.0"]
    assert not seen

    model = pair()
    getattr(model, f"register_{kind}")(lambda module, *values: seen.append(values))
    assert_folds(model, image(), names=["1"])
    assert all(isinstance(value, Tensor) for values in seen for value in values[-1])


def test_residual_of_the_same_layer(aten: Backend) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(IN, OUT, 3)
            self.norm = batchnorm_cuda.BatchNorm2d(OUT)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y, y)

    assert_stays(Net(), image(), "what 'conv' (Conv2d) gives is used more than once")


def test_shared_pair_and_tied_weights(aten: Backend) -> None:
    """A pair that is called twice is folded; a weight of another layer, too, stays what it was."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Sequential(nn.Conv2d(IN, IN, 1), nn.BatchNorm2d(IN))
            self.tied = nn.Conv2d(IN, IN, 1)
            self.tied.weight = self.pair[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.pair(self.pair(x)))

    model = assert_folds(Net(), image(), names=["pair.1"])
    assert model.tied.weight is not model.pair[0].weight


def test_tracing_leaves_no_traces(aten: Backend) -> None:
    """Attributes, lists and buffers are those from before, whatever the forward does."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = pair()
            self.calls, self.shapes = 0, []
            self.plain = torch.zeros(2)
            self.register_buffer("total", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.new = self.pair(x)
            self.shapes.append(x.shape)
            self.total += 1
            self.total.add_(1)
            return self.new

    class Changing(Counting):
        def forward(self, x: Tensor) -> Tensor:
            self.plain += 1
            return super().forward(x)

    for kind, folded in ((Counting, ["pair.1"]), (Changing, ["pair.1"])):
        model = filled(kind())
        fold(model)
        assert folds(model) == folded, fold_report(model)
        assert model.calls == 0 and not model.shapes and not hasattr(model, "new")
        assert not model.plain.any() and not model.total.any()


def asks_for_its_class(block: Block, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y) if isinstance(block.norm, nn.BatchNorm2d) else y + 1


def asks_for_its_dtype(block: Block, x: Tensor) -> Tensor:
    return block.norm(block.conv(x.to(block.norm.weight.dtype)))


def uses_its_statistics(block: Block, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + block.norm.running_mean.sum()


ASKING = [asks_for_its_class, asks_for_its_dtype, uses_its_statistics]


@pytest.mark.parametrize("forward", ASKING, ids=lambda forward: forward.__name__)
@both
def test_forwards_that_look_at_the_batch_norm(
    aten: Backend, forward: Callable, converted: bool
) -> None:
    """They would go another way without it, which shows once it is folded, and is taken back."""
    model = Block(forward)
    assert_stays(convert(model) if converted else model, image(), "the forward takes another way")


def test_others_are_folded_all_the_same(aten: Backend) -> None:
    model = nn.Sequential(Block(asks_for_its_class), nn.Conv2d(OUT, IN, 1), nn.BatchNorm2d(IN))
    assert_folds(model, image(), names=["2"])


def test_attribute_of_a_batch_norm_of_torch(aten: Backend) -> None:
    """It has no activation, whatever it is given as an attribute."""
    model = pair()
    model[1].activation = "relu"
    assert type(assert_folds(model, image(), names=["1"])[1]) is nn.Identity


def test_weights_without_elements_or_in_other_layouts() -> None:
    model = nn.Sequential(nn.Linear(0, OUT), nn.BatchNorm1d(OUT))
    assert_folds(model, torch.zeros(2, 0, dtype=torch.float64), names=["1"])
    model = nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT)).eval()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    assert "'0' (Linear) has weights of another kind" in fold_report(fold(model))["1"]


def test_attributes_that_cannot_be_written_to(aten: Backend) -> None:
    class Frozen(dict):
        def _refuse(self, *_: Any) -> None:
            raise TypeError("it is frozen")

        clear = update = pop = _refuse

    model = pair()
    model.config = Frozen(a=1)
    assert_folds(model, image(), names=["1"])
    assert model.config == {"a": 1}


def test_values_that_nobody_has_any_more(aten: Backend) -> None:
    """In a reference cycle, until it is collected."""

    def in_a_cycle(block: Block, x: Tensor) -> Tensor:
        y = block.conv(x)
        box = [y]
        box.append(box)
        return block.norm(y)

    assert_folds(Block(in_a_cycle), image(), names=["norm"])


def test_shapes_may_be_asked_for(aten: Backend) -> None:
    def of_a_shape(block: Block, x: Tensor) -> Tensor:
        first = next(block.parameters())
        y = block.conv(x.to(block.conv.weight.dtype).to(first.dtype)[: first.size(0)])
        return block.norm(y).reshape(y.shape[0], y.size(1), -1)

    assert_folds(Block(of_a_shape), image(), names=["norm"])


def test_buffers_may_be_updated(aten: Backend) -> None:
    def counting(block: Block, x: Tensor) -> Tensor:
        block.counter.add_(1)
        return block.norm(block.conv(x))

    model = Block(counting)
    model.register_buffer("counter", torch.zeros(()))
    assert_folds(model, image(), names=["norm"])
    assert model.counter == 1  # by the call after, not by fold


def test_layer_that_is_not_registered(aten: Backend) -> None:
    def by_list(block: Block, x: Tensor) -> Tensor:
        return block.norm(block.kept[0](x))

    model = Block(by_list)
    model.kept.append(nn.Conv2d(IN, OUT, 1).double())
    assert_stays(model, image(), "an unregistered Conv2d comes before it")


@pytest.mark.parametrize("between", ["training", "hook"])
def test_what_does_not_only_hand_on(aten: Backend, between: str) -> None:
    layer, norm = pair()
    model = filled(nn.Sequential(layer, nn.Dropout(), norm))
    if between == "training":
        model[1].train()
    else:
        model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert "but '1' (Dropout)" in fold_report(fold(model))["2"]


def test_wrappers(aten: Backend) -> None:
    model = filled(nn.DataParallel(pair()))
    assert folds(fold(model)) == ["module.1"]


def test_scripted_parts(aten: Backend) -> None:
    model = nn.Sequential(
        torch.jit.script(pair().eval()), nn.Conv2d(OUT, OUT, 1), nn.BatchNorm2d(OUT)
    )
    fold(filled(model))
    assert folds(model) == ["2"]


def test_other_ways_to_call(aten: Backend) -> None:
    """A block is traced in every way in which its arguments can be given."""

    class Optional(nn.Module):
        def __init__(self, use: Callable) -> None:
            super().__init__()
            self.conv, self.norm = square()
            self.use = use

    class Flag(Optional):
        def forward(self, x: Tensor, tap: bool = False) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + (y if tap else 0)

    class Skip(Optional):
        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + (y if skip is not None else 0)

    class Required(Optional):
        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + (y if skip is None else 0)

    class Any_(Optional):
        def forward(self, *inputs: Tensor) -> Tensor:
            return self.norm(self.conv(inputs[0]))

    class Settings(Optional):
        def forward(self, x: Tensor, a: Any = 1, b: Any = 2, c: Any = 3, d: Any = 4, e: Any = 5):
            return self.norm(self.conv(x))

    class Harmless(Optional):
        def forward(self, x: Tensor, skip: Tensor, flag: bool = True, *, y: Any = None) -> Tensor:
            x = self.norm(self.conv(x)) + skip.mean()
            return x.relu() if flag else x

    for kind in (Flag, Skip, Required):
        model = kind(None).eval()
        assert "used more than once" in fold_report(fold(model))["norm"]
    assert "any number of arguments" in fold_report(fold(Any_(None).eval()))["norm"]
    assert "in too many ways" in fold_report(fold(Settings(None).eval()))["norm"]
    model = Harmless(None)
    assert_folds(model, image(), image(), names=["norm"])
