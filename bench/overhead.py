"""CPU time of a module's forward + backward on a tiny tensor, beside torch.nn.BatchNorm2d's.

    python -m bench.overhead [--rounds 150] [--calls 60] [--limit 1.2]

On so small a tensor a GPU waits for the host, so that the time of a step is what Python, autograd,
checks, allocations, the plan and the launches cost. Modules take turns, round by round, in one
process with one thread. The figures are medians over rounds: of the process's CPU time a step, and
of its ratio to torch.nn's in the same round, so that other load on the machine weighs on both.

With a GPU, both sides run on it and are not waited for within a round. Without one, ours is the
extension's own path (Python and C++, compiled for the host model of CUDA) with launches checked but
not run, beside torch's CPU operator, whose arithmetic on 64 values is small against its dispatch:
neither side has the driver's share, a few launches each. The composite of torch operators is shown
as well; it computes, and has no bound to keep.

The same for relu(bn(x) + residual): by torch.nn's three calls, "3 calls", and by a model after
`convert(fuse=True)`, "fused", whose ratio is to those three. A tensor that waits takes Python; that
it saves two launches, and three in the backward, is not in these figures.

Exit status 1 if in either mode the kernels' ratio is above --limit, or the fused one's above
--fused-limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import batchnorm_cuda
from batchnorm_cuda._build.extension import load_emulated

SHAPE = (2, 8, 2, 2)


class Block(torch.nn.Module):
    """What ends the block of a residual network, in torch.nn's words."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(SHAPE[1])
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        x = self.bn(x)
        x += residual
        return self.relu(x)


def make_step(module: torch.nn.Module, inputs: int, training: bool, device: str) -> Callable:
    """One forward and backward of all gradients, which start as None each time."""
    module.to(device).train(training)
    given = [torch.randn(SHAPE, device=device, requires_grad=True) for _ in range(inputs)]
    dy = torch.randn(SHAPE, device=device)
    leaves = [*given, *module.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(*given).backward(dy)

    return step


@contextmanager
def emulated_without_launches() -> Iterator[None]:
    os.environ["BATCHNORM_CUDA_EMULATE"] = "1"
    model = load_emulated()._host_model
    model.skip_launches(True)
    try:
        yield
    finally:
        model.skip_launches(False)
        del os.environ["BATCHNORM_CUDA_EMULATE"]


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


def time_round(step: Callable, calls: int, device: str) -> float:
    """CPU microseconds a step."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.process_time_ns()
    for _ in range(calls):
        step()
    elapsed = time.process_time_ns() - start
    if device == "cuda":
        torch.cuda.synchronize()
    return elapsed / calls / 1000


def measure(training: bool, rounds: int, calls: int) -> dict[str, tuple[float, float]]:
    """Microseconds and ratio to torch.nn: of torch.nn, the kernels, the composite (CPU), fused."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    ours = make_step(batchnorm_cuda.BatchNorm2d(SHAPE[1]), 1, training, device)
    fused = make_step(batchnorm_cuda.convert(Block(), fuse=True), 2, training, device)
    extension = as_it_is if gpu else emulated_without_launches
    theirs = make_step(torch.nn.BatchNorm2d(SHAPE[1]), 1, training, device)
    contenders = {"torch.nn": (theirs, as_it_is), "kernels": (ours, extension)}
    if not gpu:
        contenders["composite"] = (ours, as_it_is)
    contenders["3 calls"] = (make_step(Block(), 2, training, device), as_it_is)
    contenders["fused"] = (fused, extension)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (step, context) in contenders.items():
            with context():
                samples[name].append(time_round(step, calls, device))
    return {
        name: (
            statistics.median(values),
            statistics.median(a / b for a, b in zip(values, samples[_against(name)], strict=True)),
        )
        for name, values in samples.items()
    }


def _against(name: str) -> str:
    return "3 calls" if name in ("3 calls", "fused") else "torch.nn"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--calls", type=int, default=60, help="steps in a round")
    parser.add_argument("--limit", type=float, default=1.2, help="of the kernels over torch.nn")
    parser.add_argument("--fused-limit", type=float, default=1.1, help="of fused over 3 calls")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    os.environ.pop("BATCHNORM_CUDA_EMULATE", None)
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, launches not run"
    print(f"torch {torch.__version__}, {where}; forward + backward of {SHAPE}, float32")
    print(f"{'':10}{'mode':>10}{'CPU us':>9}{'over torch.nn':>15}")
    worst = {"kernels": 0.0, "fused": 0.0}
    for training in (True, False):
        times = measure(training, arguments.rounds, arguments.calls)
        for name, (value, ratio) in times.items():
            mode = "training" if training else "eval"
            print(f"{name:10}{mode:>10}{value:9.1f}{ratio:15.2f}")
        for name in worst:
            worst[name] = max(worst[name], times[name][1])
    limits = {"kernels": arguments.limit, "fused": arguments.fused_limit}
    above = [name for name in worst if worst[name] > limits[name]]
    for name in above:
        print(f"{name}: {worst[name]:.2f} is above the limit of {limits[name]}", file=sys.stderr)
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
