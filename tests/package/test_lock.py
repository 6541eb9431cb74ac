"""CI's pinned requirements cover what pyproject.toml asks for; the bill of materials is checked.

The files are written by `make lock`; CI installs them with --require-hashes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import sbom

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / ".ci"
PINNED = ("requirements.txt", "visit.txt", "runtime.txt")
pytestmark = pytest.mark.skipif(not CI.is_dir(), reason="needs the source tree")


def inputs(name: str) -> list[Requirement]:
    lines = (CI / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared(heading: str) -> list[Requirement]:
    """What a table of pyproject.toml asks for; Python 3.10 has no parser of TOML."""
    text = re.sub(r"(?m)^#.*$", "", (ROOT / "pyproject.toml").read_text())
    (table,) = re.findall(rf"(?ms)^\[{heading}\]$(.*?)^\[", text)
    lists = re.findall(r"(?ms)^([\w-]+) = \[(.*?)\]$", table)
    lists = [text for name, text in lists if heading != "project" or name == "dependencies"]
    return [Requirement(text) for each in lists for text in re.findall(r'"([^"]+)"', each)]


@pytest.mark.parametrize("name", PINNED)
def test_every_requirement_has_a_version_and_hashes(name: str) -> None:
    text = re.sub(r"(?m)^\s*#.*\n?", "", (CI / name).read_text()).replace("\\\n", " ")
    lines = text.strip().splitlines()
    wrong = [line for line in lines if not re.match(r"[\w.-]+==\S+( +--hash=sha256:\w{64})+", line)]
    assert lines and not wrong


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (declared("project"), "runtime.txt"),
        (declared("project"), "requirements.txt"),
        (declared(r"project\.optional-dependencies"), "requirements.txt"),
        (inputs("requirements.in"), "requirements.txt"),
        (inputs("visit.in"), "visit.txt"),
    ],
    ids=["runtime", "package", "extras", "CI", "visit"],
)
def test_what_is_asked_for_is_pinned(asked: list[Requirement], name: str) -> None:
    """Fails where a requirement was changed and `make lock` was not run."""
    pinned = sbom.locked((CI / name).read_text())
    assert asked
    for each in asked:
        assert each.name in pinned
        assert each.specifier.contains(pinned[each.name], prereleases=True), each


def test_the_package_runs_with_what_ci_tests() -> None:
    tested = sbom.locked((CI / "requirements.txt").read_text())
    runtime = sbom.locked((CI / "runtime.txt").read_text())
    assert runtime.items() <= tested.items()


def make(*words: str) -> str:
    """What make would run for a new environment, whatever this one's make was told."""
    told = ("LOCK", "TORCH", "VISIT_PACKAGES", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    command = ["make", "-n", "venv", "VENV=build/none", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_only_ci_is_held_to_the_pins() -> None:
    assert "--require-hashes" not in make()
    said = make("LOCK=.ci/requirements.txt")
    assert "--require-hashes -r .ci/requirements.txt" in said
    assert said.count("pip install") == 2 and "--no-deps -e ." in said


def bill() -> dict:
    reference = {"hashes": [{"alg": "SHA-256", "content": "0" * 64}]}
    parts = {"torch": "2.14.1", "ninja": "1.13.2"}
    return {
        "metadata": {"component": {"name": "batchnorm_cuda", "version": sbom.version}},
        "components": [
            {"name": name, "version": version, "externalReferences": [reference]}
            for name, version in parts.items()
        ],
    }


def test_a_bill_of_materials_is_held_to_the_pins() -> None:
    expected = {"torch": "2.14.1", "ninja": "1.13.2"}
    assert sbom.problems(bill(), expected) == []

    wrong = bill()
    wrong["components"][0]["version"] = "2.14.0"
    wrong["components"][1]["externalReferences"] = []
    wrong["components"].append({"name": "left-pad", "version": "1"})
    wrong["metadata"]["component"]["version"] = "0"
    assert sbom.problems(wrong, expected) == [
        f"root: expected version {sbom.version}, got '0'",
        "torch: expected 2.14.1, got '2.14.0'",
        "ninja: expected a hash, got none",
        "left-pad: not in runtime.txt",
    ]
    assert sbom.problems({}, {"torch": "1"})[-1] == "torch: expected 1, got None"
