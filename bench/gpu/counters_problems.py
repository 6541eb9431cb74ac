"""What `bench.counters` has counted: large problems, and kernels launched so that rows find theirs.

    python3 -m bench.gpu.counters_problems FIRST COUNT     (under ncu: bench.counters starts it)

Before each problem a tiny kernel runs that no problem has, sum_ranks_kernel: in ncu's list, which
is in the order of launches, whatever follows it belongs to the problem.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch

from batchnorm_cuda import explain
from batchnorm_cuda._build.extension import load_cuda

from ..models.traffic_model import Case, operation
from .worker import say

MARKER = "sum_ranks_kernel"
FLUSH_BYTES = 512 * 2**20  # beyond any L2 cache


@dataclass(frozen=True)
class Counted:
    case: Case
    strategy: str = "auto"

    def cut(self, n: int) -> Counted:
        return replace(self, case=replace(self.case, shape=(n, *self.case.shape[1:])))


def _of(
    shape: tuple[int, ...], layout: str, dtype: str, op: str, strategy: str = "auto"
) -> Counted:
    return Counted(Case(shape, layout, dtype, op), strategy)


# By what an H100 makes of them: teams of a block, a cluster and a grid, one that streams, rows, odd
# runs, two passes, and what is fused. x is 200 MB, four times the L2 cache, and more.
PROBLEMS = (
    _of((128, 64, 112, 112), "nchw", "fp16", "forward"),
    _of((128, 64, 112, 112), "nchw", "fp16", "backward"),
    _of((128, 256, 56, 56), "nhwc", "fp16", "forward"),
    _of((128, 256, 56, 56), "nhwc", "fp16", "backward"),
    _of((128, 64, 112, 112), "nhwc", "fp16", "forward"),
    _of((128, 64, 112, 112), "nchw", "fp16", "forward", "two_pass"),
    _of((128, 256, 56, 56), "nhwc", "fp16", "backward", "two_pass"),
    _of((32, 2048, 28, 28), "nchw", "fp32", "forward"),
    _of((128, 512, 28, 28), "nchw", "fp32", "backward"),
    _of((127, 63, 111, 111), "nchw", "fp16", "forward"),
    _of((1024, 2048, 7, 7), "nchw", "fp16", "backward"),
    Counted(Case((128, 256, 56, 56), "nhwc", "fp16", "forward", residual=True, relu=True)),
)


def describe(problem: Counted, x: torch.Tensor) -> dict[str, Any]:
    """The problem's columns, and what the plan for `x` predicts."""
    case = problem.case
    fused = {"residual": case.residual, "activation": case.activation}
    plan = explain(x, op=case.op, strategy=problem.strategy, **fused)
    form = "+".join(name for name in ("residual", "relu") if getattr(case, name))
    row = {"shape": "x".join(map(str, case.shape)), "form": form, "launches": plan.launches}
    row |= {k: v for k, v in asdict(case).items() if k in ("layout", "dtype", "op")}
    row |= {"strategy": plan.strategy, "pattern": plan.pattern}
    row |= {"compulsory_bytes": plan.compulsory_bytes, "predicted_bytes": plan.predicted_bytes}
    if plan.team is not None:
        row |= {"scope": plan.team.scope, "size": plan.team.size}
    return row


def run(
    problems: Sequence[Counted],
    extension: ModuleType,
    device: str,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    with torch.device(device):
        marks = torch.zeros(2, 2, 8)
        flush = torch.zeros(FLUSH_BYTES // 4 if device == "cuda" else 1)
        for problem in problems:
            x = problem.case.tensor().normal_()
            call = operation(problem.case, extension, x)
            tell({"problem": describe(problem, x)})
            extension.set_plan_options({"strategy": problem.strategy})
            flush.sum()  # read, not written: no line of it is left to be written back later
            extension.sync_sum(marks)
            call()
            extension.set_plan_options({})
            if device == "cuda":
                torch.cuda.synchronize()


def main(first: int, count: int) -> int:
    extension = load_cuda()
    say({"device": torch.cuda.get_device_name(), "l2_bytes": extension.device_info()["l2_bytes"]})
    run(PROBLEMS[first : first + count], extension, "cuda", say)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
