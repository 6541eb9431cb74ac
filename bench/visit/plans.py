"""The plans: which parts there are, in the order of what they are worth.

The reserves of a plan add up to less than its usual minutes; what is left over goes to the parts in
order. The limits are for a machine with 16 cores and one GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..loading import ROOT
from .parts import Part, Site, module_part, needs_sanitizer, needs_toolkit, python
from .runner import FIRST

RUNS = 100  # that must be equal to the bit
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
_WORKERS = 8
_TEST_SECONDS = 60  # a test that takes longer hangs
_MOST_FAILURES = 200  # more say nothing new


def _make(site: Site, *targets: str) -> list[str]:
    suffix = "" if site.gpu else "-host"
    jobs = f"-j{max(2, os.cpu_count() or 1)}"
    names = [f"{target}{suffix}" for target in targets]
    return ["make", "--no-print-directory", jobs, *names, f"PYTHON={sys.executable}"]


def _build_both(site: Site) -> list[list[str]]:
    """The extension and the driver at the same time: both compile the same few long files."""
    said = ["echo", f"the extension and {site.driver.relative_to(ROOT)}"]
    return [_make(site, "extension", "standalone"), said]


def _build(site: Site) -> list[list[str]]:
    kinds = ["cuda"] if site.gpu else (["cuda"] if site.compile else []) + ["emulated"]
    return [python("-m", "bench.visit.build", kind) for kind in kinds]


def _driver(site: Site) -> list[list[str]]:
    return [_make(site, "standalone"), ["echo", f"{site.driver.relative_to(ROOT)}"]]


def _pytest() -> list[str]:
    workers = min(_WORKERS, os.cpu_count() or 1)
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers))


def _check_tests(site: Site) -> list[list[str]]:
    return [[*_pytest(), "--dist", "loadfile"]]


def _tests(site: Site) -> list[list[str]]:
    command = [*_pytest(), f"--maxfail={_MOST_FAILURES}", "-p", "bench.visit.test_log"]
    command.append(f"--test-log={site.scratch / 'tests.csv'}")
    if importlib.util.find_spec("pytest_timeout") is not None:
        # By a thread: a test that waits for a GPU hears no signal.
        command += [f"--timeout={_TEST_SECONDS}", "--timeout-method=thread"]
    return [command]


def _needs_xdist(site: Site) -> str | None:
    return None if importlib.util.find_spec("xdist") is not None else "no pytest-xdist"


def _repeat(*arguments: str) -> Callable[[Site], list[list[str]]]:
    return lambda site: [python("-m", "bench.repeat", *arguments)]


def _sanitize(tool: str) -> Callable[[Site], list[list[str]]]:
    def commands(site: Site) -> list[list[str]]:
        command = python("-m", "bench.sanitize", str(site.driver))
        if not site.gpu:
            return [command]
        return [[*command, "--tool", tool, "--sanitizer", str(site.sanitizer)]]

    return commands


def _bench(site: Site) -> list[list[str]]:
    command = python("-m", "bench", "--set", "short", "--out", str(site.out))
    if site.gpu:
        tolerance = f"--peer-tolerance={site.peer_tolerance:g}"
        return [[*command, "--seconds", "0.25", tolerance], _said(site)]
    return [[*command, "--device", "h100", "--count", "4096", "--op", "forward"], _said(site)]


def _said(site: Site) -> list[str]:
    kind = "rows" if site.gpu else "rows of the models, no time among them"
    return ["sh", "-c", f'echo "$(($(wc -l < "$0") - 1)) {kind} in $0"', str(site.csv_path)]


def _sanitizers(**values: object) -> list[Part]:
    return [
        Part(tool, _sanitize(tool), 20, host=True, tool=needs_sanitizer, **values)
        for tool in SANITIZERS
    ]


CHECK = (  # python -m bench gpu-check
    Part(FIRST, lambda site: [["echo", site.device]], 1),
    Part("build", _build_both, 180, host=True, tool=needs_toolkit),
    Part("determinism", _repeat("runs", str(RUNS)), 15, host=True),
    Part("graph", _repeat("graph"), 15),
    *_sanitizers(),
    Part("tests", _check_tests, 120),
    Part("bench", _bench, 120, host=True),
)


def device(found: Path, options: list[str]) -> Part:
    """The first part of every visit: it writes down to `found` what decides how the others run."""
    command = python("-m", "bench.visit.device", "--out", str(found), *options)
    return Part(FIRST, lambda site: [command], 5, host=True, limit=60)


_BUILD = Part("build", _build, 100, host=True, limit=200)
_SAVE_BUILD = module_part("bench.visit.save_build", 10, name="save-build", limit=30)
_SMOKE = module_part("bench.smoke", 40, limit=120, budget=True)
_DETERMINISM = Part("determinism", _repeat("runs", str(RUNS)), 10, True, limit=60, needs=("build",))

_COMPILE = module_part(
    "bench.visit.timings --compile", 30, name="compile", limit=90, budget=True, needs=("bench",)
)

# For the tests of the host model, which would wait for it, eight at once.
_HOST_BUILD = Part(
    "host-build",
    lambda site: [python("-m", "bench.visit.build", "emulated")],
    20,
    host=True,
    limit=100,
)

VISITS: dict[str, tuple[Part, ...]] = {
    "first": (
        _BUILD,
        _SAVE_BUILD,
        _SMOKE,
        Part("graph", _repeat("graph"), 10, limit=60, needs=("build",)),
        _DETERMINISM,
        module_part("bench.visit.timings", 100, name="bench", limit=150, budget=True),
        module_part("bench.training_step", 75, name="step", limit=180, budget=True),
        module_part("bench.fusions", 20, limit=60, budget=True),
        _COMPILE,
        _HOST_BUILD,
        Part("tests", _tests, 20, tool=_needs_xdist, needs=("build",)),
    ),
    "tune": (
        _BUILD,
        _SAVE_BUILD,
        _SMOKE,
        module_part("bench tune", 180, name="tune", budget=True, limit=300),
        module_part("bench exchange", 20, name="exchange", limit=60),
        module_part("bench.counters", 60, limit=180),
    ),
    "full": (
        _BUILD,
        Part("driver", _driver, 60, True, needs_toolkit, limit=200),
        _HOST_BUILD,
        Part("tests", _tests, 150, tool=_needs_xdist, limit=400, needs=("build",)),
        *_sanitizers(limit=90, needs=("driver",)),
        _DETERMINISM,
    ),
}


def select(plan: str, names: list[str] | None) -> tuple[Part, ...]:
    """The parts of a plan, or those named, in that order; ValueError for a name that is none."""
    parts = VISITS[plan]
    if names is None:
        return parts
    known = {part.name: part for part in (*(p for ps in VISITS.values() for p in ps), *parts)}
    for name in names:
        if name not in known:
            raise ValueError(f"expected --parts to be of {', '.join(known)}, got {name!r}")
    return tuple(known[name] for name in names)
