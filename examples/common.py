"""What the examples share: the choice of a device, and the comparison with torch.nn."""

import argparse
import copy
import os
import sys

import torch

import batchnorm_cuda

# In float64 the two implementations differ by the order of their sums alone: on the CPU and in the
# examples' toy sizes by at most 3e-15. Faults planted in ours (eps doubled, the unbiased variance,
# mean or variance taken for constants in the gradient): at least 1.9e-5. The bound lies between,
# with room for larger networks.
MAX_GRADIENT_DIFFERENCE = 1e-9


def parse_arguments(parser, toy):
    """The command line, with --device and --toy, which stands for the arguments of `toy`."""
    parser.add_argument("--toy", action="store_true", help=f"seconds on a CPU: {toy}")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "emulated", "cuda"],
        default="auto",
        help="auto: a GPU if there is one, else the CPU; emulated: CUDA kernels on the CPU, slow",
    )
    args = parser.parse_args()
    if args.toy:
        vars(args).update(toy)
    return args


def parser_of_two_runs(description, batch_size):
    """The arguments of an example that trains twice, with torch.nn's batch norm and with ours."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: a GPU if there is one, else the CPU; cpu: CUDA kernels on the CPU",
    )
    return parser


def repeat_to_the_bit():
    """All but batch norm must, or its own noise would show where two runs are compared."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)  # layers this small only wait for each other's threads


def choose_device(choice, *, emulate=False):
    """A torch.device; `emulate`: where that is the CPU, it runs the CUDA kernels."""
    if choice == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch.cuda.is_available() is false")
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "emulated" or (emulate and choice == "cpu"):
        os.environ["BATCHNORM_CUDA_EMULATE"] = "1"  # looked at by each call
    device = torch.device("cuda" if choice == "cuda" else "cpu")
    backend = batchnorm_cuda.backend_for(torch.empty(0, device=device))
    print(f"torch {torch.__version__}, device {device}, batchnorm_cuda backend: {backend}")
    return device


def check_against_torch(model, loss_of, batch):
    """Exit unless one step's gradients are those of the same model with torch.nn's batch norms.

    `loss_of(model, *batch)` is differentiated, in float64 and on copies: `model` is not changed.
    """
    batch = [t.double() if t.is_floating_point() else t for t in batch]
    gradients = []
    for exchange in (batchnorm_cuda.convert, batchnorm_cuda.revert):
        twin = exchange(copy.deepcopy(model)).double().train()
        loss = loss_of(twin, *batch)
        gradients.append(torch.autograd.grad(loss, list(twin.parameters())))
    largest = max(g.abs().max() for g in gradients[1]).item()
    differences = [(a - b).abs().max() for a, b in zip(*gradients, strict=True)]
    difference = max(differences).item() / largest
    if not difference <= MAX_GRADIENT_DIFFERENCE:  # negated, so that a NaN fails too
        sys.exit(f"FAILED: gradients differ from torch.nn's by {difference:.1e} of the largest")
    print(f"OK: gradients of one step in float64 are within {difference:.1e} of torch.nn's")


def synchronize(device):
    """Wait for the GPU, before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
