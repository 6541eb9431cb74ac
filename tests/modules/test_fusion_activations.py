"""The table of the ways in which activations are written, and who reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from fusion_models import Model
from test_fusion import TIGHT, inputs, step
from torch import Tensor, nn

from batchnorm_cuda import BatchNorm2d, convert, fold, fusion_report
from batchnorm_cuda._fusion.activations import TABLE, Row, fields
from batchnorm_cuda._ops import activations

ROWS = [pytest.param(row, id=row.module.__name__) for row in TABLE]


def called(function: Callable, y: Tensor) -> Tensor:
    method = getattr(Tensor, function.__name__, None) is function
    return getattr(y, function.__name__)() if method else function(y)


# How each is written, beside functions with nothing but the tensor; and batch_norm's name for it.
WRITTEN: dict[Callable, object] = {
    lambda m, y, x: nn.ReLU()(y): "relu",
    lambda m, y, x: nn.LeakyReLU(0.25)(y): ("leaky_relu", 0.25),
    lambda m, y, x: nn.LeakyReLU(inplace=True)(y): ("leaky_relu", 0.01),
    lambda m, y, x: F.leaky_relu(y, 0.5, True): ("leaky_relu", 0.5),
    lambda m, y, x: F.leaky_relu(y + x, negative_slope=0.5): ("leaky_relu", 0.5),
    lambda m, y, x: nn.ReLU6()(y + x): "relu6",
    lambda m, y, x: nn.ReLU6(inplace=True)(y): "relu6",
    lambda m, y, x: nn.Hardtanh(0.0, 6.0)(y): "relu6",
    lambda m, y, x: F.hardtanh(y, 0, 6): "relu6",
    **{
        lambda m, y, x, f=function: called(f, y): row.name
        for row in TABLE
        for function in (*row.functions, *row.in_place)
        if row.name != "leaky_relu" and function is not F.hardtanh
    },
}


@pytest.mark.parametrize("behind", WRITTEN, ids=range(len(WRITTEN)))
def test_every_way_to_write_it(backend: Backend, behind: Callable) -> None:
    theirs = Model(behind).double().to(backend.device)
    ours = convert(copy.deepcopy(theirs), fuse=True)
    name = WRITTEN[behind]
    found = ours.bn._fusion.training
    assert found.activation == name and fusion_report(ours).fused
    for x in inputs(backend, 2):
        torch.testing.assert_close(step(ours, ours, 8 * x, True), step(theirs, theirs, 8 * x, True))


@pytest.mark.parametrize("row", ROWS)
def test_what_batch_norm_does_not_know_is_computed_as_before(
    aten: Backend, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    others = {name: kind for name, kind in activations.KINDS.items() if name != row.name}
    monkeypatch.setattr(activations, "KINDS", others)
    modules = {nn.Hardtanh: nn.Hardtanh(0.0, 6.0)}
    behind = modules.get(row.module) or row.module()
    theirs = nn.Sequential(nn.BatchNorm2d(4), behind).double()
    ours = convert(copy.deepcopy(theirs), fuse=True)
    reason = fusion_report(ours).batch_norms[0].reason
    assert reason.startswith(f"activation {row.name}") and reason.endswith(" is not known")
    for x in inputs(aten, 1):
        torch.testing.assert_close(step(ours, ours, x, True), step(theirs, theirs, x, True))


def test_a_parameter_that_batch_norm_refuses(aten: Backend) -> None:
    theirs = nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(1.5)).double()
    ours = convert(copy.deepcopy(theirs), fuse=True)
    assert fusion_report(ours).batch_norms[0].reason == "activation leaky_relu(1.5) is not known"
    theirs[1].negative_slope = 0.5
    ours = convert(copy.deepcopy(theirs), fuse=True)
    assert fusion_report(ours).batch_norms[0].training == "leaky_relu(0.5)"
    ours[1].negative_slope = theirs[1].negative_slope = 1.5  # against the forecast
    x = next(inputs(aten))
    torch.testing.assert_close(step(ours, ours, x, True), step(theirs, theirs, x, True))


def test_no_activation() -> None:
    model = convert(nn.Sequential(nn.BatchNorm2d(4), nn.Hardtanh()), fuse=True)
    assert fusion_report(model).batch_norms[0].reason == "its output goes to 1 (Hardtanh)"


@pytest.mark.parametrize("name", {row.name: None for row in TABLE})
def test_fold_leaves_the_module(aten: Backend, name: str) -> None:
    activation = (name, 0.25) if name == "leaky_relu" else name
    assert fields(activation)[1] == name
    model = nn.Sequential(nn.Conv2d(4, 4, 1), BatchNorm2d(4, activation=activation)).double().eval()
    x = 8 * next(inputs(aten))
    expected: Tensor = model(x)
    torch.testing.assert_close(fold(model)(x), expected, **TIGHT)
    assert type(model[1]).__name__.lower() == name.replace("_", "")
