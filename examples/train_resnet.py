"""Train a ResNet whose batch norms are batchnorm_cuda's, in mixed precision and channels-last.

The model is torchvision's ResNet-50 where torchvision is installed, else a small ResNet from below;
`batchnorm_cuda.convert` exchanges its batch norms. The images are made on the spot, stripes whose
direction is the class, in noise, so that nothing has to be downloaded. Before it trains, the script
compares one step's gradients with torch.nn's; it fails if they differ, or if nothing was learnt.

    python examples/train_resnet.py --toy
    python examples/train_resnet.py --model resnet50 --batch-size 128 --steps 200 --compile
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from common import check_against_torch, choose_device, parse_arguments, synchronize
from torch import nn

import batchnorm_cuda

CLASSES = 8
MIN_ACCURACY = 0.8  # chance is 1 / 8
TOY = {"model": "small", "steps": 30, "batch_size": 24, "image_size": 16}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["small", "resnet18", "resnet50"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--amp",
        choices=["auto", "off", "bfloat16", "float16"],
        default="auto",
        help="auto: float16 on a GPU, bfloat16 on the CPU",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="train through torch.compile, by inductor unless another backend is named",
    )
    parser.add_argument("--check", action="store_true", help="compare with torch.nn, do not train")
    args = parse_arguments(parser, TOY)
    if args.steps < 2 or args.batch_size < 2:
        parser.error("--steps and --batch-size must be at least 2")
    return args


# --- Data and model -----------------------------------------------------------------------------


def make_batch(count, size, generator, device):
    """Stripes [count, 3, size, size] in noise, of a random phase; their direction is the class."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    phase = 2 * torch.pi * torch.rand(count, 1, 1, generator=generator)
    angle = (labels * torch.pi / CLASSES).view(-1, 1, 1)
    axis = torch.arange(size)
    along = axis.view(1, 1, -1) * angle.cos() + axis.view(1, -1, 1) * angle.sin()
    noise = torch.randn(count, 3, size, size, generator=generator)
    images = (along * 1.2 + phase).sin().unsqueeze(1) + 0.5 * noise
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in He et al., "Deep Residual Learning", figure 2."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        # No biases: the batch norm that follows would subtract them again.
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


def small_resnet():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def make_model(name):
    try:
        from torchvision import models
    except (ImportError, RuntimeError, OSError):  # not there, or made for another torch
        if name not in (None, "small"):
            sys.exit(f"error: --model {name} needs the torchvision that fits this torch")
        name = "small"
    name = name or "resnet50"
    print(f"model: {name}")
    return small_resnet() if name == "small" else getattr(models, name)(num_classes=CLASSES)


# --- Training -----------------------------------------------------------------------------------


def loss_of(model, images, labels):
    return F.cross_entropy(model(images), labels)


def autocast_for(args, device):
    """The autocast of the run, and a scaler, which only float16's narrow range needs."""
    name = args.amp
    if name == "auto":
        name = "float16" if device.type == "cuda" else "bfloat16"
    dtype = None if name == "off" else getattr(torch, name)
    print(f"autocast: {name}")
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def train(model, args, device):
    """Losses of all steps. Prints the rate of the second half: the first one warms up."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9)
    autocast, scaler = autocast_for(args, device)
    generator = torch.Generator().manual_seed(args.seed)
    batches = [
        make_batch(args.batch_size, args.image_size, generator, device)
        for _ in range(min(args.steps, 16))
    ]
    compiled = model
    if args.compile:
        compiled = torch.compile(model, backend=args.compile, fullgraph=True)  # no graph breaks
    model.train()
    losses = []
    for step in range(args.steps):
        if step == args.steps // 2:
            synchronize(device)
            start = time.perf_counter()
        with autocast:
            loss = loss_of(compiled, *batches[step % len(batches)])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    synchronize(device)
    steps = args.steps - args.steps // 2
    rate = steps * args.batch_size / (time.perf_counter() - start)
    print(f"measured here: {rate:.0f} images/s, over the last {steps} steps")
    return torch.stack(losses).tolist()


@torch.no_grad()
def accuracy(model, args, device):
    """On 128 new images, in evaluation mode: by the running statistics."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed + 1)
    images, labels = make_batch(128, args.image_size, generator, device)
    return (model(images).argmax(1) == labels).float().mean().item()


def main():
    args = parse_args()
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    model = make_model(args.model).to(device, memory_format=torch.channels_last)
    batchnorm_cuda.convert(model)

    generator = torch.Generator().manual_seed(args.seed)
    check_against_torch(model, loss_of, make_batch(16, args.image_size, generator, device))
    if args.check:
        return
    losses = train(model, args, device)
    for step in range(0, args.steps, max(1, args.steps // 8)):
        print(f"step {step:4}  loss {losses[step]:.4f}")
    reached = accuracy(model, args, device)
    if not reached >= MIN_ACCURACY:
        sys.exit(f"FAILED: accuracy {reached:.1%} on new images, expected {MIN_ACCURACY:.0%}")
    print(f"OK: accuracy {reached:.1%} on new images")


if __name__ == "__main__":
    main()
