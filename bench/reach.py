"""Which problem leads to which kernel instance: `python -m bench reach [--all] [LIBRARY]...`.

Sweeps problems over described devices, names the kernels that each plan launches, and holds the
names against those in compiled libraries (the host model's, where none is given). An instance that
nothing reaches costs every build its seconds and bytes for nothing: exit 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from batchnorm_cuda import devices
from batchnorm_cuda._build.extension import load_emulated

from .machine_code import instances

SCALARS = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}
VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
FORWARD, BACKWARD = ("forward_training", "forward_eval"), ("backward_training", "backward_eval")
DOUBLE_BACKWARD = ("double_backward_training", "double_backward_eval")

# The kernel of a stage, by the direction.
STAGES = {
    "reduce": {
        "forward": "collect_statistics_kernel<{cursor}>",
        "backward": "backward_reduce_kernel<{cursor}, {epilogue}>",
        "double_backward": "double_backward_reduce_kernel<{cursor}>",
    },
    "elementwise": {
        "forward": "transform_input_kernel<{cursor}, {epilogue}>",
        "backward": "backward_elementwise_kernel<{cursor}, {epilogue}>",
        "double_backward": "double_backward_elementwise_kernel<{cursor}>",
    },
}
# The kernels that no plan chooses between: of ranks, and of the query for clusters.
_OF_RANKS = itertools.product(("merge_ranks_kernel", "sum_ranks_kernel"), ("float", "double"))
FIXED = {"probe_kernel", *(f"{kernel}<{acc}>" for kernel, acc in _OF_RANKS)}
MOST_BYTES = 180 * 10**9  # of all tensors of a problem: what a B200 holds


@dataclass(frozen=True)
class Problem:
    """What make_plan is asked, apart from the device."""

    op: str
    sizes: tuple[int, int, int]  # [N, C, S] in memory
    dtype: str
    facts: tuple[tuple[str, Any], ...] = ()

    @property
    def direction(self) -> str:
        return self.op.removesuffix("_training").removesuffix("_eval")

    @property
    def nbytes(self) -> int:
        tensors = 2 if self.op in FORWARD else 3 if self.op in BACKWARD else 5
        return math.prod(self.sizes) * VALUE_BYTES[self.dtype] * tensors

    def plan(self, extension: ModuleType, device: Mapping[str, Any]) -> dict[str, Any]:
        return extension.make_plan(self.op, *self.sizes, self.dtype, device, dict(self.facts))


# ------------------------------------------------------------------------------- names


def launched(plan: Mapping[str, Any], problem: Problem) -> set[str]:
    """Names of the kernels that a plan launches, as instances.short_names() has them."""
    scalar = SCALARS[problem.dtype]
    fused = dict(problem.facts).get("fused", False)
    pass_name = "Forward" if problem.op in FORWARD else "Backward"
    acc = "double" if scalar == "double" else "float"
    epilogue = f"Fused{pass_name}<{scalar}>" if fused else f"Identity<{acc}>"
    if "team" in plan:
        team = plan["team"]
        held, cursor = team["register_windows"] * team["tensors"], _team_cursor(team, scalar)
        return {f"team_kernel<{cursor}, Team{pass_name}, {held}, {epilogue}>"}
    found = set()
    if "reduce" in plan:
        found |= _merges(problem, acc)
    for stage in STAGES.keys() & plan.keys():
        kernel = STAGES[stage][problem.direction]
        found |= {kernel.format(cursor=_cursor(plan[stage], scalar), epilogue=epilogue)}
    return found


def _merges(problem: Problem, acc: str) -> set[str]:
    if problem.op in DOUBLE_BACKWARD:
        return {f"merge_kernel<DoubleGradSums<{acc}>, MergeDoubleGradientsParams<{acc}>>"}
    if problem.op in BACKWARD:
        return {f"merge_kernel<GradSums<{acc}>, MergeGradientsParams<{acc}>>"}
    found = {f"merge_kernel<Welford<{acc}>, MergeStatisticsParams<{acc}>>"}
    if dict(problem.facts).get("output_shift") == -1:  # a rank's part
        found = {f"merge_kernel<Welford<{acc}>, MergeMomentsParams<{acc}>>"}
    return found


def _cursor(t: Mapping[str, Any], scalar: str) -> str:
    """As with_cursor() and its like choose (csrc/kernels/launch.cuh)."""
    index = "int" if t["exact"] else "long"
    exact = str(t["exact"]).lower()
    if t["pattern"] == "along_s":
        narrow = t["exact"] and t["index_bits"] == 32
        return f"AlongS<{scalar}, int>" if narrow else f"AlongRuns<{scalar}, long, {exact}>"
    return f"{'AlongC' if t['pattern'] == 'along_c' else 'AlongRow'}<{scalar}, {index}, {exact}>"


def _team_cursor(team: Mapping[str, Any], scalar: str) -> str:
    exact = team["traversal"]["exact"]
    return {
        ("along_c", True): f"AlongC<{scalar}, int, true>",
        ("along_row", True): f"AlongRow<{scalar}, int, true>",
        ("along_row", False): f"AlongSamples<{scalar}, int>",
        ("along_s", True): f"AlongS<{scalar}, int>",
        ("along_s", False): f"AlongRuns<{scalar}, int, false>",
    }[team["pattern"], exact]


# ------------------------------------------------------------------------------- the sweep

SIZES = (
    (1, 2, 3, 4, 8, 16, 19, 32, 64, 256, 1000, 4096, 65536),
    (1, 2, 3, 7, 8, 11, 24, 64, 65, 96, 257, 512, 1024, 2048, 4096),
    (1, 2, 7, 8, 30, 49, 64, 196, 225, 783, 784, 3136, 12544, 2**16, 2**18, 2**20 + 1, 2**24),
)
HUGE = ((1, 1, 2**31), (2, 1, 2**30 + 4), (2**25, 64, 1), (2**27 + 8, 24, 1), (2**25, 3, 24))
HUGE += ((2**22 + 1, 3, 7 * 49), (2**24, 24, 49), (2**24 - 1, 24, 49), (64, 64, 2**19))
# Found at random, for instances that hardly any problem reaches.
RARE = ((2039210, 4, 1), (5517, 607, 9), (7746, 227, 13), (87, 1091, 11), (32, 65, 12544))


def forms(op: str) -> Iterator[dict[str, Any]]:
    """What can be asked of an operation: fused or not, aligned or not, in two passes where ranks
    share the batch or a launch was refused."""
    if op in FORWARD:
        fused = [{}, {"fused": True, "mask": True, "residual_shift": 0}]
        fused += [{"fused": True, "mask": True}]
        aligned, shifted = [{}], [{"input_shift": 1}]
    elif op in BACKWARD:
        fused = [{}, {"fused": True, "mask": True}, {"fused": True, "mask": True, "outputs": 2}]
        aligned, shifted = [{"grad_output_shift": 0}], [{"grad_output_shift": 1}]
        aligned += [{"grad_output_shift": 0, "need_sums": False}] * (op == "backward_eval")
    else:
        fused = [{}]
        aligned = [{"grad_output_shift": 0, "grad_grad_input_shift": 0, "outputs": 2}]
        shifted = [{**aligned[0], "input_shift": 1}]
    yield from ({**a, **b} for a, b in itertools.product(fused, aligned + shifted))
    if op in (FORWARD[0], BACKWARD[0]):
        ranks = {"strategy": "two_pass"}
        yield from ({**a, **b, **ranks} for a, b in itertools.product(fused, aligned))
    if op == FORWARD[0]:
        yield {"strategy": "two_pass", "output_shift": -1}


def sizes() -> list[tuple[int, int, int]]:
    """Small ones first: the first problem that reaches an instance is what is reported."""
    grid = {each for n, c, s in itertools.product(*SIZES) for each in ((n, c, s), (n * s, c, 1))}
    return sorted({*grid, *HUGE, *RARE}, key=lambda each: (math.prod(each), each))


def problems_of(sizes: tuple[int, int, int]) -> Iterator[Problem]:
    for op, dtype in itertools.product((*FORWARD, *BACKWARD, *DOUBLE_BACKWARD), SCALARS):
        for facts in forms(op):
            problem = Problem(op, sizes, dtype, tuple(facts.items()))
            if problem.nbytes <= MOST_BYTES:
                yield problem


def described() -> dict[str, dict[str, Any]]:
    """The described devices, and each as it is planned for once it refused a scope of teams."""
    found = {}
    for name, device in devices.DEVICES.items():
        properties = devices.planner_properties(device)
        found[name] = properties
        found[f"{name} without grids"] = properties | {"cooperative": False}
        if properties["max_cluster"]:
            found[f"{name} without clusters"] = properties | {"max_cluster": 0}
    return found


@dataclass
class Reached:
    """An instance: how many problems lead there, on which device the first of them, and that."""

    count: int
    device: str
    first: Problem


def sweep(extension: ModuleType) -> dict[str, Reached]:
    found: dict[str, Reached] = {}
    problems = itertools.chain.from_iterable(map(problems_of, sizes()))
    for problem, (name, device) in itertools.product(problems, described().items()):
        for kernel in launched(problem.plan(extension, device), problem):
            found.setdefault(kernel, Reached(0, name, problem)).count += 1
    return found


# ------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench reach", description=__doc__)
    parser.add_argument("library", nargs="*", type=Path, help="compiled kernels")
    parser.add_argument("--all", action="store_true", help="the first problem of every instance")
    options = parser.parse_args(arguments)
    extension = load_emulated()
    libraries = options.library or [str(extension.__file__)]
    compiled = instances.compiled(libraries)[0] - FIXED
    if not compiled:
        print(f"python -m bench reach: no kernels in {', '.join(map(str, libraries))}")
        return 2
    found = sweep(extension)
    for kernel, reached in sorted(found.items()) if options.all else ():
        print(f"{reached.count:8}  {kernel}  {reached.device}: {reached.first}")
    unreached, missing = sorted(compiled - found.keys()), sorted(found.keys() - compiled)
    for title, names in (("reached by nothing", unreached), ("planned, not there", missing)):
        print(f"{title}: {len(names)} of {len(compiled)} instances", *names, sep="\n  ")
    for template, count in Counter(name.split("<")[0] for name in unreached).items():
        print(f"{count:4}  {template}")
    return 1 if unreached or missing else 0


if __name__ == "__main__":
    sys.exit(main())
