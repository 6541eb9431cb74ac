"""Wheels of the compiled package: what they are called, what they require, how they are checked.

`make wheel` compiles one; these tests check its steps on packages of two files.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from bench.machine_code import instances
from bench.toolkit import ToolkitError, find_tool
from tools import wheel, wheel_check

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the source tree"
)

# Says of itself what the real package would.
INIT = """
from ._build import extension
def build_info():
    return {{"torch": "{torch}", "loaded": {{"cuda": {{
        "origin": "{origin}", "path": extension.__file__, "archs": ["8.0", "9.0+PTX"],
        "cuda": "13.0"}}}}}}
"""
LOADS = "def load_cuda(): pass\n"
BUILDS = "import os\ndef load_cuda(): os.mkdir(os.environ['BATCHNORM_CUDA_CACHE_DIR'])\n"


def make_wheel(
    folder: Path,
    *,
    origin: str = "ahead of time",
    built_with: str = torch.__version__,
    loads: str = LOADS,
    requires: str = f"torch=={torch.__version__.split('+')[0]}",
) -> Path:
    path = folder / "batchnorm_cuda-0.1.0+torch2.14.1.cu130-py3-none-any.whl"
    info = "batchnorm_cuda-0.1.0+torch2.14.1.cu130.dist-info"
    version = "Name: batchnorm_cuda\nVersion: 0.1.0+torch2.14.1.cu130\n"
    files = {
        "batchnorm_cuda/__init__.py": INIT.format(torch=built_with, origin=origin),
        "batchnorm_cuda/_build/extension.py": loads,
        "batchnorm_cuda/_build/sources.py": "KERNEL_TABLES = {}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\n{version}Requires-Dist: {requires}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return path


@pytest.mark.parametrize(
    ("version", "cuda", "expected"),
    [
        ("2.14.1+cu130", "13.0", "torch2.14.1.cu130"),
        ("2.9.1", "12.8", "torch2.9.1.cu128"),
        ("2.15.0.dev20261101+cu131", "13.1", "torch2.15.0.dev20261101.cu131"),
    ],
)
def test_the_label_is_a_local_version(version: str, cuda: str, expected: str) -> None:
    assert wheel.label(version, cuda) == expected
    file = f"batchnorm_cuda-0.1.0+{expected}-cp311-cp311-linux_x86_64.whl"
    name, parsed, _, tags = parse_wheel_filename(file)
    assert (name, parsed.local, len(tags)) == ("batchnorm-cuda", expected, 1)
    assert Version("0.1.0") < parsed < Version("0.1.1")


def test_the_tree_is_tied_to_one_torch(tmp_path: Path) -> None:
    """As setuptools reads it; nothing else of pyproject.toml changes."""
    project = tmp_path / "pyproject.toml"
    shutil.copy(ROOT / "pyproject.toml", project)
    before = project.read_text()
    wheel.tie_to_torch(project, "0.1.0", "2.14.1+cu130", "13.0")
    lines = set(project.read_text().splitlines()) - set(before.splitlines())
    assert lines == {
        'version = "0.1.0+torch2.14.1.cu130"',
        'dependencies = ["torch==2.14.1", "ninja>=1.11"]',
    }
    script = (
        "from setuptools import Distribution\nd = Distribution()\nd.parse_config_files()\n"
        "print(d.metadata.version, d.install_requires)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split("[")[0].strip() == "0.1.0+torch2.14.1.cu130", done.stderr
    assert "'torch==2.14.1'" in done.stdout

    with pytest.raises(wheel.WheelError, match=r'expected a requirement "torch>=...", found none'):
        wheel.tie_to_torch(project, "0.1.0", "2.14.1+cu130", "13.0")


def test_a_wheel_is_loaded_where_nothing_can_be_compiled(tmp_path: Path) -> None:
    loads = (
        "import os, shutil\n"
        "def load_cuda():\n"
        "    for name in ('c++', 'g++', 'nvcc', 'ninja'):\n"
        "        assert shutil.which(name) is None, name\n"
        "    assert not os.path.exists(os.environ['CUDA_HOME'])\n"
        "    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
    )
    place = tmp_path / "fresh"
    python = wheel_check.install(make_wheel(tmp_path, loads=loads), place)
    info = wheel_check.load(python, place)
    assert Path(info["loaded"]["cuda"]["path"]).is_relative_to(place / "venv")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"origin": "just in time"}, "expected the wheel's own binary, got .*just in time"),
        ({"built_with": "2.0.0"}, f"expected torch {re.escape(torch.__version__)}, got 2.0.0"),
        ({"loads": "def load_cuda(): raise OSError('no libcudart')"}, "no libcudart"),
        ({"loads": BUILDS}, "expected no build, found"),
        ({"requires": "torch==0.0.1"}, "No matching distribution found for torch==0.0.1"),
    ],
    ids=["origin", "torch", "loading", "a build", "requirement"],
)
def test_a_wheel_that_does_not_do_is_refused(tmp_path: Path, changed: dict, said: str) -> None:
    place = tmp_path / "fresh"
    with pytest.raises(wheel_check.CheckError, match=said):
        wheel_check.load(wheel_check.install(make_wheel(tmp_path, **changed), place), place)


def test_every_kernel_is_there_for_every_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, dict[str, set[str]]] = {}
    monkeypatch.setattr(instances, "per_architecture", lambda library: held[library.name])
    for name in ("_C.so", "kernels_half.so"):
        (tmp_path / name).touch()
    archs = ["8.0", "9.0+PTX"]
    held |= {"_C.so": {}, "kernels_half.so": {"8.0": {"a", "b"}, "9.0": {"a", "b"}}}
    (line,) = wheel_check.holdings(tmp_path, archs)
    assert line.startswith("kernels_half.so: 2 kernels for 8.0 9.0+PTX")

    held["kernels_half.so"]["9.0"] = {"a"}
    with pytest.raises(wheel_check.CheckError, match=r"not for every architecture: \['b'\]"):
        wheel_check.holdings(tmp_path, archs)
    del held["kernels_half.so"]["9.0"]
    with pytest.raises(wheel_check.CheckError, match=r"expected code for \['8.0', '9.0'\], got"):
        wheel_check.holdings(tmp_path, archs)
    held["kernels_half.so"] = {}
    with pytest.raises(wheel_check.CheckError, match="no library in it holds a kernel"):
        wheel_check.holdings(tmp_path, archs)


A, B = "_Z8a_kernelIfEvPT_", "_Z8b_kernelPi"


def test_kernels_are_read_by_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and architecture is a part of its own; only kernels count."""
    part = (
        "\nFatbin elf code:\n================\narch = sm_{arch}\nhost = linux\n\nResource usage:\n"
    )
    function = " Function {name}:\n  REG:8 STACK:0\n"
    parts = [
        ("90", ""),
        ("90", B),
        ("80", A),
        ("80", B),
        ("120", B),
        ("120", "__cuda_sm70_shflsync"),
    ]
    text = "".join(
        part.format(arch=arch) + (function.format(name=name) if name else "")
        for arch, name in parts
    )
    monkeypatch.setattr(instances, "find_cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(instances, "_output", lambda command: text)
    found, b = instances.per_architecture(Path("_C.so")), "b_kernel"
    assert found == {"9.0": {b}, "8.0": {"a_kernel<float>", b}, "12.0": {b}}


def test_no_cuobjdump_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    for home, place in ((None, "in a toolkit"), (tmp_path, f"in {tmp_path / 'bin'}")):
        with pytest.raises(
            ToolkitError, match=f"no cuobjdump {place}, .*`pip install nvidia-cuda-"
        ):
            find_tool("cuobjdump", home)
