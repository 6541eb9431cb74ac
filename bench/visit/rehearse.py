"""A visit as it will be where the GPU is, but without one: in a plain copy, cut off, no network.

    python -m bench.visit.rehearse [--plan NAME ...] [--minutes 40] [--compile] [--parts NAME,...]

Copies the tracked files, without .git, to build/rehearsal, and runs `python -m bench visit` there
with this interpreter, cut off from the network and from the user's home. Then it looks at what came
back: exit status, table, files. --compile: the extension is compiled for 9.0 besides. Builds are
kept between rehearsals; BATCHNORM_CUDA_CACHE_DIR, where it is set, is theirs, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ..environment import commit
from ..loading import ROOT
from . import folder, plans, table

_PLACE = ROOT / "build" / "rehearsal"
_BUILDS = "build"  # of the copy
_KEPT = ("PATH", "LANG", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS")
_KEPT += ("TORCH_CUDA_ARCH_LIST", "BATCHNORM_CUDA_CACHE_DIR")
_STARTING_SECONDS = 60  # that a machine under load may take beyond the minutes


def copy_tree(target: Path) -> int:
    """The tracked files as they are here; how many."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for old in target.iterdir():
        if old.name != _BUILDS:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return len(names)


def without_network() -> list[str]:
    """The words before a command that cut it off; none where that is not allowed."""
    for words in (["unshare", "-n"], ["unshare", "-r", "-n"]):
        if shutil.which(words[0]) and subprocess.run([*words, "true"]).returncode == 0:
            return words
    return []


def bare_environment() -> dict[str, str]:
    home = _PLACE / "home"  # with no cache in it
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    return {name: os.environ[name] for name in _KEPT if name in os.environ} | {"HOME": str(home)}


def look_at(out: Path, said: str, status: int) -> list[str]:
    """What is wrong with a visit."""
    found = folder.problems(out)
    if status != 0:
        found.append(f"exit status {status}")
    try:
        record = json.loads((out / folder.RECORD).read_text())
    except (OSError, ValueError) as error:
        return [*found, f"{folder.RECORD}: {error}"]
    if not record["complete"]:
        found.append(f"{folder.RECORD} is not complete")
    shown = said[said.rfind("== visit ") :] if "== visit " in said else ""
    lines = shown.splitlines()
    if not lines or len(lines) > table.MOST_LINES or len(shown) > table.MOST_CHARACTERS + 1:
        found.append(f"a table of {len(lines)} lines and {len(shown)} characters")
    missing = [part["name"] for part in record["parts"] if part["name"] not in shown]
    return found + ([f"not in the table: {', '.join(missing)}"] if missing else [])


def rehearse(plan: str, options: argparse.Namespace, prefix: list[str], tree: Path) -> list[str]:
    out = _PLACE / "out" / plan
    shutil.rmtree(out, ignore_errors=True)
    visit = [sys.executable, "-m", "bench", "visit", "--rehearse", f"--plan={plan}"]
    visit += [f"--minutes={options.minutes:g}", f"--out={out}", f"--commit={commit()}"]
    visit += ["--compile"] if options.compile else []
    visit += [f"--parts={options.parts}"] if options.parts else []
    started = time.monotonic()
    process = subprocess.Popen(
        [*prefix, *visit], cwd=tree, env=bare_environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None  # asked for above
    said = []
    for line in process.stdout:
        print(line, end="", flush=True)
        said.append(line)
    found = look_at(out, "".join(said), process.wait())
    took = time.monotonic() - started
    if took > 60 * options.minutes + _STARTING_SECONDS:
        found.append(f"took {took:.0f} s")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.rehearse", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--plan", action="append", choices=plans.VISITS)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--parts")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    tree = _PLACE / "tree"
    print(f"{copy_tree(tree)} tracked files in {tree}")
    prefix = without_network()
    print("without a network" if prefix else "`unshare -n` is not allowed: WITH the network")
    wrong = []
    for plan in options.plan or list(plans.VISITS):
        wrong += [f"{plan}: {text}" for text in rehearse(plan, options, prefix, tree)]
    print("\n".join(wrong) or "the rehearsal is as documented")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
