"""A plan is kept, and is used again for nothing but the same problem, device and options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from conftest import KERNELS
from strategies import FORCED, launched
from torch import Tensor

from batchnorm_cuda import batch_norm

TWO_PASSES, TEAM = 3, 1  # launches of a training forward


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 6, 32, 32, device=KERNELS.device)


@pytest.fixture
def launches(extension: ModuleType, x: Tensor) -> Callable[[], int]:
    return lambda: len(launched(extension, lambda: batch_norm(x, None, None, training=True)))


@pytest.fixture
def described(extension: ModuleType) -> Iterator[Callable[..., None]]:
    """Makes the model of CUDA a device with some properties of its own, until the test ends."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has the properties that it has")
    model = extension._host_model
    yield lambda **properties: model.set_device(extension.device_info() | properties)
    model.set_device({})


def test_options_are_told_apart(launches: Callable, plan_options: Callable) -> None:
    for strategy, expected in (("two_pass", TWO_PASSES), ("team", TEAM), ("two_pass", TWO_PASSES)):
        plan_options({"strategy": strategy})
        assert launches() == expected


@pytest.mark.parametrize(
    "fits, does_not",
    [
        ({"pattern": "along_row"}, {"pattern": "along_c"}),
        ({"team_size": 2}, {"team_size": 5000}),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_team_are_told_apart(
    extension: ModuleType, plan_options: Callable, fits: dict, does_not: dict
) -> None:
    """What cannot be honoured runs in two passes."""
    x = torch.randn(16, 32, 7, 7).to(KERNELS.device, torch.float16)
    team = {"strategy": "team", "pattern": "along_row"}
    for options, expected in ((fits, TEAM), (fits | does_not, TWO_PASSES), (fits, TEAM)):
        plan_options(team | options)
        assert (
            len(launched(extension, lambda: batch_norm(x, None, None, training=True))) == expected
        )


def test_devices_are_told_apart(
    launches: Callable, plan_options: Callable, described: Callable
) -> None:
    plan_options(FORCED["grid"])
    for cooperative, expected in ((True, TEAM), (False, TWO_PASSES), (True, TEAM)):
        described(cooperative=cooperative)
        assert launches() == expected


def test_problems_are_told_apart(
    launches: Callable, extension: ModuleType, x: Tensor, plan_options: Callable
) -> None:
    """More of them than are kept, and the first ones again."""
    plan_options(FORCED["two_pass"])
    assert launches() == TWO_PASSES
    for channels in range(1, 1100):
        extension.forward(x.new_zeros(1, channels, 2), *(None,) * 5, True, 0.1, 1e-5)
    assert launches() == TWO_PASSES
    y, z = (batch_norm(t, None, None, training=True) for t in (x, x[:, :3].contiguous()))
    torch.testing.assert_close(y[:, :3], z)
