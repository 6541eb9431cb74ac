"""Installing: what the wheel carries, and builds ahead of time and by a user's own call.

The tests marked `nvcc` compile for real and take minutes; `make cuda` runs them.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from fake_toolkit import make_toolkit

from batchnorm_cuda._build import sources
from batchnorm_cuda._build.toolkit import Toolkit, resolve_toolkit
from bench.machine_code.instances import find_cuobjdump

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source tree that the tests came from"
)

needs_setuptools = pytest.mark.skipif(
    int(importlib.metadata.version("setuptools").split(".")[0]) < 77,
    reason="needs setuptools 77, as pyproject.toml says",
)

TREE = ("batchnorm_cuda", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what an installation reads, so that nothing is built in the checkout itself."""
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_aot.json")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "tests" / "simt", copy / "tests" / "simt", ignore=ignored)
    return copy


def fake_torch(folder: Path, text: str) -> dict[str, str]:
    """Environment in which `import torch` runs `text` instead."""
    folder.mkdir()
    (folder / "torch.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(folder)}


def pip(*arguments: str | Path, environment: dict[str, str], cwd: Path) -> str:
    """Run pip without any network; its output, whether it succeeded or not."""
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "-v"]
    done = subprocess.run(command, env=environment, cwd=cwd, text=True, capture_output=True)
    return done.stdout + done.stderr


def python(
    script: str, *arguments: Path, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, text=True, capture_output=True)


@needs_setuptools
def test_plain_wheel_needs_no_torch_and_ships_every_source(tree: Path, tmp_path: Path) -> None:
    environment = fake_torch(tmp_path / "no-torch", "raise ImportError('torch is not here')")
    environment.pop("BATCHNORM_CUDA_AOT", None)
    output = pip("wheel", ".", "-w", tmp_path / "dist", environment=environment, cwd=tree)
    wheels = list((tmp_path / "dist").glob("*.whl"))
    assert len(wheels) == 1, output
    assert wheels[0].name.endswith("-py3-none-any.whl")  # nothing compiled
    names = set(zipfile.ZipFile(wheels[0]).namelist())

    suffixes = (".cpp", ".cu", ".cuh", ".h")
    csrc = {p for p in sources.csrc_dir().rglob("*") if p.suffix in suffixes}
    emulated = {p for p in sources.emulated_cpp_sources() if sources.simt_dir() in p.parents}
    simt = {p for p in (sources.simt_dir() / "include").rglob("*") if p.suffix in suffixes}
    simt |= emulated | set(sources.simt_dir().glob("*.h"))
    expected = {f"batchnorm_cuda/csrc/{p.relative_to(sources.csrc_dir())}" for p in csrc}
    expected |= {f"batchnorm_cuda/simt/{p.relative_to(sources.simt_dir())}" for p in simt}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "batchnorm_cuda").rglob("*.py")}
    assert expected <= names, sorted(expected - names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/"))]


@needs_setuptools
def test_installed_package_finds_its_own_sources(tree: Path, tmp_path: Path) -> None:
    """From another folder and without the checkout: the copies inside the package are taken."""
    target = tmp_path / "site"
    output = pip("install", ".", "--target", target, environment={**os.environ}, cwd=tree)
    script = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "from batchnorm_cuda._build import sources, recipes\n"
        "recipe = recipes.emulated_recipe()\n"
        "paths = [*recipe.sources, *recipe.kernels.sources, *recipe.include_dirs]\n"
        "print(all(path.exists() for path in paths), sources.csrc_dir(), sources.simt_dir())\n"
    )
    done = python(script, cwd=tmp_path)
    package = target / "batchnorm_cuda"
    expected = f"True {package / 'csrc'} {package / 'simt'}"
    assert done.stdout.strip() == expected, done.stderr + output


