"""The steps of `python -m bench gpu-check`: what each runs on a GPU, and instead without one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import environment
from .loading import ROOT
from .toolkit import ToolkitError, resolve

PASS = "PASS"
FAIL = "FAIL"
HOST = "HOST"  # passed on the host build: rehearsed, nothing said about a GPU
NO_GPU = "NO GPU"
MISSING = "MISSING"  # a tool

RUNS = 100  # that must be equal to the bit
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Outcome:
    status: str
    text: str


@dataclass(frozen=True)
class Plan:
    """What is here, and where results go."""

    gpu: bool
    device: str
    out: Path
    sanitizer: Path | None = None
    toolkit: str | None = None  # why there is none
    peer_tolerance: float = 1.0  # of the benchmark

    @property
    def stem(self) -> str:
        return environment.file_stem(self.device) if self.gpu else "model"

    @property
    def csv_path(self) -> Path:
        return self.out / f"{self.stem}.csv"

    @property
    def driver(self) -> Path:
        return ROOT / "build" / "standalone" / ("cuda" if self.gpu else "host") / "bn_standalone"


@dataclass(frozen=True)
class Step:
    name: str
    commands: Callable[[Plan], list[list[str]]]
    reserve: float  # seconds that steps before this one leave to it
    host: bool = False  # whether the commands also run without a GPU, on the host build
    tool: Callable[[Plan], str | None] = lambda plan: None  # what it lacks

    def missing(self, plan: Plan) -> Outcome | None:
        """Why it cannot run on a GPU here."""
        if not plan.gpu:
            return Outcome(NO_GPU, f"needs a GPU: {plan.device}")
        lacking = self.tool(plan)
        return Outcome(MISSING, lacking) if lacking is not None else None


def make_plan(rehearse: bool, out: Path | None) -> Plan:
    gpu = torch.cuda.is_available() and not rehearse
    device = torch.cuda.get_device_name() if gpu else _why_no_gpu(rehearse)
    default = ROOT / "bench" / "results" if gpu else ROOT / "build" / "gpu-check"
    try:
        home: Path | None = resolve().home
        problem = None
    except ToolkitError as error:
        home, problem = None, str(error).splitlines()[0]
    return Plan(gpu, device, (out or default).resolve(), find_sanitizer(home), problem)


def _why_no_gpu(rehearse: bool) -> str:
    if rehearse:
        return "this is a rehearsal"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return f"torch (CUDA {torch.version.cuda}) finds none"


def find_sanitizer(home: Path | None) -> Path | None:
    """compute-sanitizer on PATH, of the toolkit, or from PyPI."""
    on_path = shutil.which("compute-sanitizer")
    candidates = [Path(on_path)] if on_path else []
    folders = [home] if home is not None else []
    for entry in sys.path:
        folders += sorted(Path(entry or ".").glob("nvidia/cu*"), reverse=True)
    for folder in folders:
        candidates.append(folder / "bin" / "compute-sanitizer")
        candidates.append(folder / "compute-sanitizer" / "compute-sanitizer")
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def tail(output: str) -> str:
    """The last line that says something."""
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    return lines[-1][:200] if lines else "no output"


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _build(plan: Plan) -> list[list[str]]:
    """The extension and the driver at the same time: both compile the same few long files."""
    suffix = "" if plan.gpu else "-host"
    targets = [f"extension{suffix}", f"standalone{suffix}"]
    jobs = f"-j{max(2, os.cpu_count() or 1)}"
    make = ["make", "--no-print-directory", jobs, *targets, f"PYTHON={sys.executable}"]
    return [make, ["echo", f"the extension and {plan.driver.relative_to(ROOT)}"]]


def _tests(plan: Plan) -> list[list[str]]:
    command = _python("-m", "pytest", "-q", "-p", "no:cacheprovider")
    workers = min(8, os.cpu_count() or 1)
    return [[*command, "-n", str(workers), "--dist", "loadfile"]]


def _repeat(*arguments: str) -> Callable[[Plan], list[list[str]]]:
    return lambda plan: [_python("-m", "bench.repeat", *arguments)]


def _sanitize(tool: str) -> Callable[[Plan], list[list[str]]]:
    def commands(plan: Plan) -> list[list[str]]:
        command = _python("-m", "bench.sanitize", str(plan.driver))
        if not plan.gpu:
            return [command]
        return [[*command, "--tool", tool, "--sanitizer", str(plan.sanitizer)]]

    return commands


def _bench(plan: Plan) -> list[list[str]]:
    command = _python("-m", "bench", "--set", "short", "--out", str(plan.out))
    if plan.gpu:
        tolerance = f"--peer-tolerance={plan.peer_tolerance:g}"
        return [[*command, "--seconds", "0.25", tolerance], _said(plan)]
    return [[*command, "--device", "h100", "--count", "4096", "--op", "forward"], _said(plan)]


def _said(plan: Plan) -> list[str]:
    kind = "rows" if plan.gpu else "rows of the models, no time among them"
    return ["sh", "-c", f'echo "$(($(wc -l < "$0") - 1)) {kind} in $0"', str(plan.csv_path)]


def _needs_toolkit(plan: Plan) -> str | None:
    return plan.toolkit


def _needs_sanitizer(plan: Plan) -> str | None:
    if plan.sanitizer is None:
        return "no compute-sanitizer: `pip install nvidia-cuda-sanitizer-api`, or a CUDA toolkit"
    return None if plan.driver.exists() else "the driver is not built"


STEPS = (
    Step("device", lambda plan: [["echo", plan.device]], 1),
    Step("build", _build, 180, host=True, tool=_needs_toolkit),
    Step("determinism", _repeat("runs", str(RUNS)), 15, host=True),
    Step("graph", _repeat("graph"), 15),
    *(Step(tool, _sanitize(tool), 20, host=True, tool=_needs_sanitizer) for tool in SANITIZERS),
    Step("tests", _tests, 120),
    Step("bench", _bench, 120, host=True),
)
