"""Which way a call takes, row by row of the tables in batchnorm_cuda/_ops/choice.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import product
from types import ModuleType

import pytest
import torch
from conftest import Backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from batchnorm_cuda._ops import choice, composite
from batchnorm_cuda._ops.calls import Forward, Group

WORLDS = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "compiling": lambda: patched("is_compiling"),
    "torch.jit": lambda: patched("is_tracing"),
    "torch.func": lambda: patched("transforms_active"),
    "forward mode": forward_ad.dual_level,
}


@contextmanager
def patched(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, name, lambda: True)
        yield


def expected(worlds: set[str], kernels: bool, ranks: int) -> str:
    """The table, from its last row to its first."""
    way = "direct" if "no_grad" in worlds else "recorded"
    if ranks > 1:
        return way
    if "compiling" not in worlds:
        if "torch.jit" in worlds:
            way = "direct"
        if {"torch.func", "forward mode"} & worlds:
            way = "in parts"
    return way if kernels else "composite"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("worlds", list(product(WORLDS, WORLDS)), ids=" and ".join)
def test_way_of(backend: Backend, worlds: tuple[str, str], ranks: int) -> None:
    x = torch.zeros(2, 3, device=backend.device)
    group = Group(ranks, "none") if ranks > 1 else None
    call = Forward(x, *(None,) * 5, True, 0.1, 1e-5, group=group)
    with ExitStack() as stack:
        for name in set(worlds):
            stack.enter_context(WORLDS[name]())
        way = choice.way_of(call)
    assert way == expected(set(worlds), backend.has_kernels, ranks)


class Subclass(Tensor):
    pass


def plain(backend: Backend) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, device=backend.device), torch.zeros(3, device=backend.device)


def with_subclass(place: int) -> Callable[[Backend], tuple[Tensor, ...]]:
    def make(backend: Backend) -> tuple[Tensor, ...]:
        tensors = list(plain(backend))
        tensors[place] = tensors[place].as_subclass(Subclass)
        return tuple(tensors)

    return make


SEEN: dict[str, tuple[Callable[[], AbstractContextManager], Callable]] = {
    "compiling": (WORLDS["compiling"], plain),
    "torch.jit": (WORLDS["torch.jit"], plain),
    "dispatch mode": (FakeTensorMode, plain),
    "subclass": (nullcontext, with_subclass(0)),
    "other subclass": (nullcontext, with_subclass(1)),
    "parameter": (nullcontext, lambda backend: (nn.Parameter(plain(backend)[0]),)),
}


@pytest.mark.parametrize("world", SEEN)
def test_the_dispatcher_computes_where_something_looks(backend: Backend, world: str) -> None:
    context, make = SEEN[world]
    tensors = make(backend)
    with context():
        assert choice.computes(tensors, tuple) is choice.dispatcher


@pytest.mark.parametrize("others", [(), (torch.zeros(1),), ("no tensor",)], ids=str)
def test_else_who_has_the_device(
    backend: Backend, extension: ModuleType, others: tuple[object, ...]
) -> None:
    x, _ = plain(backend)
    expected = extension if backend.has_kernels else composite
    assert choice.computes((x, *others), tuple) is expected
    with FakeTensorMode():
        assert choice.implementation(x) is expected


@pytest.mark.parametrize("worlds", list(product(WORLDS, WORLDS)), ids=" and ".join)
def test_is_recorded(monkeypatch: pytest.MonkeyPatch, worlds: tuple[str, str]) -> None:
    with ExitStack() as stack:
        for name in set(worlds):
            stack.enter_context(WORLDS[name]())
        assert choice.is_recorded() == (
            "no_grad" not in worlds or bool({"torch.func", "forward mode"} & set(worlds))
        )
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not choice.is_recorded()
