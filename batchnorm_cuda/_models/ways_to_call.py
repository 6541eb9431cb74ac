"""The ways in which a module's forward can be called, and what is traced for one of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

# Calls of a forward that differ in what is given for its arguments; each is a trace.
_MOST_VARIANTS = 16


class TooManyWays(Exception):
    """A forward that can be called in more ways than can be tried."""


_TENSOR = object()  # stands for an argument that is given as a proxy


def variants_of(block: nn.Module) -> Iterator[tuple[dict[str, Any], bool]]:
    """The ways to call the block whose graphs may differ, and whether it has to take them.

    Of an argument with a default, it and a tensor; of a flag, both values; else a tensor. Code that
    is not seen may pass None for a tensor that is not the first, if the block takes that.
    """
    choices, needed = {}, set()
    for name, parameter in inspect.signature(block.forward).parameters.items():
        default = parameter.default
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TooManyWays("it takes any number of arguments")
        if isinstance(default, bool):
            choices[name] = [default, not default]
        elif default is not parameter.empty:
            choices[name] = [default, _TENSOR]
        else:
            needed.add(name)
            choices[name] = [_TENSOR, None] if len(needed) > 1 else [_TENSOR]
    ways = itertools.product(*choices.values())
    for tried, way in enumerate(ways):
        if tried == _MOST_VARIANTS:
            raise TooManyWays("its arguments can be given in too many ways")
        arguments = dict(zip(choices, way, strict=True))
        yield arguments, all(arguments[name] is not None for name in needed)


class Caller(nn.Module):
    """What is traced in place of a block: a call of it."""

    def __init__(self, block: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.block = block
        self.arguments = arguments
        self.tracer: Any = None  # of `traced_calls`

    def forward(self) -> tuple[()]:
        positional, by_name = [], {}
        parameters = inspect.signature(self.block.forward).parameters
        for name, value in self.arguments.items():
            if value is _TENSOR:
                value = self.tracer.create_proxy("placeholder", name, (), {})
            if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
                by_name[name] = value
            else:
                positional.append(value)
        self.tracer.note_kept(self.block(*positional, **by_name))
        return ()
