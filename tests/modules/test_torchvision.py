"""torchvision's classification networks, converted: same keys, same outputs, same training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import Backend
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchnorm_cuda import convert, modules, revert

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_NETWORK = torchvision.models.list_models(module=torchvision.models)
# A small one of each family that has batch norms; resnet18 is trained.
SMALL_NETWORKS = [
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
]
# Their own initialisation takes minutes; the auxiliary head of inception needs large images.
ARGUMENTS = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}


class WithoutMemory(TorchFunctionMode):
    """Parameters on the meta device; all else is computed, as some widths are, by tensors.

    Nothing is drawn at random: to find that there is nothing to do takes half of the time.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        placed = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **placed})


def build(name: str) -> nn.Module:
    return torchvision.models.get_model(name, num_classes=10, **ARGUMENTS.get(name, {}))


def count(net: nn.Module, module: str) -> int:
    """Batch norms whose class is defined in `module`."""
    found = (m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return sum(type(m).__module__ == module for m in found)


def test_every_network_converts() -> None:
    """Keys, values' identity and order of the state, and no batch norm of torch.nn left."""
    assert len(EVERY_NETWORK) >= 80
    with_batch_norms = 0
    for name in EVERY_NETWORK:
        with WithoutMemory():
            net = build(name)
        before = {key: id(value) for key, value in net.state_dict(keep_vars=True).items()}
        theirs = count(net, nn.BatchNorm2d.__module__)
        convert(net)
        after = {key: id(value) for key, value in net.state_dict(keep_vars=True).items()}
        assert list(after.items()) == list(before.items()), name
        assert count(net, nn.BatchNorm2d.__module__) == 0, name
        assert count(net, modules.__name__) == theirs, name
        revert(net)
        assert count(net, nn.BatchNorm2d.__module__) == theirs, name
        with_batch_norms += theirs > 0
    assert with_batch_norms >= 50


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a step in training and of evaluation with the statistics that it left."""
    results = []
    for training in (True, False):
        torch.manual_seed(0)  # dropout
        output = net.train(training)(x)
        results += [output] if isinstance(output, Tensor) else list(output)
    return results


def assert_same_outputs(name: str, backend: Backend) -> None:
    theirs = build(name).to(backend.device, torch.float64)
    ours = convert(copy.deepcopy(theirs))
    # 80 x 80 leaves at least one position to the last layers of all of them.
    x = torch.randn(2, 3, 80, 80, dtype=torch.float64).to(backend.device)
    with torch.no_grad():
        torch.testing.assert_close(outputs(ours, x), outputs(theirs, x), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_same_outputs(aten: Backend, name: str) -> None:
    assert_same_outputs(name, aten)


def test_same_outputs_by_the_kernels(kernels: Backend) -> None:
    assert_same_outputs("shufflenet_v2_x0_5", kernels)


# Twelve steps amplify the roundings of float64, 1e-16, to 1e-9 in the losses and to 1e-7 in the
# weights and statistics; a fault in the gradient or the statistics shows in the first digits.
LOSSES_ALIKE = {"rtol": 1e-6, "atol": 1e-6}
STATES_ALIKE = {"rtol": 1e-3, "atol": 1e-3}


def losses(net: nn.Module, x: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    found = []
    for _ in range(12):
        loss = F.cross_entropy(net(x), torch.arange(4, device=x.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


class NarrowResNet(torchvision.models.ResNet):
    """resnet18's blocks with an eighth of the channels: its 11 million weights took most of the
    time.
    """

    def __init__(self) -> None:
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10)
        self.fc = nn.Linear(self.inplanes, 10)

    def _make_layer(self, block: type[nn.Module], planes: int, *args: Any, **kwargs: Any):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def test_resnet18_trains_alike(kernels: Backend) -> None:
    """Twelve steps with torch.nn's layers, with ours, and with ours compiled."""
    torch._dynamo.reset()
    theirs = NarrowResNet().to(kernels.device, torch.float64)
    ours, compiled = (convert(copy.deepcopy(theirs)) for _ in range(2))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64).to(kernels.device)
    expected = losses(theirs, x)
    assert expected[-1] < 0.1 * expected[0]
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for net, called in ((ours, ours), (compiled, graph)):
        torch.testing.assert_close(losses(called, x), expected, **LOSSES_ALIKE)
        torch.testing.assert_close(
            dict(net.state_dict()), dict(theirs.state_dict()), **STATES_ALIKE
        )
