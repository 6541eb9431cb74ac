"""Everything that needs a GPU, in one command, with a verdict a line.

    python -m bench gpu-check [--minutes 10] [--rehearse] [--out FOLDER] [--peer-tolerance 1]

Builds the kernels, runs the whole test suite on cuda, compute-sanitizer over the driver without
PyTorch, 100 equal runs, CUDA graphs, and the benchmark's short set, which leaves CSV, Markdown and
HTML in bench/results under the GPU's name.

Without a GPU each step is rehearsed on the host build, or says that it needs one. Exit status 0 if
all passed, 1 if something failed, 2 if nothing failed but something is missing; with --rehearse 0
for that as well.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import gpu_steps, report
from .gpu_steps import FAIL, PASS, Outcome, Plan, Step
from .loading import ROOT
from .results import read_csv, read_environment, write_json


@dataclass(frozen=True)
class Verdict:
    name: str
    outcome: Outcome
    seconds: float

    def __str__(self) -> str:
        status, text = self.outcome.status, self.outcome.text
        return f"{status:<8} {self.name:<12} {self.seconds:5.0f} s  {text}"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int | None  # None: stopped for want of time
    output: str


def run_command(command: Sequence[str], seconds: float, emulate: bool) -> Done:
    """With everything that it starts ended when the time is over."""
    environment = dict(os.environ)
    environment.pop("BATCHNORM_CUDA_EMULATE", None)
    if emulate:
        environment["BATCHNORM_CUDA_EMULATE"] = "1"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        return Done(process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Done(None, process.communicate()[0])
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def run_step(step: Step, plan: Plan, left: float) -> Outcome:
    """The commands of a step one after the other, up to the first that does not pass."""
    missing = step.missing(plan)
    if missing is not None and not (step.host and not plan.gpu):
        return missing
    deadline = time.monotonic() + left
    last = Done(0, "")
    for command in step.commands(plan):
        last = run_command(command, deadline - time.monotonic(), emulate=not plan.gpu)
        if last.status is None:
            return Outcome(FAIL, f"out of time after {left:.0f} s: {gpu_steps.tail(last.output)}")
        if last.status != 0:
            shown = gpu_steps.tail(last.output)
            return Outcome(FAIL, f"exit status {last.status} of `{' '.join(command)}`: {shown}")
    text = gpu_steps.tail(last.output)
    if plan.gpu:
        return Outcome(PASS, text)
    return Outcome(gpu_steps.HOST, f"{text} [{missing.text if missing else 'on the host build'}]")


def run_all(
    steps: Sequence[Step], plan: Plan, seconds: float, show: Callable[[str], None]
) -> list[Verdict]:
    """A step may take what is left when those behind it have their reserve."""
    verdicts = []
    end = time.monotonic() + seconds
    for at, step in enumerate(steps):
        started = time.monotonic()
        reserve = sum(later.reserve for later in steps[at + 1 :])
        outcome = run_step(step, plan, max(step.reserve, end - started - reserve))
        verdicts.append(Verdict(step.name, outcome, time.monotonic() - started))
        show(str(verdicts[-1]))
    return verdicts


def exit_status(verdicts: Sequence[Verdict], rehearse: bool) -> int:
    statuses = {verdict.outcome.status for verdict in verdicts}
    if FAIL in statuses:
        return 1
    return 0 if statuses <= {PASS} or rehearse else 2


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """The last line: what is missing, by name."""
    by_status = {
        status: [v.name for v in verdicts if v.outcome.status == status]
        for status in dict.fromkeys(v.outcome.status for v in verdicts)
    }
    passed = len(by_status.pop(PASS, []))
    parts = [f"{status}: {', '.join(names)}" for status, names in by_status.items()]
    return f"{passed} of {len(verdicts)} passed on a GPU" + "".join(f"; {part}" for part in parts)


def add_to_report(plan: Plan, verdicts: Sequence[Verdict]) -> list[Path]:
    """The verdicts go into the files that the benchmark has written, if it has."""
    path = plan.csv_path
    if not path.exists():
        return []
    rows, environment = read_csv(path), read_environment(path)
    if not rows:
        return []
    environment |= {f"check, {v.name}": f"{v.outcome.status}, {v.outcome.text}" for v in verdicts}
    write_json(path.with_suffix(".json"), environment, rows)
    return list(report.write(path, environment, rows).files)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu-check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rehearse", action="store_true", help="as if there were no GPU")
    parser.add_argument("--out", type=Path, help="default: bench/results, or build/gpu-check")
    parser.add_argument("--peer-tolerance", type=float, default=1, help="see python -m bench")
    options = parser.parse_args(arguments)
    plan = gpu_steps.make_plan(options.rehearse, options.out)
    plan = replace(plan, peer_tolerance=options.peer_tolerance)
    show = partial(print, flush=True)
    verdicts = run_all(gpu_steps.STEPS, plan, 60 * options.minutes, show)
    for file in add_to_report(plan, verdicts):
        print(f"wrote {file}")
    print(conclusion(verdicts))
    return exit_status(verdicts, options.rehearse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
