"""What a part of a visit is, and what there is here to run it on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import environment
from ..loading import ROOT
from ..toolkit import ToolkitError, resolve

PASS = "PASS"
FAIL = "FAIL"
HOST = "HOST"  # passed on the host build: rehearsed, nothing said about a GPU
NO_GPU = "NO GPU"
MISSING = "MISSING"  # a tool
SKIPPED = "SKIPPED"  # a part that it needs has failed
NO_TIME = "NO TIME"  # nothing was left to begin it with

NOTHING_TO_RUN_ON = 2  # the exit status of a part's own module that says so


@dataclass(frozen=True)
class Outcome:
    status: str
    text: str


@dataclass(frozen=True)
class Site:
    """What is here, and where results go."""

    gpu: bool
    device: str
    out: Path
    sanitizer: Path | None = None
    toolkit: str | None = None  # why there is none
    peer_tolerance: float = 1.0  # of the benchmark
    scratch: Path = ROOT / "build" / "visit"  # for files that need not come back one by one
    compile: bool = False  # for a GPU that is not here, besides the host build
    variables: dict[str, str] = field(default_factory=dict)  # of the environment of every part
    seconds: float = 60.0  # that the part which is asked may take

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
class Part:
    name: str
    commands: Callable[[Site], list[list[str]]]
    reserve: float  # seconds that parts before this one leave to it
    host: bool = False  # whether the commands also run without a GPU, on the host build
    tool: Callable[[Site], str | None] = lambda site: None  # what it lacks
    limit: float = float("inf")  # seconds that it may take of what is left
    needs: tuple[str, ...] = ()  # parts without which it has no chance
    module: str = ""  # of ours, with a first argument if that is a command of its own

    def absent(self) -> Outcome | None:
        """It cannot run anywhere for want of its own code."""
        if not self.module or _has_module(self.module.split()):
            return None
        return Outcome(MISSING, f"there is no `python -m {self.module}` in this tree")

    def missing(self, site: Site) -> Outcome | None:
        """Why it cannot run on a GPU here."""
        if not site.gpu:
            return Outcome(NO_GPU, f"needs a GPU: {site.device}")
        lacking = self.tool(site)
        return Outcome(MISSING, lacking) if lacking is not None else None


def module_part(
    module: str, reserve: float, *, name: str = "", budget: bool = False, **values: object
) -> Part:
    """A part that is a module of its own: `--out FOLDER [--seconds S]`, exit status 0, 1 or 2."""
    words = module.split()

    def commands(site: Site) -> list[list[str]]:
        command = python("-m", *words, "--out", str(site.out))
        # It ends by itself before it would be ended.
        return [command + ([f"--seconds={max(1, 0.9 * site.seconds - 5):.0f}"] if budget else [])]

    part = {"host": True, "needs": ("build",), "module": module, **values}
    return Part(name or words[-1].rpartition(".")[2], commands, reserve, **part)


def _has_module(words: list[str]) -> bool:
    """Whether there is a file for it: the module, or the subcommand of `python -m bench`."""
    if words[0] == "bench":
        from ..__main__ import COMMANDS

        return words[1] in COMMANDS
    return importlib.util.find_spec(words[0]) is not None


def find_site(rehearse: bool, out: Path | None) -> Site:
    gpu = torch.cuda.is_available() and not rehearse
    device = torch.cuda.get_device_name() if gpu else _why_no_gpu(rehearse)
    default = ROOT / "bench" / "results" if gpu else ROOT / "build" / "gpu-check"
    try:
        home: Path | None = resolve().home
        problem = None
    except ToolkitError as error:
        home, problem = None, str(error).splitlines()[0]
    return Site(gpu, device, (out or default).resolve(), find_sanitizer(home), problem)


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


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def needs_toolkit(site: Site) -> str | None:
    return site.toolkit


def needs_sanitizer(site: Site) -> str | None:
    if site.sanitizer is None:
        return "no compute-sanitizer: `pip install nvidia-cuda-sanitizer-api`, or a CUDA toolkit"
    return None if site.driver.exists() else "the driver is not built"
