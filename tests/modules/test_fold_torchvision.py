"""torchvision's networks, folded: which batch norms, and outputs that differ by rounding alone."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Backend
from fold_cases import filled, folds
from test_torchvision import build
from torch import Tensor, nn

from batchnorm_cuda import convert, fold, fold_report

pytestmark = pytest.mark.usefixtures("one_thread")

# Of those of its batch norms that stay, how many, and why.
NETWORKS = {
    "resnet18": (0, ""),
    "resnet50": (0, ""),
    "mobilenet_v3_small": (0, ""),
    "regnet_y_400mf": (0, ""),
    "inception_v3": (0, ""),
    "densenet121": (62, "stays: before it is no layer to fold it into, but cat"),
    # Of the auxiliary heads, which evaluation leaves out.
    "googlenet": (2, "stays: the forward, as far as it could be followed, does not call it"),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, filled(build(request.param))


def error(net: nn.Module, x: Tensor, expected: Tensor) -> float:
    """The largest, in terms of the largest output."""
    with torch.no_grad():
        return ((net(x).double() - expected).abs().max() / expected.abs().max()).item()


def test_networks(aten: Backend, network: tuple[str, nn.Module]) -> None:
    """What fold changes is of the order of roundings.

    To first order a network's rounding errors are proportional to the roundoff, 2**-24 and 2**-53:
    the same network computed in float64 is closer to the original by a factor of 2**29, to a small
    factor, since roundings fall otherwise. An error of the method would stay. And in float32 the
    folded network is about as far from the exact outputs as the original is.
    """
    name, model = network
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        expected = exact(x.double())
    before = error(model, x, expected)
    narrow, wide = fold(convert(copy.deepcopy(model))), fold(copy.deepcopy(exact))
    assert error(narrow, x, expected) < 4 * before < 1e-4
    assert error(wide, x.double(), expected) < 16 * before * 2**-29
    stay, reason = NETWORKS[name]
    for net in (narrow, wide):
        report = fold_report(net)
        assert len(folds(net)) + stay == len(report)
        assert all(text == reason for text in report.values() if text.startswith("stays"))
