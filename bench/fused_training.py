"""Trains a network as it is and after `convert(fuse=True)`, and compares losses.

    python -m bench.fused_training                   # ResNet-18, all ways of WAYS
    python -m bench.fused_training --network small compiled

Two processes train over gloo, on the CPU, each on batches of its own: the model as it was, fused
before DistributedDataParallel wraps it, and after. A way is the list of what is added to that:
checkpoints around the blocks, a moving average of the weights, synchronised batch norms,
torch.compile of the wrapped model (by AOTAutograd in eager mode), bfloat16 by autocast. All but the
last are in float64.

Exit status 1 if a loss, a final state or an output of the average is another one, by more than
rounding: 1e-8, and under autocast, where fused operations round once instead of three times, 5e-2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from batchnorm_cuda import convert, fusion_report

STEPS = 4
RANKS = 2
ORDERS = ("as it was", "fused, wrapped", "wrapped, fused")
WAYS = {
    "plain": (),
    "together": ("checkpoints", "average"),
    "synchronised": ("sync",),
    "compiled": ("checkpoints", "average", "compile"),
    "mixed": ("checkpoints", "average", "autocast"),
    "all": ("checkpoints", "average", "compile", "autocast"),
}


class BasicBlock(nn.Module):
    """As in a ResNet, with a branch of its own where channels or size change."""

    def __init__(self, before: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1:
            branch = nn.Conv2d(before, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(branch, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Network(nn.Module):
    """A residual network.

    Attributes:
        reentrant: of the checkpoints around its blocks; None for no checkpoints.
        fused: how many batch norms take over what is behind them.
        size: of its images.
    """

    def __init__(
        self, stem: nn.Module, blocks: Iterable[nn.Module], head: nn.Linear, fused: int, size: int
    ) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.fused, self.size = fused, size
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def small() -> Network:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    blocks = (BasicBlock(8, 8), BasicBlock(8, 16, 2), BasicBlock(16, 16))
    return Network(stem, blocks, nn.Linear(16, 5), fused=7, size=10).double()


def resnet18() -> Network:
    """The parts of torchvision's."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=5)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    blocks = (*net.layer1, *net.layer2, *net.layer3, *net.layer4)
    return Network(stem, blocks, net.fc, fused=17, size=64).double()


NETWORKS = {"small": small, "resnet18": resnet18}


def batches(
    seed: int = 0, size: int = 10, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        x = torch.randn(4, 3, size, size, dtype=torch.float64, generator=generator)
        yield x.to(dtype), torch.arange(4)


def losses(
    model: Callable,
    data: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable = nullcontext,
    after: Callable[[], Any] = lambda: None,
) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    found = []
    for x, target in data:
        with autocast():
            loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        found.append(loss.item())
    return found


# --- a rank -------------------------------------------------------------------------------------


def train(network: Network, order: str, way: str, rank: int) -> dict[str, Any]:
    """Losses, the state that they lead to, and what the moving average says."""
    added = WAYS[way]
    dtype = torch.float32 if "autocast" in added else torch.float64  # which autocast leaves alone
    network.to(dtype)
    if order == "fused, wrapped":
        convert(network, fuse=True)
    model: nn.Module = DistributedDataParallel(network)
    if order == "wrapped, fused":
        convert(model, fuse=True)
    assert len(fusion_report(model).fused) == (0 if order == "as it was" else network.fused)
    if "sync" in added:  # not before: DistributedDataParallel refuses it on the CPU
        convert(model, sync=True)
    network.reentrant = False if "checkpoints" in added else None
    average = AveragedModel(network, use_buffers=True) if "average" in added else None
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, "autocast" in added)
    if "compile" in added:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager")
    update = (lambda: average.update_parameters(network)) if average else lambda: None
    data = batches(rank, network.size, dtype)
    found: dict[str, Any] = {"losses": losses(model, data, autocast, update)}
    if average:
        x, _ = next(batches(RANKS, network.size, dtype))
        found["average"] = average.eval()(x).detach()
    # Under autocast the rest is what steps have made of noise.
    only_losses = {"losses": found["losses"]}
    return only_losses if "autocast" in added else found | {"state": network.state_dict()}


def run_rank(rank: int, folder: Path, name: str, ways: list[str]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no name server, no network
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    torch.set_num_threads(1)
    for way in ways:
        results = {order: train(NETWORKS[name](), order, way, rank) for order in ORDERS}
        torch.save(results, folder / f"{way}-{rank}.pt")
    dist.destroy_process_group()


# --- all of them --------------------------------------------------------------------------------


def rank_command(rank: int, folder: Path, name: str, ways: list[str]) -> tuple[str, ...]:
    settings = (f"--rank={rank}", f"--folder={folder}", f"--network={name}")
    return ("-m", "bench.fused_training", *settings, *ways)


def compare(folder: Path, way: str) -> Iterator[tuple[str, list[float], str | None]]:
    """By rank and order: its name, its losses, and what is wrong with them."""
    off = 5e-2 if "autocast" in WAYS[way] else 1e-8
    for rank in range(RANKS):
        results = torch.load(folder / f"{way}-{rank}.pt")
        for order, found in results.items():
            try:
                torch.testing.assert_close(found, results[ORDERS[0]], rtol=off, atol=off)
            except AssertionError as error:
                wrong = str(error)
            else:
                wrong = None
            yield f"{way}, rank {rank}, {order}", found["losses"], wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fused_training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ways = arguments.ways or list(WAYS)
    if unknown := set(ways) - WAYS.keys():
        parser.error(f"expected ways of {', '.join(WAYS)}, got {', '.join(sorted(unknown))}")
    if arguments.rank is not None:
        run_rank(arguments.rank, arguments.folder, arguments.network, ways)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            subprocess.Popen([sys.executable, *rank_command(rank, folder, arguments.network, ways)])
            for rank in range(RANKS)
        ]
        if any([rank.wait() for rank in ranks]):
            return 1
        rows = [row for way in ways for row in compare(folder, way)]
    for row, found, wrong in rows:
        print(f"{row:36}", *(f"{loss:.6f}" for loss in found), wrong or "", flush=True)
    return int(any(wrong for *_, wrong in rows))


if __name__ == "__main__":
    sys.exit(main())
