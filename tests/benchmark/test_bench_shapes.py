"""The shapes of the benchmark, and those that hooks collect from a model."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from bench_cases import case  # noqa: F401  puts bench/ on the path
from torch import nn

from bench.cases.case import cases
from bench.cases.collect import CollectError, collect
from bench.cases.shapes import README_SHAPES, SETS, Shape, cut, merge


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("user_models")
    monkeypatch.setitem(sys.modules, "user_models", made)
    return made


def test_sets_are_well_formed() -> None:
    for name, shapes in SETS.items():
        assert shapes, name
        for shape in shapes:
            assert len(shape.sizes) >= 2 and min(shape.sizes) >= 1 and shape.count >= 1
    worst = SETS["worst"]
    assert {1, 3} <= {shape.sizes[1] for shape in worst}
    assert any(math.prod(shape.sizes[2:]) == 1 for shape in worst)
    assert any(shape.numel >= 2**31 for shape in worst)
    assert any(math.prod(shape.sizes[2:]) % 2 for shape in worst)
    assert {len(shape.sizes) for shapes in SETS.values() for shape in shapes} == {2, 3, 4, 5}
    assert len(README_SHAPES) >= 12


def test_cases_are_all_combinations_once() -> None:
    shapes = [Shape("a", (2, 3, 4, 4)), Shape("b", (5, 6)), Shape("c", (2, 3, 4, 4), layout="nhwc")]
    found = cases(shapes, ["nchw", "nhwc"], ["fp16", "fp32"], ["forward", "both"])
    assert len(found) == len(set(found)) == (2 + 1 + 1) * 2 * 2
    assert {one.layout for one in found if one.shape.name == "c"} == {"nhwc"}


def test_cut_keeps_an_sms_share() -> None:
    assert cut((256, 64, 56, 56), 128, 2**20) == ((8, 64, 56, 56), 4)
    assert cut((256, 64, 2, 2), 128, 2**30) == ((256, 64, 2, 2), 128)
    assert cut((4, 64, 512, 512), 128, 2**10) == ((1, 64, 512, 512), 32)
    assert cut((1, 64, 512, 512), 128, 2**10) == ((1, 64, 512, 512), 128)


def test_equal_shapes_are_counted() -> None:
    a, b = Shape("net", (2, 3)), Shape("net", (2, 4), count=2)
    assert merge([a, b, a]) == [Shape("net", (2, 3), 2), b]


def test_hooks_see_what_runs(module: types.ModuleType) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)
            self.unused = nn.BatchNorm2d(5)
            self.head = nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.norm(self.conv(x))) + torch.zeros(8, 1, 1)
            return self.head(x.mean((2, 3)))

    module.Net = Net
    assert collect("user_models.Net", (4, 3, 10, 10)) == [
        Shape("Net", (4, 8, 8, 8), 2, "nchw"),
        Shape("Net", (4, 8), 1, "nchw"),
    ]
    assert [s.layout for s in collect("user_models.Net", (4, 3, 10, 10), "nhwc")] == [
        "nhwc",
        "nchw",
    ]


def test_a_model_too_large_for_memory_is_no_trouble(module: types.ModuleType) -> None:
    """A terabyte of parameters and activations: nothing is allocated, nothing computed."""
    module.make = lambda: nn.Sequential(nn.Linear(2**19, 2**19), nn.BatchNorm1d(2**19))
    assert collect("user_models.make", (2**20, 2**19)) == [Shape("make", (2**20, 2**19), 1, "nchw")]


@pytest.mark.parametrize(
    "path, message",
    [
        ("resnet", "expected package.module.name, got 'resnet'"),
        ("no_such_package.net", "cannot import no_such_package"),
        ("user_models.absent", "user_models has no 'absent'"),
        ("user_models.broken", "cannot be built: KeyError: 'width'"),
        ("user_models.narrow", "does not run on (2, 3, 8, 8): RuntimeError"),
        ("user_models.plain", "calls no batch norm"),
    ],
)
def test_what_cannot_be_collected(module: types.ModuleType, path: str, message: str) -> None:
    module.broken = lambda: {}["width"]
    module.narrow = lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    module.plain = nn.ReLU
    with pytest.raises(CollectError) as raised:
        collect(path, (2, 3, 8, 8))
    assert message in str(raised.value)


def test_resnet50_is_what_its_set_says() -> None:
    pytest.importorskip("torchvision")
    found = collect("torchvision.models.resnet50", (32, 3, 224, 224))
    wanted = {shape.sizes: shape.count for shape in SETS["resnet50-32"]}
    assert {shape.sizes: shape.count for shape in found} == wanted
    assert sum(wanted.values()) == 53


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "video.r3d_18"])
def test_models_of_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    sizes = (2, 3, 4, 64, 64) if name.startswith("video") else (2, 3, 224, 224)
    found = collect(f"torchvision.models.{name}", sizes)
    net = torchvision.models.get_model(name.rpartition(".")[2])
    layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert sum(shape.count for shape in found) == len(layers)
    assert {shape.sizes[1] for shape in found} == {layer.num_features for layer in layers}
