"""The batch norms of a user's model: their shapes, by hooks, without memory or computation.

The model is built and run on the meta device, where tensors have shapes and no values.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from .shapes import Shape, merge


class CollectError(ValueError):
    """A model cannot be found, built or run; the message says which and why."""


class _WithoutMemory(TorchFunctionMode):
    """Parameters on the meta device; all else is computed: some widths are, by tensors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        placed = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **placed})


def find(path: str) -> Callable[[], nn.Module]:
    """What `package.module.name` names: a function or class that makes a model."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise CollectError(f"--model: expected package.module.name, got {path!r}")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise CollectError(f"--model: cannot import {module_name}: {error}") from None
    except AttributeError:
        raise CollectError(f"--model: {module_name} has no {name!r}") from None


def collect(path: str, sizes: tuple[int, ...], layout: str = "nchw") -> list[Shape]:
    """The distinct shapes of the batch norms that an input of `sizes` reaches, with counts.

    `layout` is that of the images in the model, which the meta device does not carry along.
    """
    make = find(path)
    x = torch.empty(sizes, device="meta")
    try:
        with _WithoutMemory():
            model = make()
        model = model.to("meta").train()
    except Exception as error:
        raise CollectError(f"--model: {path} cannot be built: {_first_line(error)}") from error
    shapes = _run(model, x, path, layout)
    if not shapes:
        raise CollectError(f"--model: {path} calls no batch norm for an input of {sizes}")
    return merge(shapes)


def _run(model: nn.Module, x: Tensor, path: str, layout: str) -> list[Shape]:
    found: list[Shape] = []
    name = path.rpartition(".")[2]

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes = tuple(inputs[0].shape)
        found.append(Shape(name, sizes, layout=layout if len(sizes) in (4, 5) else "nchw"))

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(note)
    try:
        with torch.no_grad(), torch.device("meta"):  # also what forward() makes by itself
            model(x)
    except Exception as error:
        raise CollectError(
            f"--model: {path} does not run on {tuple(x.shape)}: {_first_line(error)}; --input "
            "names another shape, and what needs values of tensors cannot be followed"
        ) from error
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
