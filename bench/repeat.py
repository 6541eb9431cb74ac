"""Whether results repeat to the bit: run after run, and when a CUDA graph is replayed.

python -m bench.repeat runs 100    on the GPU, else emulated with BATCHNORM_CUDA_EMULATE=1
python -m bench.repeat graph       needs a GPU: exit status 2 without one
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import batchnorm_cuda

# Every access pattern, with channels that one block, several and many hold. The emulation takes
# about as long for one of the small ones as a GPU for all.
_LARGE = [
    ((32, 64, 56, 56), "nchw", torch.float16),
    ((32, 64, 56, 56), "nhwc", torch.bfloat16),
    ((64, 512, 7, 7), "nchw", torch.float16),
    ((16, 3, 224, 224), "nchw", torch.float32),
    ((8192, 1000), "nchw", torch.float16),
]
_SMALL = [((2, 3, 8, 8), "nchw", torch.float16), ((4, 8, 3, 3), "nhwc", torch.float32)]


def cases() -> Sequence[tuple[tuple[int, ...], str, torch.dtype]]:
    return _LARGE if torch.cuda.is_available() else _SMALL


class Step:
    """A training step of one batch norm: forward, backward, running statistics."""

    def __init__(self, sizes: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        x, self.dy = (torch.randn(sizes, device=device).to(dtype) for _ in range(2))
        if layout == "nhwc":
            x, self.dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, self.dy))
        self.x = x.requires_grad_()
        self.weight, self.bias, self.mean, self.var = (
            torch.rand(sizes[1], device=device) + 0.5 for _ in range(4)
        )
        self.weight.requires_grad_()
        self.bias.requires_grad_()

    def __call__(self) -> list[Tensor]:
        mean, var = self.mean.clone(), self.var.clone()
        output = batchnorm_cuda.batch_norm(self.x, mean, var, self.weight, self.bias, True)
        grads = torch.autograd.grad(output, [self.x, self.weight, self.bias], self.dy)
        return [output.detach(), mean, var, *grads]


def differing(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def repeat_runs(runs: int) -> int:
    for sizes, layout, dtype in cases():
        step = Step(sizes, layout, dtype)
        first = step()
        for run in range(1, runs):
            if differing(first, step()):
                print(f"run {run} of {sizes} {layout} {dtype} differs from the first")
                return 1
    print(f"{runs} runs of {len(cases())} cases equal to the bit")
    return 0


def replay_graphs(replays: int = 10) -> int:
    """A graph captured once, replayed on inputs that change, against eager steps."""
    if not torch.cuda.is_available():
        print("no GPU to capture a graph on")
        return 2
    for sizes, layout, dtype in cases():
        step = Step(sizes, layout, dtype)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for replay in range(replays):
            with torch.no_grad():
                step.x.normal_(mean=replay)
                step.dy.normal_()
            graph.replay()
            if differing(results, step()):
                print(f"replay {replay} of {sizes} {layout} {dtype} differs from an eager step")
                return 1
    print(f"{replays} replays of {len(cases())} graphs equal to eager steps")
    return 0


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["graph"]:
        return replay_graphs()
    if len(arguments) == 2 and arguments[0] == "runs" and arguments[1].isdigit():
        return repeat_runs(int(arguments[1]))
    print(__doc__)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
