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

Exit status 1 if the kernels' ratio is above --limit in either mode.
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


def make_step(module_type: type[torch.nn.Module], training: bool, device: str) -> Callable:
    """One forward and backward of all three gradients, which start as None each time."""
    module = module_type(SHAPE[1]).to(device).train(training)
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    dy = torch.randn(SHAPE, device=device)

    def step() -> None:
        x.grad = module.weight.grad = module.bias.grad = None
        module(x).backward(dy)

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
    """Microseconds and ratio to torch.nn: of torch.nn, the kernels and the composite (CPU)."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    ours = make_step(batchnorm_cuda.BatchNorm2d, training, device)
    contenders = {
        "torch.nn": (make_step(torch.nn.BatchNorm2d, training, device), as_it_is),
        "kernels": (ours, as_it_is if gpu else emulated_without_launches),
    }
    if not gpu:
        contenders["composite"] = (ours, as_it_is)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (step, context) in contenders.items():
            with context():
                samples[name].append(time_round(step, calls, device))
    return {
        name: (
            statistics.median(values),
            statistics.median(a / b for a, b in zip(values, samples["torch.nn"], strict=True)),
        )
        for name, values in samples.items()
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--calls", type=int, default=60, help="steps in a round")
    parser.add_argument("--limit", type=float, default=1.2, help="of the kernels over torch.nn")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    os.environ.pop("BATCHNORM_CUDA_EMULATE", None)
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, launches not run"
    print(f"torch {torch.__version__}, {where}; forward + backward of {SHAPE}, float32")
    print(f"{'':10}{'mode':>10}{'CPU us':>9}{'over torch.nn':>15}")
    worst = 0.0
    for training in (True, False):
        times = measure(training, arguments.rounds, arguments.calls)
        for name, (value, ratio) in times.items():
            mode = "training" if training else "eval"
            print(f"{name:10}{mode:>10}{value:9.1f}{ratio:15.2f}")
        worst = max(worst, times["kernels"][1])
    if worst > arguments.limit:
        print(f"kernels: {worst:.2f} is above the limit of {arguments.limit}", file=sys.stderr)
    return int(worst > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
