"""Where the suite runs: on the GPU if there is one, else on the emulated kernels.

The same tests and the same tolerances hold for both. Tests of semantics also run on the composite
of torch operators that serves CPU tensors without emulation.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import older_torch
import pytest
import torch
from fake_toolkit import write_program
from forked import Forks
from toy import write_toy

from batchnorm_cuda._build.extension import load_cuda, load_emulated

HAS_GPU = torch.cuda.is_available()
NO_GPU = "needs a GPU"

# Before the first test, and for every process that a test starts.
if not HAS_GPU:
    os.environ["BATCHNORM_CUDA_EMULATE"] = "1"
    # Tensors this small are done before a second thread has begun, which then waits at full speed
    # for more: three quarters of the time of some test files.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not list(importlib.metadata.distributions(name="batchnorm_cuda")):  # a plain copy of the files
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


@dataclass(frozen=True)
class Backend:
    """A way to compute batch norm: what backend_for says, and the device of its tensors."""

    name: str
    device: str

    @property
    def has_kernels(self) -> bool:
        return self.name != "aten"


KERNELS = Backend("cuda", "cuda") if HAS_GPU else Backend("emulated", "cpu")
ATEN = Backend("aten", "cpu")


@pytest.fixture(params=[KERNELS, ATEN], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each backend in turn."""
    if request.param is ATEN:
        monkeypatch.delenv("BATCHNORM_CUDA_EMULATE", raising=False)
    return request.param


@pytest.fixture
def aten(monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.delenv("BATCHNORM_CUDA_EMULATE", raising=False)
    return ATEN


@pytest.fixture
def kernels() -> Backend:
    """The backend that runs the kernels here."""
    return KERNELS


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    """The compiled module that the kernels backend calls."""
    return load_cuda() if HAS_GPU else load_emulated()


@pytest.fixture(scope="session")
def forks(extension: ModuleType) -> Iterator[Forks]:
    """Runs programs, without emulation unless they ask for it. None has to compile first."""
    environment = {k: v for k, v in os.environ.items() if k != "BATCHNORM_CUDA_EMULATE"}
    # Layers this small only wait for each other's threads.
    forks = Forks(environment | {"OMP_NUM_THREADS": "1"})
    yield forks
    forks.close()


@pytest.fixture
def plan_options(extension: ModuleType) -> Iterator[Callable[[dict], None]]:
    """Forces choices of the plan for the length of a test."""
    yield extension.set_plan_options
    extension.set_plan_options({})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small networks: layers this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the toy's sources, and an empty cache beside it."""
    monkeypatch.setenv("BATCHNORM_CUDA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_NO_COMPILER_WRAPPER", "1")  # ccache would answer for the compiler
    monkeypatch.delenv("CXX", raising=False)
    return write_toy(tmp_path / "toy")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which files have been compiled so far, as seen by the compiler."""
    log = tmp_path / "compiled"
    script = f'#!/bin/sh\ncase "$*" in *" -c "*) echo "$*" >> {log} ;; esac\nexec c++ "$@"\n'
    monkeypatch.setenv("CXX", str(write_program(tmp_path / "bin" / "c++", script)))
    return lambda: sorted(
        Path(word).name
        for line in (log.read_text().splitlines() if log.exists() else [])
        for word in line.split()
        if word.endswith(".cpp")
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")


_left_out: list[str] = []


# Test files that stand on a package which may be missing: torchvision fits one build of torch only,
# and torch's own test cases need expecttest.
_STANDS_ON = {
    "test_torchvision.py": "torchvision",
    "test_fold_torchvision.py": "torchvision",
    "test_fusion_networks.py": "torchvision",
    "test_torch_inputs.py": "expecttest",
}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out, in words, what cannot run for want of a package."""
    package = _STANDS_ON.get(collection_path.name)
    if package is None:
        return None
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:
        _left_out.append(f"{collection_path.name} is left out: {error}")
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    older_torch.mark(items)
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and NO_GPU in report.longrepr[2]
    ]
    terminalreporter.write_line(
        f"kernels ran on: {KERNELS.name}; {len(skipped)} tests skipped for lack of a GPU"
    )
    for line in _left_out:
        terminalreporter.write_line(line)
