"""`python -m bench tune`: times every plan that the planner could have chosen.

Of about 60 problems, each plan is forced, checked against the chosen one's results, and timed in
turns with the others on cold inputs. A row of the CSV file is flushed as soon as its problem is
measured; the JSON file beside it says which device the planner saw. `python -m bench calibrate`
reads both. Without a GPU it exits with status 2; with BATCHNORM_CUDA_EMULATE=1 it runs a handful
of tiny problems on the model of CUDA instead, whose rows tell nothing of a GPU's time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from batchnorm_cuda._build.extension import load_cuda, load_emulated

from . import environment
from .cases.case import BenchCase
from .loading import ROOT
from .options import natural, positive
from .rows import records
from .timing.machine import Machine, gpu, host_model
from .tuning.candidates import geometry, identity, list_plans, thin
from .tuning.measure import Limits, measure_plans
from .tuning.problems import problems, tiny_problems
from .tuning.rows import COPY, HOST, MEASURED, OK, OPTIONS, TuneRow

GPU_LIMITS = Limits(seconds=0.02, rounds=(7, 50))
HOST_LIMITS = Limits(seconds=0.001, rounds=(2, 2))


@dataclass(frozen=True)
class Setting:
    kind: str
    machine: Machine
    extension: ModuleType
    planner_device: dict[str, Any]
    limits: Limits


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", metavar="FOLDER")
    parser.add_argument("--seconds", type=positive, default=float("inf"), help="stop in time")
    parser.add_argument("--problems", type=natural, default=60, metavar="N")
    parser.add_argument("--candidates", type=natural, default=24, metavar="N", help="of a problem")
    return parser.parse_args(arguments)


def find_setting(command: str) -> Setting | None:
    """The GPU, or the model of CUDA where that is asked for; says which, if it is no GPU."""
    if torch.cuda.is_available():
        extension = load_cuda()
        return Setting(MEASURED, gpu(), extension, extension.device_info(), GPU_LIMITS)
    if os.environ.get("BATCHNORM_CUDA_EMULATE") == "1":
        extension = load_emulated()
        print("model of CUDA: no time below is a GPU's", file=sys.stderr)
        return Setting(HOST, host_model(), extension, extension.device_info(), HOST_LIMITS)
    print(f"{command}: no GPU", file=sys.stderr)
    return None


def problem_rows(case: BenchCase, setting: Setting, most: int) -> Iterator[TuneRow]:
    """A row for each plan, and one for the copy."""
    sizes = geometry(case)
    device = setting.extension.device_info()  # less what it has refused by now
    plans = list_plans(setting.extension, case.op, case.dtype, sizes, device)
    plans = thin(plans, most)
    outcomes = measure_plans(case, plans, setting.extension, setting.machine, setting.limits)
    fixed = {
        "kind": setting.kind,
        "device": setting.machine.name,
        "set": case.shape.name,
        "shape": case.shape.text,
        "layout": case.layout,
        "dtype": case.dtype,
        "op": case.op,
        "count": case.shape.count,
        **dict(zip(("n", "c", "s"), sizes, strict=True)),
    }
    for plan, outcome in zip(plans, outcomes.plans, strict=True):
        options = dict(zip(OPTIONS, identity(plan), strict=True))
        said = {name: plan[name] for name in ("cost", "predicted_bytes")}
        yield TuneRow(**fixed, **options, chosen=int(plan["chosen"]), **said, **outcome)
    copied = {**OPTIONS, "strategy": COPY, "chosen": 0, "cost": None}
    yield TuneRow(**fixed, **copied, predicted_bytes=case.compulsory_bytes, **outcomes.copy)


def run(options: argparse.Namespace, setting: Setting) -> int:
    work = tiny_problems() if setting.kind == HOST else problems()
    work = work[: options.problems]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{environment.file_stem(setting.machine.name)}-tune.csv"
    path.unlink(missing_ok=True)
    facts = environment.collect(None if setting.kind == MEASURED else "h100")
    facts |= {"kind": setting.kind, "device": setting.machine.name}
    facts |= {"planner_device": setting.planner_device, "problems": len(work), "done": 0}
    _write_facts(path, facts)  # also where there is no time for even one problem
    start, longest, failed = time.monotonic(), 0.0, 0
    for case in work:
        began = time.monotonic()
        if began - start + longest > options.seconds:
            break
        rows = list(problem_rows(case, setting, options.candidates))
        for row in rows:
            records.append(path, row)
        failed += sum(row.status != OK for row in rows)
        longest = max(longest, time.monotonic() - began)
        facts["done"] += 1
        _write_facts(path, facts)
        print(_line(case, rows), flush=True)
    print(f"{facts['done']} of {len(work)} problems, {failed} rows without a time; wrote {path}")
    return 1 if failed else 0


def _write_facts(path: Path, facts: dict[str, Any]) -> None:
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


def _line(case: BenchCase, rows: list[TuneRow]) -> str:
    """What a person wants to see pass by: the chosen plan against the best and the copy."""
    times = {row.forced: row.ms for row in rows if row.ms is not None and row.strategy != COPY}
    copy, best = rows[-1].ms, min(times.values(), default=None)
    chosen = next((row.ms for row in rows if row.chosen), None)
    if chosen is None or best is None:
        return f"{case.title}: {len(rows) - 1} plans, no time of the chosen one"
    gpu = rows[0].kind == MEASURED
    over = f", {chosen / copy:.2f} of the copy" if copy and gpu else ""
    unit = "ms" if gpu else "host ms"
    return f"{case.title}: {len(rows) - 1} plans, {chosen:.4f} {unit}, best {best:.4f}{over}"


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    setting = find_setting("tune")
    return 2 if setting is None else run(options, setting)
