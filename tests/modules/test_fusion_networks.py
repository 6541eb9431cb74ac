"""Whole networks, fused. `python -m bench.fused_networks` runs all of torchvision's, and timm's."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from torch import nn

import batchnorm_cuda
from batchnorm_cuda import convert, fusion_report, revert
from bench import fused_networks

pytestmark = pytest.mark.usefixtures("one_thread")

# One of each family.
FAMILIES = [
    *("densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf"),
    *("resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "vgg11_bn"),
]
# Those whose batch norms have other activations than ReLU.
OTHER_ACTIVATIONS = {"efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2"}
# How many batch norms have an activation.
COMPUTED = {"shufflenet_v2_x0_5": 37, "mnasnet0_5": 35, "regnet_y_400mf": 49}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_fused(name: str) -> None:
    """State and objects as they were, 95 % fused, a reason for each of the rest, and back."""
    with fused_networks.WithoutMemory():
        net = fused_networks.build(name)
    before = {key: id(value) for key, value in net.state_dict(keep_vars=True).items()}
    classes = [type(module) for module in net.modules()]
    rows = fusion_report(convert(net, fuse=True)).batch_norms
    after = {key: id(value) for key, value in net.state_dict(keep_vars=True).items()}
    assert list(after.items()) == list(before.items())
    for row in rows:
        assert (row.reason is None) == (None not in (row.training, row.evaluation)), row
    fused, candidates = fused_networks.share(rows)
    assert fused >= 0.95 * candidates
    assert candidates > 0 or name in OTHER_ACTIVATIONS
    revert(net)
    assert [type(module) for module in net.modules()] == classes


@pytest.mark.parametrize("name", COMPUTED)
def test_networks_compute_what_they_did(aten: Backend, name: str) -> None:
    net = fused_networks.build(name).double()
    comparison = fused_networks.compare(net, torch.randn(4, 3, 32, 32, dtype=torch.float64))
    assert fused_networks.share(comparison.report.batch_norms) == (COMPUTED[name],) * 2
    assert comparison.excess <= 1, comparison.where
    assert comparison.reverted


def test_a_difference_is_found() -> None:
    """The comparison fails for a network that computes something else."""

    class Wrong(batchnorm_cuda.BatchNorm2d):
        def forward(self, *args):
            return super().forward(*args) * (1 + 1e-9)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert fused_networks.compare(net, x).excess <= 1
    net[1] = Wrong(4, dtype=torch.float64)
    revert(net)
    exact = batchnorm_cuda.convert

    def convert_wrong(model, fuse):
        model[1].__class__ = Wrong
        return exact(model, fuse=fuse)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batchnorm_cuda, "convert", convert_wrong)
        net[1].__class__ = nn.BatchNorm2d
        comparison = fused_networks.compare(net, x)
    assert comparison.excess > 1
    assert not comparison.reverted


timm_networks = pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "repvgg_a0"])


@timm_networks
def test_timm(name: str) -> None:
    """Batch norms with an activation of their own, too."""
    pytest.importorskip("timm")
    with fused_networks.WithoutMemory():
        net = fused_networks.build(name, timm=True)
    classes = [type(module) for module in net.modules()]
    fused, candidates = fused_networks.share(fusion_report(convert(net, fuse=True)).batch_norms)
    assert fused >= 0.95 * candidates > 0
    revert(net)
    assert [type(module) for module in net.modules()] == classes
