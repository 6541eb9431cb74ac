"""Segment volumes by a small 3-D U-Net, with batchnorm_cuda's BatchNorm3d in channels_last_3d.

Made-up scans, ellipsoids in strong noise, stand for medical ones, so that nothing has to be
downloaded. Batches of volumes are small, for which batch norm sees few samples but many voxels. The
script compares one step's gradients with torch.nn's before it trains, and fails if they differ, or
if the overlap with the truth (the Dice coefficient) of new volumes stays low.

    python examples/segment_3d.py --toy
    python examples/segment_3d.py --size 64 --width 32 --batch-size 4 --steps 300
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from common import check_against_torch, choose_device, parse_arguments
from torch import nn

import batchnorm_cuda

MIN_DICE = 0.7
TOY = {"size": 16, "width": 8, "batch_size": 2, "steps": 60}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="voxels of an edge, a multiple of 4")
    parser.add_argument("--width", type=int, default=16, help="channels at full resolution")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare with torch.nn, do not train")
    args = parse_arguments(parser, TOY)
    if args.size < 8 or args.size % 4 or args.steps < 1:
        parser.error("--size must be a multiple of 4, at least 8, and --steps at least 1")
    return args


# --- Data ---------------------------------------------------------------------------------------


def make_volumes(args, generator, device):
    """Noisy volumes and the truth, both [B, 1, size, size, size]: one ellipsoid each."""
    axis = torch.linspace(-1, 1, args.size)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))  # [3, size, size, size]
    shape = (args.batch_size, 3, 1, 1, 1)
    centre = torch.rand(shape, generator=generator) - 0.5
    radius = 0.3 + 0.4 * torch.rand(shape, generator=generator)
    inside = ((grid - centre) / radius).square().sum(1, keepdim=True) < 1
    truth = inside.float()
    volumes = truth + torch.randn(truth.shape, generator=generator)
    layout = {"memory_format": torch.channels_last_3d}
    return volumes.to(device, **layout), truth.to(device, **layout)


# --- Model --------------------------------------------------------------------------------------


def double_conv(inputs, outputs):
    """Two convolutions, each normalised; biases would be subtracted again."""
    layers = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv3d(channels, outputs, 3, padding=1, bias=False),
            batchnorm_cuda.BatchNorm3d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three resolutions, as in Cicek et al., "3D U-Net" (arXiv:1606.06650), with fewer channels."""

    def __init__(self, width):
        super().__init__()
        self.down1 = double_conv(1, width)
        self.down2 = double_conv(width, 2 * width)
        self.bottom = double_conv(2 * width, 4 * width)
        self.up2 = double_conv(6 * width, 2 * width)
        self.up1 = double_conv(3 * width, width)
        self.last = nn.Conv3d(width, 1, 1)

    def forward(self, x):
        fine = self.down1(x)
        coarse = self.down2(F.max_pool3d(fine, 2))
        y = self.bottom(F.max_pool3d(coarse, 2))
        y = self.up2(torch.cat([F.interpolate(y, scale_factor=2), coarse], 1))
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2), fine], 1))
        return self.last(y)


# --- Training -----------------------------------------------------------------------------------


def dice(probability, truth):
    """Twice the overlap over the sum of both sizes, of each volume: 1 if they are the same."""
    dims = (1, 2, 3, 4)
    return 2 * (probability * truth).sum(dims) / (probability.sum(dims) + truth.sum(dims) + 1e-6)


def loss_of(model, volumes, truth):
    """Cross-entropy, which is smooth, and one minus Dice, which does not mind the empty voxels."""
    logits = model(volumes)
    overlap = dice(logits.sigmoid(), truth).mean()
    return F.binary_cross_entropy_with_logits(logits, truth) + 1 - overlap


@torch.no_grad()
def evaluate(model, args, device):
    """Mean Dice over 4 batches of new volumes, in evaluation mode."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed + 1)
    scores = []
    for _ in range(4):
        volumes, truth = make_volumes(args, generator, device)
        scores.append(dice((model(volumes) > 0).float(), truth).mean())
    model.train()
    return torch.stack(scores).mean().item()


def train(model, args, device):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(1, args.steps + 1):
        loss = loss_of(model, *make_volumes(args, generator, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 4) == 0:
            score = evaluate(model, args, device)
            print(f"step {step:4}  loss {loss.item():.4f}  Dice of new volumes {score:.3f}")


def main():
    args = parse_args()
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    # Parameters too: a convolution gives channels_last_3d only if its weight has that format.
    model = UNet(args.width).to(device, memory_format=torch.channels_last_3d)

    batch = make_volumes(args, torch.Generator().manual_seed(args.seed), device)
    check_against_torch(model, loss_of, batch)
    if args.check:
        return
    before = evaluate(model, args, device)
    print(f"step    0  Dice of new volumes {before:.3f}")
    train(model, args, device)
    after = evaluate(model, args, device)
    if not after >= max(MIN_DICE, before):
        sys.exit(f"FAILED: Dice {after:.3f}, expected {MIN_DICE}; it was {before:.3f} at first")
    print(f"OK: Dice rose from {before:.3f} to {after:.3f}")


if __name__ == "__main__":
    main()
