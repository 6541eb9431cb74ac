"""The batch norms of a user's model: their shapes, by hooks, without memory or computation, and
what may be fused with them.

The model is built and run on the meta device, where tensors have shapes and no values.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from batchnorm_cuda import convert, revert
from batchnorm_cuda._fusion.forecast import Found, Fusion

from .behind import Behind
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
    return merge(shape for _, shape in _run(_build(path), sizes, path, layout))


def collect_behind(
    path: str, sizes: tuple[int, ...], layout: str = "nchw"
) -> list[tuple[Shape, Behind]]:
    """The same with what `convert(fuse=True)` finds in training behind each: pairs, with counts."""
    model = _build(path)
    behind = dict(_forecasts(model))
    found = _run(model, sizes, path, layout)
    counts = Counter((shape, behind.get(module, Behind())) for module, shape in found)
    return [(replace(shape, count=count), what) for (shape, what), count in counts.items()]


def _forecasts(model: nn.Module) -> Iterator[tuple[nn.Module, Behind]]:
    """Of what can be fused. The model is as it was afterwards."""
    for module in convert(model, fuse=True).modules():
        fusion = getattr(module, "_fusion", None)
        if isinstance(fusion, Fusion) and isinstance(fusion.training, Found):
            yield module, Behind(fusion.training.add, fusion.training.activation)
    revert(model)


def _build(path: str) -> nn.Module:
    """In training, on the meta device."""
    make = find(path)
    try:
        with _WithoutMemory():
            model = make()
        return model.to("meta").train()
    except Exception as error:
        raise CollectError(f"--model: {path} cannot be built: {_first_line(error)}") from error


def _run(
    model: nn.Module, sizes: tuple[int, ...], path: str, layout: str
) -> list[tuple[nn.Module, Shape]]:
    """Each call of a batch norm."""
    found: list[tuple[nn.Module, Shape]] = []
    name = path.rpartition(".")[2]
    x = torch.empty(sizes, device="meta")

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        own = tuple(inputs[0].shape)
        layout_of = layout if len(own) in (4, 5) else "nchw"
        found.append((module, Shape(name, own, layout=layout_of)))

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(note)
    try:
        with torch.no_grad(), torch.device("meta"):  # also what forward() makes by itself
            model(x)
    except Exception as error:
        raise CollectError(
            f"--model: {path} does not run on {sizes}: {_first_line(error)}; --input "
            "names another shape, and what needs values of tensors cannot be followed"
        ) from error
    if not found:
        raise CollectError(f"--model: {path} calls no batch norm for an input of {sizes}")
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
