"""Everything that a GPU can tell, in one short visit.

    python -m bench visit --plan first|tune|full --minutes M --out FOLDER
        [--parts NAME,...] [--build FILE] [--commit TEXT] [--rehearse] [--compile]

Each part is a process of its own with a time limit. FOLDER is new or empty and gets at most 8
files: visit.json (the verdicts, what is here), visit.log, the parts' CSV files, build.tar.gz, and
extras.tar.gz for all else. --parts restricts or reorders. --build takes the build.tar.gz of an
earlier visit, repeated for its pieces, so that nothing is compiled again. --rehearse: as if there
were no GPU, on the host build; --compile: besides, compile the extension for TORCH_CUDA_ARCH_LIST
(9.0).

Exit status 0 if all passed, 1 if something failed, 2 if nothing failed but something is missing
(with --rehearse 0), 128 and the signal's number if a signal ended it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from batchnorm_cuda._build import trust

from ..environment import commit
from ..loading import ROOT
from ..options import positive
from . import folder, plans, save_build, table
from .log import Log
from .parts import NO_GPU, PASS, Outcome, Part, Site
from .runner import Stopped, Verdict, exit_status, run_all

SCRATCH = ROOT / "build" / "visit"
_END_SECONDS = 5.0  # for the table and the last file
_SHOWN = 160  # of a verdict's text, on stdout
_HOST_ARCHITECTURE = "9.0"  # compiled for where there is no GPU


@dataclass
class Visit:
    """What is written down after every part."""

    out: Path
    scratch: Path
    record: dict[str, Any]
    log: Log
    verdicts: list[Verdict] = field(default_factory=list)

    def write(self) -> None:
        folder.write_record(self.out, self.record, self.verdicts)

    def add(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self.log.write(f"-- {verdict}\n".encode())
        print(str(verdict)[:_SHOWN].splitlines()[0], flush=True)
        folder.tidy(self.out, self.scratch)
        self.write()

    def finish(self, complete: bool) -> None:
        folder.tidy(self.out, self.scratch, folder.MOST_FILES - 1)  # and the last one
        text = table.text(self.record, self.verdicts, self.out, self.scratch)
        (self.scratch / "table.txt").write_text(text)
        note = folder.pack_extras(self.out, self.scratch)
        self.record |= {"complete": complete} | ({"note": note} if note else {})
        self.write()
        print(text, flush=True)


def cache_folder(build: Path) -> Path:
    """Where the extension is built: below the repository, where nobody else can write there.

    Who owns a copy of it on a lent machine, and with which modes, is not ours to say.
    """
    try:
        trust.make_private(build / "visit-cache")
    except (trust.UntrustedError, OSError):
        return Path(tempfile.gettempdir()) / f"batchnorm_cuda_visit_{os.geteuid()}"
    return build / "visit-cache"


def variables() -> dict[str, str]:
    """Of the environment of every part: nothing needs a home that can be written."""
    build = ROOT / "build"
    wanted = {
        "BATCHNORM_CUDA_CACHE_DIR": cache_folder(build),
        "TORCHINDUCTOR_CACHE_DIR": build / "inductor",
        "TRITON_CACHE_DIR": build / "triton",
    }
    return {name: os.environ.get(name, str(path)) for name, path in wanted.items()}


def run(options: argparse.Namespace, parts: Sequence[Part]) -> int:
    end = time.monotonic() + 60 * options.minutes - _END_SECONDS
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    record = {
        "plan": options.plan,
        "minutes": options.minutes,
        "command": "python -m bench visit " + " ".join(sys.argv[2:]),
        "commit": options.commit or commit(),
        "complete": False,
        "environment": {},
    }
    visit = Visit(options.out, SCRATCH, record, Log(options.out / folder.LOG))
    visit.write()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        site = _look_around(visit, options)
        seconds = end - time.monotonic()
        run_all(parts, site, seconds, visit.add, visit.log, before=list(visit.verdicts))
    except Stopped as stop:
        visit.finish(complete=False)
        return 128 + signal.Signals[str(stop)]
    visit.finish(complete=True)
    return exit_status(visit.verdicts, options.rehearse)


def _stop(number: int, frame: object) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):  # once is enough
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def _look_around(visit: Visit, options: argparse.Namespace) -> Site:
    """The site as the first part finds it."""
    found_path = visit.scratch / "device.json"
    unknown = Site(False, "not yet known", visit.out, scratch=visit.scratch, variables=variables())
    rehearse = ["--rehearse"] if options.rehearse else []
    device = plans.device(found_path, rehearse)
    verdict = run_all([device], unknown, device.limit, lambda verdict: None, visit.log)[0]
    found = json.loads(found_path.read_text()) if found_path.exists() else {"gpu": False}
    site = replace(unknown, compile=options.compile)
    if "device" in found:
        sanitizer = found["sanitizer"] and Path(found["sanitizer"])
        site = replace(
            site,
            gpu=found["gpu"],
            device=found["device"],
            toolkit=found["toolkit"],
            sanitizer=sanitizer,
        )
        visit.record["environment"] = found["environment"]
        outcome = Outcome(PASS if site.gpu else NO_GPU, site.device)
        verdict = replace(verdict, outcome=outcome)
    if not site.gpu and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        site.variables["TORCH_CUDA_ARCH_LIST"] = _HOST_ARCHITECTURE
    visit.add(verdict)
    return site


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench visit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--plan", choices=plans.VISITS, required=True)
    parser.add_argument("--minutes", type=positive, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=lambda text: text.split(","))
    parser.add_argument("--build", type=Path, action="append")
    parser.add_argument("--commit")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    options.out = options.out.resolve()
    try:
        parts = plans.select(options.plan, options.parts)
        options.out.mkdir(parents=True, exist_ok=True)
        if any(options.out.iterdir()):
            raise ValueError(f"expected --out to be a new or an empty folder, got {options.out}")
        if options.build is not None:
            save_build.unpack(options.build, Path(variables()["BATCHNORM_CUDA_CACHE_DIR"]))
    except (OSError, ValueError) as error:
        print(f"python -m bench visit: {error}", file=sys.stderr)
        return 2
    return run(options, parts)
