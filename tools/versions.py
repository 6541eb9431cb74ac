"""Installs versions of torch one after another, runs the tests that depend on it, and says so.

    python -m tools.versions                        # all of TRIED; 5 GB of disk, 15 minutes each
    python -m tools.versions 2.9.1=3.12 newest=3.13
    python -m tools.versions --table                # only write docs/faq.md's table anew

Each version gets an environment of its own in build/versions, which is removed afterwards. Its
record goes into docs/versions.json as soon as it is done. The extension is compiled for 9.0 where a
toolkit of torch's CUDA is found. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "versions"
RECORDS = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "faq.md"
BEGIN = "<!-- versions: written by `python -m tools.versions` -->\n"
END = "<!-- end of versions -->\n"

# Every Python that is supported is here once, the oldest with the oldest torch.
TRIED = (
    "2.6.0=3.10",
    "2.9.1=3.12",
    "2.11.0=3.11",
    "2.13.0=3.13",
    "2.14.1=3.11",
    "newest=3.13",
)
NEWEST = "newest"
PACKAGES = ("pytest", "expecttest", "hypothesis", "numpy", "setuptools>=77", "wheel", "ninja")
PACKAGES += ("nvidia-cuda-cuobjdump",)  # which reads the wheel's kernels
# What calls torch where torch changes: its operators, graphs, transforms, modules and builder.
TESTS = (
    "batched_gradients",
    "build",
    "convert",
    "extension",
    "fold",
    "fold_opaque",
    "fold_stays",
    "forward_ad",
    "func",
    "fused_graphs",
    "fusion",
    "fusion_activations",
    "fusion_graphs",
    "fusion_model",
    "fusion_training",
    "graphs",
    "modules",
    "ops",
    "stubs",
    "subclasses",
    "sync",
    "torch_inputs",
    "torch_tools",
)
TEST_SECONDS = 1200  # on a machine that others use too
ARCHITECTURE = "9.0"


class Failed(RuntimeError):
    """A step did not succeed; the message is its record."""


def interpreter(version: str) -> str | None:
    """A Python of this version: on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    built = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    for program in (f"python{version}", *map(str, built)):
        found = shutil.which(program)
        # A shim of pyenv is on PATH also for what it does not run.
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


def run(log: Path, *command: str | Path, seconds: float = 3600, **variables: str) -> int:
    with log.open("a") as stream:
        stream.write(f"$ {' '.join(map(str, command))}\n")
        stream.flush()
        try:
            return subprocess.run(
                [*map(str, command)],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            stream.write(f"\nended after {seconds:.0f} s\n")
            return 124


def install(torch: str, program: str, folder: Path, log: Path) -> Path:
    """The new environment's interpreter."""
    wanted = "torch" if torch == NEWEST else f"torch=={torch}"
    python = folder / "bin" / "python"
    # No constraints: those of the machine's configuration must not hold back what is asked for.
    pip = [python, "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check"]
    steps = ([program, "-m", "venv", "--clear", folder], [*pip, "--upgrade", wanted, *PACKAGES])
    for step in steps:
        if run(log, *step, PIP_CONSTRAINT=os.devnull) != 0:
            words = re.findall(r"^ERROR: (.*)$", log.read_text(), re.MULTILINE)
            raise Failed(words[-1] if words else f"does not install; see {log}")
    return python


def facts(python: Path) -> dict[str, str]:
    script = (
        "import json, platform, torch\n"
        "print(json.dumps({'torch': torch.__version__.split('+')[0],"
        " 'python': platform.python_version(), 'cuda': torch.version.cuda}))"
    )
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"import torch: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def test_files() -> list[Path]:
    """The files of TESTS, in whatever folder of tests/ each is."""
    found = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    return [found[f"test_{name}"] for name in TESTS]


def run_tests(python: Path, folder: Path, log: Path) -> dict[str, Any]:
    """Builds the emulated extension, so that no test is charged for it, and runs TESTS."""
    load = "from batchnorm_cuda._build import extension; extension.load_emulated()"
    if run(log, python, "-c", load) != 0:
        return {"failure": f"the emulated kernels do not build; see {log.relative_to(ROOT)}"}
    report = folder / "tests.xml"
    files = test_files()
    began = time.monotonic()
    options = ("-q", "--durations=10", f"--junitxml={report}", "-p", "no:cacheprovider")
    status = run(log, python, "-m", "pytest", *options, *files, seconds=TEST_SECONDS)
    if status not in (0, 1):
        return {"failure": f"pytest ended with {status}; see {log.relative_to(ROOT)}"}
    return {"seconds": round(time.monotonic() - began), **read_report(report)}


def read_report(path: Path) -> dict[str, Any]:
    """Counts, names of what failed, and the reasons of what is known to."""
    counts, failed, reasons = Counter(passed=0, failed=0, skipped=0, known=0), [], Counter()
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failed.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}")
        elif skipped is None:
            counts["passed"] += 1
        elif skipped.get("type") == "pytest.xfail":
            counts["known"] += 1
            reasons[skipped.get("message", "")] += 1
        else:
            counts["skipped"] += 1
    return {**counts, "failures": sorted(failed), "reasons": dict(sorted(reasons.items()))}


