"""What compiling costs: the notes that compilers leave, the schedule and the tables."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from batchnorm_cuda._build import sources
from bench import build_time
from bench.build_time import Build, Compiled, makespan, markdown
from bench.loading import ROOT

FILES = [
    Compiled("forward.cpp", 4.0, 5.0, 300.0),
    Compiled("bindings.cpp", 8.0, 10.0, 600.0),
    Compiled("common.cu", 4.0, 5.0, 400.0),
    Compiled("stages_half.cu", 20.0, 25.0, 400.0),
    Compiled("team_forward_half.cu", 24.0, 30.0, 400.0),
]
STEPS = {"import": 3.0, "_C": 18.0, "common": 6.0, "half": 56.0}
BUILD = Build("a machine", "9.0", 1, FILES, STEPS, {"_C": 700_000, "common": 1, "half": 3_000_000})


@pytest.mark.parametrize(
    ("seconds", "workers", "last"),
    [([3, 1, 1, 1], 2, 3), ([1, 1, 1, 3], 2, 4), ([5], 8, 5), ([1, 2, 3], 1, 6)],
)
def test_makespan(seconds: list[float], workers: int, last: float) -> None:
    assert makespan(seconds, workers) == last


def test_a_schedule_keeps_what_is_beside_the_compilers() -> None:
    assert BUILD.seconds("_C", 8) == 18 - 15 + 8
    assert BUILD.seconds("half", 1) == 56 - 55 + 44
    assert BUILD.seconds("half", 2) == 56 - 55 + 24


def test_tables() -> None:
    text = markdown(BUILD, "half", 8)
    assert "| `team_forward_half.cu` | `kernels_half` | 24.0 | 400 |" in text
    assert "| `_C` | 2 | 12.0 | 8.0 | 0.70 |" in text
    assert "| all | 5 | 60.0 | 24.0 | 3.70 |" in text
    assert "3 s until torch is imported, 11 s `_C`, 5 s `kernels_common`, 25 s" in text
    assert text.endswith(": 44 s, 60 CPU seconds of compilers.")


def test_compilers_leave_notes(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_text("#!/bin/sh\ni=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exit 3\n")
    real.chmod(0o755)
    program = build_time._note(tmp_path / "bin" / "c++", real, tmp_path / "log")
    for words in (["-c", "some/plan.cpp", "-o", "plan.o"], ["--version"]):
        assert subprocess.run([program, *words]).returncode == 3
    (line,) = (tmp_path / "log").read_text().splitlines()
    note = Compiled(**json.loads(line))
    assert note.file == "plan.cpp" and note.part == "_C"
    assert 0 < note.cpu <= note.wall + 0.1 and note.mb > 0


def test_page_has_the_files() -> None:
    """docs/build-time.md was printed of the files as they are."""
    page = (ROOT / "docs" / "build-time.md").read_text()
    named = re.findall(r"^\| `(\w+\.\w+)` \|", page, flags=re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in sources.cuda_sources())
