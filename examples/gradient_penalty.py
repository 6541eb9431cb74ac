"""Train a small WGAN-GP on handwritten digits, whose critic is differentiated twice.

The critic's loss holds the norm of its own gradient (Gulrajani et al., "Improved Training of
Wasserstein GANs", arXiv:1704.00028, algorithm 1), so that each step needs gradients of gradients,
here through batch norm. With it, the critic's output for an image depends on the rest of its batch,
which that paper avoids; this example is about the derivative, not about the best critic.

The run is made twice, with torch.nn's batch norm and with batchnorm_cuda's, from the same seed, and
the two are compared.

    python examples/gradient_penalty.py [--steps 30] [--device auto|cpu|cuda]
"""

import sys

import torch
from common import choose_device, parser_of_two_runs, repeat_to_the_bit
from torch import nn
from train_digits import load_data

import batchnorm_cuda

NOISE = 16
PENALTY = 10.0

# Both add the same float32 numbers in different orders, and training amplifies what one step
# differs by. Measured over 30 steps and 12 seeds on the CPU: at most 1.0e-6 of the largest value.
# Faults planted in the double backward (the gradient of weight dropped, that of x, or its part
# along x-hat): at least 4.7e-3 after 3 steps already. The bound lies between.
MAX_DIFFERENCE = 1e-4


def parse_args():
    parser = parser_of_two_runs(__doc__.splitlines()[0], batch_size=32)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    if args.steps < 1 or args.batch_size < 2:
        parser.error("--steps must be at least 1 and --batch-size at least 2")
    return args


def make_generator(norm1d):
    return nn.Sequential(
        nn.Linear(NOISE, 64), norm1d(64), nn.SiLU(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8))
    )


def make_critic(norm2d):
    """Smooth activations: the gradient penalty of a piecewise linear critic has no curvature."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),  # 16 x 4 x 4
        norm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),  # 32 x 2 x 2
        norm2d(32),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128, 1),
    )


def gradient_penalty(critic, real, fake, generator):
    """How far the critic's slope is from 1, at points between real and generated images."""
    mix = torch.rand(len(real), 1, 1, 1, generator=generator).to(real.device)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def train(norms, images, args):
    """Returns [steps, 3]: the critic's estimate of the distance, penalty, the generator's loss."""
    torch.manual_seed(args.seed)
    generator = make_generator(norms[1]).to(images.device)
    critic = make_critic(norms[0]).to(images.device)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.9))
        for network in (critic, generator)
    ]
    random = torch.Generator().manual_seed(args.seed)

    def generate():
        return generator(torch.randn(args.batch_size, NOISE, generator=random).to(images.device))

    history = []
    for _ in range(args.steps):
        chosen = torch.randint(len(images), (args.batch_size,), generator=random)
        real, fake = images[chosen.to(images.device)], generate().detach()
        distance = critic(real).mean() - critic(fake).mean()
        penalty = gradient_penalty(critic, real, fake, random)
        optimizers[0].zero_grad()
        (PENALTY * penalty - distance).backward()
        optimizers[0].step()

        loss = -critic(generate()).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        history.append((distance.item(), penalty.item(), loss.item()))
    return torch.tensor(history)


def print_table(theirs, ours):
    print(f"\n{'distance':>22}{'penalty':>20}{'generator loss':>20}")
    print("step " + 3 * f"{'torch':>9}{'ours':>9}  ")
    pairs = torch.stack([theirs, ours], dim=2).tolist()
    every = max(1, len(pairs) // 10)
    for step, row in list(enumerate(pairs, 1))[every - 1 :: every]:
        print(f"{step:4} " + "  ".join(f"{a:9.4f}{b:9.4f}" for a, b in row))


def main():
    args = parse_args()
    device = choose_device(args.device, emulate=True)
    repeat_to_the_bit()
    images, *_ = load_data(device)
    theirs = train((nn.BatchNorm2d, nn.BatchNorm1d), images, args)
    ours = train((batchnorm_cuda.BatchNorm2d, batchnorm_cuda.BatchNorm1d), images, args)
    print_table(theirs, ours)

    difference = ((theirs - ours).abs().amax(0) / theirs.abs().amax(0)).max().item()
    print(f"\nlargest difference: {difference:.1e} of the largest value")
    if not difference <= MAX_DIFFERENCE:  # negated, so that a NaN fails too
        sys.exit(f"FAILED: the two runs differ by {difference:.1e}, bound {MAX_DIFFERENCE:.0e}")
    print(f"OK: {args.steps} steps within {MAX_DIFFERENCE:.0e} of torch.nn's")


if __name__ == "__main__":
    main()
