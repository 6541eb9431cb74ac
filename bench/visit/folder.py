"""What comes back: a few files, none of them too large, valid whenever the visit is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .runner import Verdict

MOST_FILES = 8
MOST_BYTES = 16 << 20

RECORD, LOG, EXTRAS = "visit.json", "visit.log", "extras.tar.gz"
# Those of the parts; a plan writes a few of them. All else goes into EXTRAS.
RESULTS = (
    *("build.tar.gz", "smoke.csv", "bench.csv", "fusions.csv", "step.csv"),
    *("tune.csv", "exchange.csv", "counters.csv"),
)
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def write_record(folder: Path, record: dict[str, Any], verdicts: Iterable[Verdict]) -> None:
    """Whole or not at all: a reader, or a kill, never meets half of it."""
    parts = [
        {
            "name": verdict.name,
            "status": verdict.outcome.status,
            "seconds": round(verdict.seconds, 1),
            "text": verdict.outcome.text,
        }
        for verdict in verdicts
    ]
    fresh = folder / f"{RECORD}.tmp"
    fresh.write_text(json.dumps({**record, "parts": parts}, indent=1) + "\n")
    os.replace(fresh, folder / RECORD)


def tidy(folder: Path, scratch: Path) -> None:
    """Moves what is none of the files that come back, or is too large, to what is packed last."""
    for path in sorted(folder.iterdir()):
        allowed = path.name in (RECORD, LOG, EXTRAS, *RESULTS)
        if not allowed or path.is_symlink() or path.stat().st_size >= MOST_BYTES:
            shutil.move(path, scratch / path.name)


def pack_extras(folder: Path, scratch: Path) -> str:
    """All of scratch that fits, smallest first; says what does not. "" where there is nothing."""
    found = [path for path in scratch.rglob("*") if path.is_file() and not path.is_symlink()]
    files = sorted(found, key=lambda path: path.stat().st_size)
    target = folder / EXTRAS
    while files:
        with tarfile.open(target, "w:gz") as archive:
            for file in files:
                archive.add(file, file.relative_to(scratch))
        if target.stat().st_size < MOST_BYTES:
            break
        files.pop()
        target.unlink()
    left_out = [path.name for path in found if path not in files]
    return f"left out for their size: {', '.join(sorted(left_out))}" if left_out else ""


def problems(folder: Path) -> list[str]:
    """In what the folder breaks the limits."""
    files: Sequence[Path] = sorted(folder.rglob("*"))
    found = [f"{len(files)} files, at most {MOST_FILES} come back"] * (len(files) > MOST_FILES)
    for path in files:
        if not _NAME.fullmatch(path.name):
            found.append(f"{path.name!r} is no name for a file that comes back")
        if path.is_symlink() or not path.is_file():
            found.append(f"{path.name} is no plain file")
        elif path.stat().st_size >= MOST_BYTES:
            found.append(f"{path.name} has {path.stat().st_size} bytes, {MOST_BYTES} are too many")
    return found