def compile_extension(python: Path, cuda: str | None, folder: Path, log: Path) -> str:
    """What came of an ahead-of-time wheel for one architecture, installed and imported."""
    if cuda is None:
        return "no CUDA in this torch"
    asked = [str(python), str(ROOT / "batchnorm_cuda" / "_build" / "toolkit.py"), cuda]
    toolkit = subprocess.run(asked, capture_output=True, text=True)
    if toolkit.returncode != 0:
        return f"no toolkit of CUDA {cuda.split('.')[0]}"
    version = toolkit.stdout.split()[1]
    # Does it compile, link and load? What the kernels' code is like is seen elsewhere.
    quick = "--Ofast-compile=max" if int(version.split(".")[0]) >= 13 else ""
    wheel = (python, "-m", "tools.wheel", "--out", folder / "dist", "--work", folder / "wheel")
    status = run(log, *wheel, TORCH_CUDA_ARCH_LIST=ARCHITECTURE, NVCC_APPEND_FLAGS=quick)
    return f"CUDA {version}" if status == 0 else f"fails with CUDA {version}"


def try_version(asked: str, parts: list[str]) -> dict[str, Any]:
    torch, _, python_version = asked.partition("=")
    record: dict[str, Any] = {"torch": torch, "python": python_version, "date": str(date.today())}
    folder = PLACE / f"torch-{torch}-python-{python_version}"
    log = PLACE / f"{folder.name}.log"
    PLACE.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    program = interpreter(python_version)
    if program is None:
        return record | {"failure": f"no Python {python_version} here"}
    try:
        python = install(torch, program, folder, log)
        record |= facts(python)
        if "tests" in parts:
            record["tests"] = run_tests(python, folder, log)
        if "extension" in parts:
            record["extension"] = compile_extension(python, record["cuda"], folder, log)
    except Failed as error:
        record["failure"] = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return record


def read_records() -> list[dict[str, Any]]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else []


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    return ([int(part) for part in re.findall(r"\d+", record["torch"])], record["python"])


def store(record: dict[str, Any]) -> None:
    """In place of what was known of the same versions; parts that were left out stay."""
    others = read_records()
    old = [each for each in others if key(each) == key(record)]
    merged = {**(old[0] if old and "failure" not in record else {}), **record}
    kept = [each for each in others if key(each) != key(record)]
    RECORDS.write_text(json.dumps(sorted([*kept, merged], key=key), indent=1) + "\n")


def result(record: dict[str, Any]) -> str:
    tests = record.get("tests", {})
    failure = record.get("failure") or tests.get("failure")
    if failure:
        return failure
    if not tests:
        return "not tried"
    said = [f"{tests['passed']} pass"]
    names = sorted({each.split("::")[-1].split("[")[0] for each in tests["failures"]})
    said += [f"{tests['failed']} fail ({', '.join(names)})"] if names else []
    said += [f"{count} cannot: {reason}" for reason, count in tests["reasons"].items()]
    return "; ".join(said)


def not_tried(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for what TRIED names and nobody has run."""
    known = {record["torch"] for record in records}
    pairs = [asked.split("=") for asked in TRIED]
    return [
        {"torch": torch, "python": python}
        for torch, python in pairs
        if torch not in {*known, NEWEST}
    ]


def table(records: list[dict[str, Any]]) -> str:
    lines = ["| PyTorch | its CUDA | Python | tests of what depends on it | compiled for 9.0 |"]
    lines.append("|---|---|---|---|---|")
    for record in sorted([*records, *not_tried(records)], key=key, reverse=True):
        cells = (record["torch"], record.get("cuda") or "-", record["python"], result(record))
        lines.append(f"| {' | '.join(cells)} | {record.get('extension', 'not tried')} |")
    return "\n".join(lines) + "\n"


def page_with_table(page: str, records: list[dict[str, Any]]) -> str:
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE}: expected the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + BEGIN + table(records) + END + after


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.versions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("versions", nargs="*", metavar="TORCH=PYTHON", default=TRIED)
    parser.add_argument("--part", action="append", choices=("tests", "extension"), default=None)
    parser.add_argument("--table", action="store_true", help="write docs/faq.md's table and end")
    options = parser.parse_args()
    wrong = False
    for asked in () if options.table else options.versions:
        record = try_version(asked, options.part or ["tests", "extension"])
        store(record)
        print(f"{asked}: {result(record)}; {record.get('extension', 'not tried')}", flush=True)
        wrong |= "failure" in record or bool(record.get("tests", {}).get("failed", 0))
    PAGE.write_text(page_with_table(PAGE.read_text(), read_records()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
