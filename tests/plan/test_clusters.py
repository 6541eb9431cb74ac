"""How many clusters a device holds at once: asked of it, planned with, assumed where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from conftest import HAS_GPU, Backend
from torch import nn

from batchnorm_cuda import batch_norm, devices

SIZES = (2, 4, 8)
KEYS = [f"clusters_of_{size}" for size in SIZES]
WITH_CLUSTERS = [name for name, device in devices.DEVICES.items() if device["max_cluster"] > 0]


@pytest.fixture
def model(extension: ModuleType) -> Iterator[ModuleType]:
    if HAS_GPU:
        pytest.skip("a GPU has the properties that it has")
    yield extension._host_model
    extension._host_model.set_device({})


def test_the_device_here(extension: ModuleType) -> None:
    device = extension.device_info()
    for size, key in zip(SIZES, KEYS, strict=True):
        assert 0 <= device[key] <= device["sm_count"] // size
    if device["max_cluster"] == 0:
        assert not any(device[key] for key in KEYS)
    elif not HAS_GPU:
        assert [device[key] for key in KEYS] == [2, 1, 0]  # of the model's four SMs


@pytest.mark.parametrize("name", devices.DEVICES)
def test_a_device_is_asked(extension: ModuleType, model: ModuleType, name: str) -> None:
    """What csrc/kernels/cluster_query.cuh makes of a device is what describes it."""
    described = devices.planner_properties(devices.DEVICES[name])
    model.set_device(described)
    assert extension.device_info() == described


def test_code_for_older_devices_has_no_clusters(extension: ModuleType, model: ModuleType) -> None:
    """The driver compiles PTX for 8.0 on a device of 9.0, but not what was left out of it."""
    described = devices.planner_properties(devices.DEVICES["h100"])
    model.set_device(described | {"ptx_version": 80})
    assert extension.device_info() == described | dict.fromkeys(KEYS, 0) | {"max_cluster": 0}


def test_assumed_of_the_devices_described() -> None:
    """GPCs whose SMs are no multiple of a cluster leave some out."""
    for name, device in devices.DEVICES.items():
        counts = [device[key] for key in KEYS]
        assert all(count > 0 for count in counts) == (name in WITH_CLUSTERS)
        for size, count in zip(SIZES, counts, strict=True):
            assert count * size <= device["sm_count"]
    h100 = devices.DEVICES["h100"]  # 6 GPCs of 16 SMs and 2 of 18
    assert [h100[key] for key in KEYS] == [66, 32, 16]


def plan_team(extension: ModuleType, device: dict, size: int, n: int) -> dict:
    options = {"strategy": "team", "scope": "cluster", "team_size": size}
    plan = extension.make_plan("forward_training", n, 2048, 3136, "float16", device, options)
    return plan["team"]


@pytest.mark.parametrize("name", WITH_CLUSTERS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("n", [16, 64])
def test_no_more_teams_than_clusters(extension: ModuleType, name: str, size: int, n: int) -> None:
    device = devices.planner_properties(devices.DEVICES[name])
    team = plan_team(extension, device, size, n)
    assert team["scope"] == "cluster"
    clusters = device[next(key for key in KEYS if int(key[-1]) >= size)]
    places = team["blocks_per_sm"] * device["sm_count"]
    assert team["teams"] == min(places // size, team["blocks_per_sm"] * clusters)
    assert team["rounds"] == -(-team["traversal"]["channel_blocks"] // team["teams"])


def test_not_known_is_as_many_as_there_are_sms_for(extension: ModuleType) -> None:
    h100 = devices.planner_properties(devices.DEVICES["h100"])
    known, unknown = (
        plan_team(extension, device, 8, 16) for device in (h100, h100 | dict.fromkeys(KEYS, 0))
    )
    assert known["teams"] == known["blocks_per_sm"] * 16
    assert unknown["teams"] == unknown["blocks_per_sm"] * 132 // 8 > known["teams"]


def test_plans_of_devices_that_differ_in_this_alone(
    kernels: Backend, extension: ModuleType, model: ModuleType, plan_options: Callable
) -> None:
    """What is planned for each of them runs."""
    plan_options({"strategy": "team", "scope": "cluster", "team_size": 2})
    x = torch.randn(8, 12, 20, 20, device=kernels.device)
    expected = nn.functional.batch_norm(x, None, None, training=True)
    outputs = []
    for clusters in (4, 3, 1):
        model.set_device({"sm_count": 8, "clusters_of_2": clusters})
        assert extension.device_info()["clusters_of_2"] == clusters
        outputs.append(batch_norm(x, None, None, training=True))
        torch.testing.assert_close(outputs[-1], expected)
