"""The cache of just-in-time builds: what makes a new one, and what happens when things go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from fake_toolkit import make_toolkit, write_program
from forked import Forks, Program
from toy import HEADER, VALUE, WORKER, fork, toy_recipe, wait_for

from batchnorm_cuda._build import builder, kernels, recipes, sources
from batchnorm_cuda._build.compile import BuildError


def test_four_processes_build_once_and_all_load(forks: Forks, toy: Path) -> None:
    script = toy / "build.py"
    script.write_text(WORKER)
    variables = {
        name: os.environ[name] for name in ("BATCHNORM_CUDA_CACHE_DIR", "TORCH_NO_COMPILER_WRAPPER")
    }
    done = forks.run_together([Program((str(script), str(toy)), variables)] * 4)
    assert [worker.stdout.strip() for worker in done] == ["42"] * 4, done
    assert "".join(w.stderr for w in done).count("batchnorm_cuda: compiling a toy in") == 1


def test_killed_build_blocks_nobody_and_leaves_nothing_running(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    hang = f'#!/bin/sh\ncase "$*" in *" -c "*) echo $$ > {pid_file}; exec sleep 600 ;; esac\n'
    hanging = write_program(tmp_path / "bin" / "c++", hang + 'exec c++ "$@"\n')
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(hanging))
        victim = fork(lambda: builder.build(toy_recipe(toy)))
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip())
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    left = [path.name for path in (tmp_path / "cache").glob("*.tmp-*")]
    assert left, "the killed build should have left its folder behind"
    start = time.monotonic()
    assert builder.build(toy_recipe(toy)).exists()
    assert time.monotonic() - start < 300  # the compiler that was left sleeps longer
    assert not list((tmp_path / "cache").glob("*.tmp-*"))
    compiler = int(pid_file.read_text())
    wait_for(lambda: not Path(f"/proc/{compiler}").exists())


def test_failure_quotes_the_compiler_and_keeps_the_other_objects(toy: Path, compiled) -> None:
    (toy / "toy_value.cpp").write_text("int toy_value() { return forty_two; }\n")
    with pytest.raises(BuildError, match=r"error: .*forty_two") as error:
        builder.build(toy_recipe(toy))
    log = Path(str(error.value).split("full log: ")[1].split(")")[0])
    assert "forty_two" in log.read_text()
    (toy / "toy_value.cpp").write_text(VALUE)
    before = compiled()
    builder.build(toy_recipe(toy))
    assert compiled().count("toy_value.cpp") == before.count("toy_value.cpp") + 1
    assert compiled().count("toy.cpp") <= 2  # again only if the failure stopped it


def test_only_what_an_edit_reaches_is_compiled_again(toy: Path, compiled) -> None:
    first = builder.build(toy_recipe(toy))
    assert compiled() == ["toy.cpp", "toy_value.cpp"]
    (toy / "toy_value.cpp").write_text(VALUE.replace("42", "43"))
    second = builder.build(toy_recipe(toy))
    assert compiled() == ["toy.cpp", "toy_value.cpp", "toy_value.cpp"]
    assert second != first and first.exists()
    (toy / "toy_value.h").write_text(HEADER + "// touched\n")
    builder.build(toy_recipe(toy))
    commented = len(compiled())
    assert commented <= 4  # torch's builder links nothing without compiling something
    (toy / "toy_value.h").write_text(HEADER + "int touched();\n")
    builder.build(toy_recipe(toy))
    assert len(compiled()) == commented + 2
    assert builder.build(toy_recipe(toy)) and len(compiled()) == commented + 2


def test_unwritable_cache_names_the_variable(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BATCHNORM_CUDA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="set BATCHNORM_CUDA_CACHE_DIR"):
        builder.build(toy_recipe(toy))


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHNORM_CUDA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert builder.cache_dir() == Path("/somewhere/batchnorm_cuda")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert builder.cache_dir() == Path("/home/user/.cache/batchnorm_cuda")
    monkeypatch.setenv("BATCHNORM_CUDA_CACHE_DIR", "~/mine")
    assert builder.cache_dir() == Path("/home/user/mine")


@pytest.fixture
def fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A described machine: CUDA 13.0 and no GPU. Returns a copy of the sources to edit."""
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda-13.0")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, source in (("csrc", sources.csrc_dir()), ("simt", sources.simt_dir())):
        subprocess.run(["cp", "-r", str(source), str(tmp_path / name)], check=True)
    monkeypatch.setattr(sources, "csrc_dir", lambda: tmp_path / "csrc")
    monkeypatch.setattr(sources, "simt_dir", lambda: tmp_path / "simt")
    return tmp_path


