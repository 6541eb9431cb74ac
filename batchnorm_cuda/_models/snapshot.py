"""What is put back after something has been tried with a model: its modules, and random numbers."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Of these the contents are put back. A subclass may forbid that, or do more.
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_PLAIN = (bool, int, float, str)


class Snapshot:
    """Modules as they are: class, attributes, and the contents of lists and dicts in these."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before = []
        for module in modules:
            attributes = dict(vars(module))
            containers = [
                (value, _contents(value))
                for value in attributes.values()
                if type(value) in _CONTAINERS
            ]
            self._before.append((module, type(module), attributes, containers))

    def changed(self) -> dict[nn.Module, list[str]]:
        """Attributes that were set since, or their contents were. Of buffers that is data."""
        found = {}
        for module, _, before, containers in self._before:
            contents = {id(container): content for container, content in containers}
            names = [
                name
                for name, value in vars(module).items()
                if name not in ("_buffers", "training")
                and not (
                    name in before
                    and _same(value, before[name])
                    and (id(value) not in contents or _same(_contents(value), contents[id(value)]))
                )
            ]
            if names:
                found[module] = names
        return found

    def restore(self) -> None:
        for module, kind, attributes, containers in self._before:
            if type(module) is not kind:
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in containers:
                container.clear()
                if isinstance(container, dict | set):
                    container.update(content)
                else:
                    container.extend(content)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """A forward may draw some, of torch or of Python, to branch on."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


def _contents(container: Any) -> tuple[Any, ...]:
    return tuple(container.items() if isinstance(container, dict) else container)


def _same(value: Any, before: Any) -> bool:
    if type(value) is tuple and type(before) is tuple:
        return len(value) == len(before) and all(map(_same, value, before))
    plain = type(value) is type(before) and type(value) in _PLAIN
    return value is before or (plain and value == before)
