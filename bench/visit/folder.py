"""What comes back: a few files, none of them too large, valid whenever the visit is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .runner import Verdict

MOST_FILES = 8
MOST_BYTES = 16 << 20

RECORD, LOG, EXTRAS = "visit.json", "visit.log", "extras.tar.gz"
# What stays where there are more files than may come back: the first of these. The rest is packed.
_WORTH = (RECORD, LOG, EXTRAS, "build.tar.gz", "*.csv", "*.json")
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


def tidy(folder: Path, scratch: Path, most: int = MOST_FILES) -> None:
    """Moves what is too much, too large or of another kind to what is packed last."""
    ordered = [path for pattern in _WORTH for path in sorted(folder.glob(pattern))]
    kept = [path for path in dict.fromkeys(ordered) if _may_come_back(path)][:most]
    for path in sorted(folder.iterdir()):
        if path not in kept:
            shutil.move(path, scratch / path.name)


def _may_come_back(path: Path) -> bool:
    plain = path.is_file() and not path.is_symlink()
    return plain and bool(_NAME.fullmatch(path.name)) and path.stat().st_size < MOST_BYTES


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
    files = sorted(folder.rglob("*"))
    found = [f"{len(files)} files, at most {MOST_FILES} come back"] * (len(files) > MOST_FILES)
    return found + [
        f"{path.name!r} does not come back" for path in files if not _may_come_back(path)
    ]
