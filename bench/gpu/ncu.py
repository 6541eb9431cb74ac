"""Nsight Compute's command line: where it is, how it is asked for DRAM bytes, what it answers."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..toolkit import ToolkitError, resolve

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
DURATION = "gpu__time_duration.sum"
_SCALES = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
_SCALES |= {"nsecond": 1, "ns": 1, "usecond": 1e3, "us": 1e3, "msecond": 1e6, "ms": 1e6}
_SCALES |= {"second": 1e9, "s": 1e9}


@dataclass(frozen=True)
class Launch:
    """One kernel as it ran."""

    name: str
    read_bytes: float
    written_bytes: float
    ns: float


def find_ncu() -> Path | None:
    """On PATH, of the toolkit, or where NVIDIA's packages put it."""
    found = shutil.which("ncu")
    candidates = [Path(found)] if found else []
    with contextlib.suppress(ToolkitError):
        candidates.append(resolve().home / "bin" / "ncu")
    candidates += sorted(Path("/usr/local").glob("cuda*/bin/ncu"), reverse=True)
    candidates += sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def command(ncu: Path, log: Path, kernels: Sequence[str], program: Sequence[str]) -> list[str]:
    """Profiles the named kernels of a program, its answers to `log`.

    Clocks are left alone, as a visitor of the machine should. So are the caches: ncu would empty
    them before every launch, and a second pass finds in them what a first one left.
    """
    names = "|".join(kernels)
    metrics = ",".join((READ, WRITTEN, DURATION))
    options = ["--clock-control", "none", "--cache-control", "none", "--metrics", metrics]
    options += ["--kernel-name", f"regex:^({names})$", "--csv", "--print-units", "base"]
    return [str(ncu), *options, "--log-file", str(log), *program]


def parse(text: str) -> list[Launch]:
    """The launches in order. ValueError where a metric is missing, has no number or no known unit.

    Before the table come the tool's own lines, which begin with "==".
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    table = [line for line in lines[start:] if line.startswith('"')]
    for row in csv.DictReader(table):
        launch, metric = row["ID"], row["Metric Name"]
        names[launch] = row["Kernel Name"]
        found.setdefault(launch, {})[metric] = _value(row["Metric Value"], row["Metric Unit"])
    launches = []
    for launch in sorted(found, key=int):
        missing = {READ, WRITTEN, DURATION} - found[launch].keys()
        if missing:
            raise ValueError(f"ncu: launch {launch} of {names[launch]} lacks {sorted(missing)}")
        values = (found[launch][metric] for metric in (READ, WRITTEN, DURATION))
        launches.append(Launch(names[launch], *values))
    return launches


def _value(number: str, unit: str) -> float:
    if unit not in _SCALES or not re.fullmatch(r"[\d,.]+(e[+-]?\d+)?", number):
        raise ValueError(f"ncu: expected a number of bytes or seconds, got {number!r} {unit!r}")
    return float(number.replace(",", "")) * _SCALES[unit]


def said(text: str) -> str:
    """The tool's last complaint, or its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line]
    return (errors or lines or ["nothing"])[-1][:200]