@pytest.mark.parametrize(
    ("module", "home", "said"),
    [
        ("raise ImportError('torch is not here')", "13.0", "torch, which cannot be imported"),
        ("cuda = None", "13.0", "needs a CUDA build of torch"),
        ("cuda = '12.8'", "13.0", "PyTorch was built with CUDA 12.8, but the CUDA toolkit at"),
        ("cuda = '13.0'", None, "has no bin/nvcc): `pip install 'batchnorm_cuda[nvcc]'`"),
    ],
    ids=["no torch", "no CUDA in torch", "other major version", "no toolkit"],
)
def test_ahead_of_time_build_fails_by_name(
    tree: Path, tmp_path: Path, module: str, home: str | None, said: str
) -> None:
    fake = f"class version:\n    {module}\n__version__ = '2.14.1'\n"
    environment = fake_torch(tmp_path / "torch", fake if "cuda" in module else module)
    toolkit = make_toolkit(tmp_path / "toolkit", home) if home else tmp_path / "nowhere"
    environment |= {"BATCHNORM_CUDA_AOT": "1", "CUDA_HOME": str(toolkit)}
    output = pip("wheel", ".", "-w", tmp_path / "dist", environment=environment, cwd=tree)
    assert said in output
    assert not list(tmp_path.glob("dist/*.whl"))


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    """Never skips: these tests run only where they are asked for."""
    assert torch.version.cuda, f"torch {torch.__version__} is a build without CUDA"
    return resolve_toolkit(torch.version.cuda)


@pytest.mark.nvcc
def test_users_own_load_of_the_sources(toolkit: Toolkit, tmp_path: Path) -> None:
    """Compile, link and import by torch's own function, with no flag or path of ours."""
    script = (
        "import sys\n"
        "from torch.utils.cpp_extension import load\n"
        "module = load(name='mine', sources=sys.argv[1:], build_directory='.')\n"
        "print(module.__name__, callable(module.forward), callable(module.make_plan))\n"
    )
    environment = {**os.environ, "CUDA_HOME": str(toolkit.home), "TORCH_CUDA_ARCH_LIST": "8.0"}
    if int(toolkit.major) >= 13:  # what the kernels' code is like matters elsewhere
        environment["NVCC_APPEND_FLAGS"] = "--Ofast-compile=max"
    done = python(script, *sources.cuda_sources(), cwd=tmp_path, environment=environment)
    assert done.stdout.strip().endswith("mine True True"), done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.nvcc
def test_ahead_of_time_install(toolkit: Toolkit, tree: Path, tmp_path: Path) -> None:
    """Compiled, linked and imported without a GPU; holds code for 9.0, and its PTX.

    Also for what else the environment asks for: those kernels may be compiled already.
    """
    target = tmp_path / "site"
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    assert "9.0+PTX" in listed.split(";")
    environment = {**os.environ, "BATCHNORM_CUDA_AOT": "1", "TORCH_CUDA_ARCH_LIST": listed}
    for variable in ("CUDA_HOME", "CUDA_PATH"):  # the build is to find the toolkit by itself
        environment.pop(variable, None)
    output = pip("install", ".", "--target", target, environment=environment, cwd=tree)
    modules = list((target / "batchnorm_cuda").glob("_C*.so"))
    assert len(modules) == 1, output[-5000:]

    script = (
        f"import json, sys; sys.path.insert(0, {str(target)!r})\n"
        "from batchnorm_cuda._build import extension\n"
        "extension.recipes.uncovered_gpu = lambda archs: None  # this machine's GPU, if any\n"
        "extension.load_cuda()\n"
        "print(json.dumps(extension.build_info()['loaded']['cuda']))\n"
    )
    done = python(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["origin"] == "ahead of time" and info["path"] == str(modules[0])
    assert info["archs"] == listed.split(";") and info["torch"] == torch.__version__
    for table, names in sources.KERNEL_TABLES.items():
        path = target / "batchnorm_cuda" / f"kernels_{table}.so"
        assert ctypes.CDLL(str(path))[f"batchnorm_cuda_kernels_{table}"]() != 0
        elf, ptx = (cuobjdump(option, path) for option in ("--list-elf", "--list-ptx"))
        assert elf.count(".sm_90.cubin") == ptx.count(".sm_90.ptx") == len(names)
        assert elf.count(".cubin") == len(names) * len(info["archs"])


def cuobjdump(option: str, path: Path) -> str:
    command = [str(find_cuobjdump()), option, str(path)]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout
