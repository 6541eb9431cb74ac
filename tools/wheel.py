"""Builds an ahead-of-time wheel and checks it where there is neither compiler nor toolkit.

    python -m tools.wheel [--out dist] [--work build/wheel]

The wheel is for the torch of this interpreter, and says so: in its name,
batchnorm_cuda-<version>+torch<version>.cu<version>-<python>-<platform>.whl, and by requiring
exactly that torch. Architectures are those of TORCH_CUDA_ARCH_LIST, else the default list. What is
built is a copy of the tracked files, by setup.py as for any ahead-of-time install.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from bench.loading import ROOT
from bench.visit.rehearse import copy_tree

from . import wheel_check


class WheelError(RuntimeError):
    """No wheel, or one that must not be uploaded; the message says why."""


def label(torch_version: str, cuda: str) -> str:
    """The local part of the version (PEP 440): torch2.14.1.cu130 of 2.14.1+cu130 and 13.0."""
    public = torch_version.split("+")[0]
    return f"torch{public}.cu{cuda.replace('.', '')}"


def replace_once(text: str, old: str, new: str, path: Path) -> str:
    if text.count(old) != 1:
        raise WheelError(f"{path}: expected {old!r} once, found it {text.count(old)} times")
    return text.replace(old, new)


def tie_to_torch(project: Path, version: str, torch_version: str, cuda: str) -> None:
    """Make the tree's pyproject.toml speak of the one torch that the binary is for."""
    text = project.read_text()
    requirement = re.search(r'"torch>=[^"]*"', text)
    if requirement is None:
        raise WheelError(f'{project}: expected a requirement "torch>=...", found none')
    pinned = f'"torch=={torch_version.split("+")[0]}"'
    full = f'version = "{version}+{label(torch_version, cuda)}"'
    text = replace_once(text, requirement.group(), pinned, project)
    text = replace_once(text, 'dynamic = ["version"]', full, project)
    project.write_text(text)


def build(tree: Path, out: Path) -> Path:
    """The wheel that pip makes of `tree`, in `out`."""
    scratch = tree.parent / "dist"
    shutil.rmtree(scratch, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", str(tree), "--wheel-dir", str(scratch)]
    command += ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    environment = {**os.environ, "BATCHNORM_CUDA_AOT": "1"}
    if subprocess.run(command, env=environment).returncode != 0:
        raise WheelError("pip wheel failed; its words are above")
    (made,) = scratch.glob("*.whl")
    tag = f"cp{sysconfig.get_config_var('py_version_nodot')}"
    if f"-{tag}-{tag}-" not in made.name:
        raise WheelError(f"{made.name}: expected the tag {tag}-{tag}; is there nothing compiled?")
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(made, out / made.name))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.wheel", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheel", metavar="FOLDER")
    options = parser.parse_args()
    tree, cuda = options.work.resolve() / "tree", torch.version.cuda
    try:
        if cuda is None:
            raise WheelError(f"expected a CUDA build of torch, got {torch.__version__}")
        copy_tree(tree)
        version = subprocess.run(
            [sys.executable, "-c", "import _version; print(_version.__version__)"],
            cwd=tree / "batchnorm_cuda",
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        tie_to_torch(tree / "pyproject.toml", version, torch.__version__, cuda)
        wheel = build(tree, options.out.resolve())
        lines = wheel_check.check(wheel, options.work.resolve() / "fresh")
    except (WheelError, wheel_check.CheckError) as error:
        print(f"python -m tools.wheel: {error}", file=sys.stderr)
        return 1
    print("\n".join([*lines, f"{wheel.stat().st_size / 1e6:.1f} MB: {wheel}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
