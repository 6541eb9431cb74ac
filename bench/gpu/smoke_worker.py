"""Runs one group of `bench.smoke`'s cases in a process of its own: `bench.smoke` starts it.

    python3 -m bench.gpu.smoke_worker fp16 [--first 0] [--all]

Answers (bench/gpu/worker.py) come as soon as there is one: {"cases", "libraries", "device"}, then
{"start"} and {"row"} of every case, {"ran"} with names of kernels, and {"end"}. Whatever stops the
process, the one that reads knows at which case. Ends with status 3 after an error that leaves the
CUDA context without use: the next cases need another process.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from batchnorm_cuda._build.extension import build_kernels, load_cuda, load_emulated

from ..timing import check
from . import smoke_cases
from .smoke_problem import Problem
from .worker import say

PASS, FAIL, UNREACHED, NOT_RUN = "PASS", "FAIL", "UNREACHED", "NOT RUN"
CONTEXT_LOST = 3
CASES_PER_PROFILE = 50  # so that a lost process leaves most of the names

Say = Callable[[dict[str, Any]], None]


@contextmanager
def watched(extension: ModuleType, device: str, tell: Say) -> Iterator[None]:
    """Says which kernels were launched meanwhile."""
    if device == "cpu":
        extension._host_model.start_traffic()
        yield
        tell({"ran": sorted(set(extension._host_model.stop_traffic()["launches"]))})
        return
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        yield
        torch.cuda.synchronize()
    names = {event.key for event in record.key_averages()}
    tell({"ran": sorted(name for name in names if "_kernel" in name)})


def judge(problem: Problem) -> dict[str, Any]:
    """Runs it: status, error and note."""
    results, want = problem.run()
    if problem.x.is_cuda:
        torch.cuda.synchronize()
    worst = {name: check.error({name: got}, want) for name, got in results.items()}
    worst |= dict.fromkeys(problem.wrong, math.inf)
    name = max(worst, key=worst.__getitem__)
    if worst[name] <= 1:
        return {"status": PASS, "error": f"{worst[name]:.3g}"}
    off = ", ".join(f"{n} {e:.3g}" for n, e in worst.items() if e > 1)
    return {"status": FAIL, "error": f"{worst[name]:.3g}", "note": f"beyond the tolerance: {off}"}


def run_case(case: smoke_cases.Case, planner: smoke_cases.Planner, device: str) -> dict[str, Any]:
    began = time.perf_counter()
    reached = planner.reach(case)
    if reached is None:
        note = "no shape of the list leads to this plan on this device"
        return case.row() | {"status": UNREACHED, "note": note}
    torch.manual_seed(0)
    planner.extension.set_plan_options(planner.options(reached))
    try:
        verdict = judge(Problem(reached, planner.extension, device))
        planner.device = planner.extension.device_info()  # less what it refused by now
        if reached.scope and not planner.leads_there(reached):
            note = "the device refused to launch this team, and other kernels took its place"
            verdict = {"status": FAIL, "note": note}
    except Exception as error:  # whatever it is, it is this case's
        verdict = {"status": FAIL, "note": f"{type(error).__name__}: {error}"[:500]}
    finally:
        planner.extension.set_plan_options({})
    return reached.row() | verdict | {"seconds": f"{time.perf_counter() - began:.3f}"}


def context_is_lost(device: str) -> bool:
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False


def run_cases(
    found: list[smoke_cases.Case], first: int, extension: ModuleType, device: str, tell: Say
) -> bool:
    """False where the context was lost on the way."""
    planner = smoke_cases.Planner(extension)
    for begin in range(first, len(found), CASES_PER_PROFILE):
        with watched(extension, device, tell):
            for index in range(begin, min(begin + CASES_PER_PROFILE, len(found))):
                tell({"start": index, "case": found[index].row()})
                row = run_case(found[index], planner, device)
                lost = row["status"] == FAIL and context_is_lost(device)
                if lost:
                    row["note"] += "; the CUDA context is lost with it"
                tell({"row": row})
                if lost:
                    return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu.smoke_worker")
    parser.add_argument("dtype", choices=smoke_cases.DTYPES)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="all cases on the host model, too")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(smoke_cases.DTYPES)))
    extension = load_cuda() if gpu else load_emulated()
    libraries = build_kernels() if gpu else [extension.__file__]
    found = smoke_cases.all_cases(options.dtype, smoke_cases.Planner(extension))
    if not gpu and not options.all:
        found = smoke_cases.cut(found, options.dtype)
    name = torch.cuda.get_device_name() if gpu else "the host model"
    say({"cases": len(found), "libraries": [str(path) for path in libraries], "device": name})
    if not run_cases(found, options.first, extension, "cuda" if gpu else "cpu", say):
        os._exit(CONTEXT_LOST)  # destructors would only fail again
    say({"end": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