def _edit(path: Path) -> None:
    path.write_text(path.read_text() + "\nextern int edited;\n")


HOST_CHANGES = {
    "version": lambda m, _: m.setattr(recipes, "__version__", "0.0.0"),
    "compiler": lambda m, _: m.setattr(recipes, "compiler_version", lambda: "c++ 99"),
    "torch": lambda m, _: m.setattr(torch, "__version__", "2.0.0+cu130"),
    "torch's CUDA": lambda m, _: m.setattr(torch.version, "cuda", "13.1"),
    "python ABI": lambda m, _: m.setattr(recipes.sysconfig, "get_config_var", lambda _: "cp399"),
    "flags": lambda m, _: m.setattr(sources, "CXX_FLAGS", ("-O1",)),
    "source": lambda m, root: _edit(root / "csrc" / "torch" / "forward.cpp"),
    "header": lambda m, root: _edit(root / "csrc" / "params.h"),
}
NVCC = {
    "nvcc": lambda m, root: m.setenv("CUDA_HOME", str(make_toolkit(root / "cuda-13.9", "13.9")))
}
KERNEL_CHANGES = {
    "version": lambda m, _: m.setattr(kernels, "__version__", "0.0.0"),
    "compiler": lambda m, _: m.setattr(kernels, "compiler_version", lambda: "c++ 99"),
    "architectures": lambda m, _: m.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0"),
    "flags": lambda m, _: m.setattr(sources, "NVCC_FLAGS", ("-O1",)),
    "the user's flags": lambda m, _: m.setenv("NVCC_APPEND_FLAGS", "-lineinfo"),
    "kernel": lambda m, root: _edit(root / "csrc" / "kernels" / "team_forward_half.cu"),
    "header": lambda m, root: _edit(root / "csrc" / "kernels" / "platform.cuh"),
}
EMULATED_CHANGES = HOST_CHANGES | {
    "kernel": lambda m, root: _edit(root / "csrc" / "kernels" / "stages_half.cu"),
    "cpu": lambda m, _: m.setattr(kernels, "cpu_hash", lambda: "another"),
    "host model": lambda m, root: _edit(root / "simt" / "include" / "cuda_runtime.h"),
    "new file": lambda m, root: (root / "csrc" / "kernels" / "extra.cuh").touch(),
}


@pytest.mark.parametrize("name", HOST_CHANGES | NVCC)
def test_cuda_key_changes_with(name: str, fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipes.cuda_recipe().folder
    assert recipes.cuda_recipe().folder == before
    (HOST_CHANGES | NVCC)[name](monkeypatch, fixed)
    assert recipes.cuda_recipe().folder != before


@pytest.mark.parametrize("name", KERNEL_CHANGES | NVCC)
def test_kernels_key_changes_with(name: str, fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipes.kernel_recipe("half").folder
    assert recipes.kernel_recipe("half").folder == before
    (KERNEL_CHANGES | NVCC)[name](monkeypatch, fixed)
    assert recipes.kernel_recipe("half").folder != before


def test_what_kernels_do_not_depend_on(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another torch, a host file, another dtype's kernels, a comment: nothing is compiled again."""
    before = [recipes.kernel_recipe("half").folder, recipes.cuda_recipe().folder]
    csrc = fixed / "csrc"
    forward = (csrc / "torch" / "forward.cpp").read_text()
    for name in ("torch", "torch's CUDA", "python ABI", "source"):
        with monkeypatch.context() as patch:
            HOST_CHANGES[name](patch, fixed)
            assert recipes.kernel_recipe("half").folder == before[0]
    (csrc / "torch" / "forward.cpp").write_text(forward)
    _edit(csrc / "kernels" / "team_forward_float.cu")
    header = csrc / "kernels" / "platform.cuh"
    header.write_text("// said\n" + header.read_text())
    after = [recipes.kernel_recipe("half").folder, recipes.cuda_recipe().folder]
    assert after == before


@pytest.mark.parametrize("name", EMULATED_CHANGES)
def test_emulated_key_changes_with(name: str, fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipes.emulated_recipe().folder
    assert recipes.emulated_recipe().folder == before
    EMULATED_CHANGES[name](monkeypatch, fixed)
    assert recipes.emulated_recipe().folder != before


def test_lists_of_sources_are_complete() -> None:
    """No file is forgotten, and no two give one object (ninja would not say so)."""
    written = {p for p in sources.csrc_dir().rglob("*") if p.suffix in (".cpp", ".cu")}
    assert set(sources.cuda_sources()) == written
    emulated = recipes.emulated_recipe().sources
    assert len({path.stem for path in emulated}) == len(emulated)
    assert all(path.is_file() for path in emulated)
