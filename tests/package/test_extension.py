"""Which compiled extension is taken, and what is said when none can be."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fake_toolkit import make_toolkit

from batchnorm_cuda._build import builder, recipes, sources
from batchnorm_cuda._build import extension as _extension
from batchnorm_cuda._build.compile import BuildError
from batchnorm_cuda._build.toolkit import ToolkitError

JIT = ModuleType("just in time")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PyTorch 2.14.1 with CUDA 13.0, its toolkit, one GPU of capability 8.6; nothing loaded."""
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda-13.0")))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    set_gpu(monkeypatch, "NVIDIA A10", (8, 6))
    monkeypatch.setattr(_extension, "_cuda", None)
    monkeypatch.setattr(_extension, "_info", {})
    return tmp_path


def set_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def install_aot(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: object) -> Path:
    """Pretend that `_C` was compiled at installation, and that a just-in-time build works."""
    record = {
        "torch": "2.14.1+cu130",
        "cuda": "13.0",
        "archs": ["8.0", "9.0+PTX"],
        "sources": sources.content_hash(emulated=False),
    }
    path = folder / "_C.so"
    path.write_bytes(b"no shared object")
    (folder / "_aot.json").write_text(json.dumps(record | changes))
    monkeypatch.setattr(_extension, "_AOT_RECORD", folder / "_aot.json")
    monkeypatch.setattr(_extension, "_aot_path", lambda: path)
    monkeypatch.setattr(_extension, "_load_jit", lambda kind: JIT)
    return path


def test_module_compiled_at_installation_is_taken(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = install_aot(monkeypatch, machine)
    installed = ModuleType("installed")
    loaders = []
    installed.set_kernel_loader = loaders.append
    monkeypatch.setattr(_extension, "_import", lambda name, path: installed)
    assert _extension.load_cuda() is installed
    assert capsys.readouterr().err == ""
    info = _extension.build_info()["loaded"]["cuda"]
    assert info["origin"] == "ahead of time" and info["path"] == str(path)
    assert loaders[0]("half") == str(path.with_name("kernels_half.so"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch": "2.13.0+cu130"}, "for PyTorch 2.13.0+cu130, but this is PyTorch 2.14.1+cu130"),
        ({"sources": "others"}, "was compiled from other sources"),
        ({"archs": ["9.0"]}, "NVIDIA A10 has compute capability 8.6, which is not covered by 9.0"),
        ({}, "does not load"),  # the file is no shared object
    ],
)
def test_unfit_module_is_named_with_the_cure_before_the_detour(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict,
    said: str,
) -> None:
    install_aot(monkeypatch, machine, **changes)
    assert _extension.load_cuda() is JIT
    err = capsys.readouterr().err
    assert said in err
    assert "BATCHNORM_CUDA_AOT=1 pip install --no-build-isolation" in err
    assert "Using a just-in-time build instead" in err


def test_unfit_module_and_no_toolkit_give_one_error_with_both(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_jit = _extension._load_jit
    install_aot(monkeypatch, machine, torch="2.13.0+cu130")
    monkeypatch.setattr(_extension, "_load_jit", load_jit)
    monkeypatch.setenv("CUDA_HOME", str(machine / "nowhere"))
    with pytest.raises(BuildError) as error:
        _extension.load_cuda()
    for part in ("PyTorch 2.13.0+cu130", "PyTorch 2.14.1+cu130", "batchnorm_cuda[nvcc]"):
        assert part in str(error.value)


def test_torch_without_cuda(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BuildError, match=r"2\.13\.0\+cpu is a build without CUDA.*pip install"):
        _extension.load_cuda()


def test_no_toolkit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(machine / "nowhere"))
    with pytest.raises(ToolkitError, match=r"pip install 'batchnorm_cuda\[nvcc\]'"):
        _extension.load_cuda()


def test_no_compiler(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolkitError, match=r"no C\+\+ compiler.*apt-get install g\+\+"):
        _extension.load_cuda()


def test_gpu_older_than_the_compiler_knows(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpu(monkeypatch, "NVIDIA GeForce GTX 1080", (6, 1))
    with pytest.raises(BuildError) as error:
        _extension.load_cuda()
    assert "NVIDIA GeForce GTX 1080 has compute capability 6.1" in str(error.value)
    assert "7.5;8.0;9.0;10.0+PTX" in str(error.value)


def test_gpu_not_in_the_list_asked_for(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    with pytest.raises(BuildError, match=r"NVIDIA A10 .*8\.6.*TORCH_CUDA_ARCH_LIST='9\.0'"):
        _extension.load_cuda()


def test_recipe_is_for_the_gpu_present(machine: Path) -> None:
    recipe = recipes.cuda_recipe()
    assert recipe.environment["TORCH_CUDA_ARCH_LIST"] == "8.0+PTX"  # the toolkit knows no 8.6
    assert recipe.environment["CUDA_HOME"] == str(machine / "cuda-13.0")


def test_threads_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def load(kind: str) -> ModuleType:
        time.sleep(0.05)
        loads.append(kind)
        return JIT

    monkeypatch.setattr(_extension, "_load_jit", load)
    monkeypatch.setattr(_extension, "_emulated", None)
    threads = [threading.Thread(target=_extension.load_emulated) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["emulated"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_number_of_a_message_goes_through_a_stream(extension: ModuleType) -> None:
    """csrc/torch/text.h says why."""
    with_gpu = torch.cuda.is_available()
    recipe = recipes.cuda_recipe() if with_gpu else recipes.emulated_recipe()
    compiled = recipe.object_name(sources.csrc_dir() / "torch" / "checks.cpp")
    path = builder.cache_dir() / "objects" / compiled
    symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    assert "c10::ValueError" in symbols  # the file of the messages
    streams = ("ostream::_M_insert", "ostream::operator<<", "operator<<(std::ostream&, c10")
    assert not [line for line in symbols.splitlines() if any(name in line for name in streams)]
