"""`fold` and forwards that torch.fx cannot follow: what they may use by itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from conftest import Backend
from fold_cases import IN, assert_folds, assert_stays, filled, image, square
from torch import Tensor, nn

from batchnorm_cuda import fold, fold_report


class Opaque(nn.Module):
    """Asks for a value of its input, which torch.fx does not have."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) if float(x.sum()) < 1e9 else x


class Calls(Opaque):
    def run(self, x: Tensor) -> Tensor:
        x = self.block(x)
        for i, layer in enumerate(self.layers):
            if i >= 0:
                x = layer(x)
        for name, layer in self.named.items():
            x = layer(x) if name else x
        for one, other in zip(self.layers, reversed(self.layers), strict=True):
            x = one(x) + other(x)
        x = self.layers[0](x)
        if self.block is not None and len(self.layers):
            x = x.to(next(self.parameters()).dtype)
        return self.last(x)


def test_blocks_of_an_opaque_forward(aten: Backend) -> None:
    """What it only calls is folded block by block; its own layers are not."""
    model = Calls(
        block=square(),
        layers=nn.ModuleList([square(), square()]),
        named=nn.ModuleDict({"a": square()}),
        last=nn.BatchNorm2d(IN),
    )
    names = ["block.1", "layers.0.1", "layers.1.1", "named.a.1"]
    assert_folds(model, image(), names=names)
    assert (
        "may be used by the model (Calls), which cannot be followed: "
        in (fold_report(model)["last"])
    )


# Every way in which a forward can get at what is inside a block.


def taps_by_index(self: Opaque, x: Tensor) -> Tensor:
    return self.block[0](x)


def taps_by_loop(self: Opaque, x: Tensor) -> Tensor:
    outputs = []
    for layer in self.block:
        x = layer(x)
        outputs.append(x)
    return outputs[0]


def taps_by_name(self: Opaque, x: Tensor) -> Tensor:
    return self.block.get_submodule("0")(x)


def taps_by_alias(self: Opaque, x: Tensor) -> Tensor:
    block = self.block
    return block[0](x)


def taps_by_method(self: Opaque, x: Tensor) -> Tensor:
    return next(iter(self.children()))[0](x)


def taps_by_function(self: Opaque, x: Tensor) -> Tensor:
    return first_of(self.block)(x)


def taps_by_self(self: Opaque, x: Tensor) -> Tensor:
    return first_of(getattr(self, "block"))(x)  # noqa: B009


def taps_by_list(self: Opaque, x: Tensor) -> Tensor:
    return self.held[0](x)


def taps_by_eval(self: Opaque, x: Tensor) -> Tensor:
    return eval("self.block[0]")(x)


def taps_by_second_name(self: Opaque, x: Tensor) -> Tensor:
    return self.block(x) + self.first(x)


def taps_by_weight(self: Opaque, x: Tensor) -> Tensor:
    return F.conv2d(x, self.block[0].weight, self.block[0].bias)


def taps_by_parameters(self: Opaque, x: Tensor) -> Tensor:
    return F.conv2d(x, *list(self.parameters())[:2])


def taps_in_items(self: Opaque, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = layer[0](x)
    return x


def taps_in_counted_items(self: Opaque, x: Tensor) -> Tensor:
    for _, layer in enumerate(self.layers):
        x = layer[0](x)
    return x


def taps_in_named_items(self: Opaque, x: Tensor) -> Tensor:
    for layer in self.named.values():
        x = layer[0](x)
    return x


def taps_in_an_item(self: Opaque, x: Tensor) -> Tensor:
    return self.layers[0][0](x)


def first_of(block: nn.Module) -> nn.Module:
    return block[0]


TAPS = [
    taps_by_index,
    taps_by_loop,
    taps_by_name,
    taps_by_alias,
    taps_by_method,
    taps_by_function,
    taps_by_self,
    taps_by_list,
    taps_by_eval,
    taps_by_second_name,
    taps_by_weight,
    taps_by_parameters,
    taps_in_items,
    taps_in_an_item,
    taps_in_counted_items,
    taps_in_named_items,
]


@pytest.mark.parametrize("tap", TAPS, ids=lambda tap: tap.__name__)
def test_opaque_forwards_that_reach_into_a_block(aten: Backend, tap: Callable) -> None:
    kind = type("Taps", (Opaque,), {"run": tap})
    block = square()
    model = kind(block=block, held=[])
    if tap is taps_by_list:
        model.held.append(block[0])
    elif tap is taps_by_second_name:
        model.first = block[0]
    elif tap.__name__.startswith("taps_in_"):
        model = kind(layers=nn.ModuleList([block]), named=nn.ModuleDict({"0": block}))
        del model._modules["layers" if tap is taps_in_named_items else "named"]
    (name,) = fold_report(model)
    assert_stays(model, image(), "cannot be followed", name)


def test_opaque_base_class_and_properties(aten: Backend) -> None:
    """What a forward calls is read as well, wherever it is defined."""

    class Base(Opaque):
        @property
        def first(self) -> nn.Module:
            return self.block[0]

        def tap(self, x: Tensor) -> Tensor:
            return self.block[0](x)

    class ByProperty(Base):
        def run(self, x: Tensor) -> Tensor:
            return self.first(x)

    class BySuper(Base):
        def run(self, x: Tensor) -> Tensor:
            return super().tap(x)

    class WithoutSource(Opaque):
        pass

    exec("def run(self, x): return self.block[0](x)", globals_ := {})
    WithoutSource.run = globals_["run"]
    for kind in (ByProperty, BySuper, WithoutSource):
        assert_stays(kind(block=square()), image(), "cannot be followed", "block.1")


@pytest.mark.parametrize("where", ["root", "part"])
def test_call_of_its_own(aten: Backend, where: str) -> None:
    """One that does not end in torch's, and cannot be followed."""

    class Calling(Opaque):
        def __call__(self, x: Tensor) -> Tensor:
            return self.block[0](x) if float(x.sum()) < 1e9 else x

        def run(self, x: Tensor) -> Tensor:
            return self.block(x)

    calling = Calling(block=square())
    model = calling if where == "root" else nn.Sequential(calling)
    name = "block.1" if where == "root" else "0.block.1"
    assert_stays(model, image(), "", name)


def test_signature_that_cannot_be_told(aten: Backend) -> None:
    class Net(Opaque):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

        forward.__signature__ = "none"

    assert_folds(Net(block=square()), image(), names=["block.1"])


def test_opaque_forward_of_the_instance(aten: Backend) -> None:
    """Its class says what is not run."""
    model = Calls(block=square(), layers=nn.ModuleList(), named=nn.ModuleDict(), last=nn.ReLU())
    model.forward = lambda x: model.block[0](x) if float(x.sum()) < 1e9 else x
    fold(filled(model))
    assert "cannot be followed" in fold_report(model)["block.1"]
