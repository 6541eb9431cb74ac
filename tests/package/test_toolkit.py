"""How the CUDA toolkit, the architectures and the number of jobs are chosen."""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path

import pytest
from fake_toolkit import make_toolkit, make_wrapper, write_program
from torch.utils import cpp_extension

from batchnorm_cuda._build import archs, jobs, toolkit

GIB = 1 << 30


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any toolkit: nothing in the environment, on PATH or in the usual places."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    monkeypatch.setattr(toolkit, "USUAL_PLACE", tmp_path / "usr-local")
    return tmp_path


def test_wrapper_script_leads_to_the_toolkit_it_runs(bare: Path) -> None:
    """The place of nvcc on PATH says nothing: its parent has neither headers nor libraries."""
    home = make_toolkit(bare / "opt" / "cuda-13.0")
    make_wrapper(bare / "path" / "nvcc", home)
    found = toolkit.resolve_toolkit("13.0")
    assert (found.home, found.version) == (home, "13.0")
    assert found.cudart == home / "lib64" / "libcudart.so"


def test_cuda_home_that_holds_only_a_wrapper_is_followed(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_toolkit(bare / "opt" / "cuda-13.0")
    make_wrapper(bare / "prefix" / "bin" / "nvcc", home)
    monkeypatch.setenv("CUDA_HOME", str(bare / "prefix"))
    assert toolkit.resolve_toolkit("13.0").home == home


def test_link_to_nvcc_leads_to_its_toolkit(bare: Path) -> None:
    home = make_toolkit(bare / "opt" / "cuda-13.0")
    # An nvcc that does not say where it lives: the link itself has to be followed.
    write_program(home / "bin" / "nvcc", '#!/bin/sh\necho "release 13.0, V13.0.88"\n')
    (bare / "path").mkdir()
    (bare / "path" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert toolkit.resolve_toolkit("13.0").home == home


def test_pypi_toolkit_gets_the_linker_name_it_lacks(bare: Path) -> None:
    home = make_toolkit(bare / "site-packages/nvidia/cu13", libcudart="lib/libcudart.so.13")
    found = toolkit.resolve_toolkit("13.0")
    assert found.home == home and found.lacks_linker_name
    folder = found.linker_dir(bare / "scratch")
    assert (folder / "libcudart.so").resolve() == home / "lib" / "libcudart.so.13"


def test_cuda_home_comes_first_and_alone(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wrapper(bare / "path" / "nvcc", make_toolkit(bare / "opt" / "cuda-13.0"))
    wanted = make_toolkit(bare / "mine", "13.1")
    monkeypatch.setenv("CUDA_HOME", str(wanted))
    assert toolkit.resolve_toolkit("13.0").home == wanted
    monkeypatch.setenv("CUDA_HOME", str(bare / "nowhere"))
    with pytest.raises(toolkit.ToolkitError, match=r"CUDA_HOME: .*/nowhere has no bin/nvcc"):
        toolkit.resolve_toolkit("13.0")


def test_matching_major_version_is_preferred_to_the_first_found(bare: Path) -> None:
    make_wrapper(bare / "path" / "nvcc", make_toolkit(bare / "opt" / "cuda-12.8", "12.8"))
    other = make_toolkit(bare / "usr-local" / "cuda-13.0", "13.0")
    assert toolkit.resolve_toolkit("13.2").home == other


def test_other_major_version_is_refused_with_both_versions(bare: Path) -> None:
    home = make_toolkit(bare / "opt" / "cuda-12.8", "12.8")
    make_wrapper(bare / "path" / "nvcc", home)
    with pytest.raises(toolkit.ToolkitError) as error:
        toolkit.resolve_toolkit("13.0")
    assert "built with CUDA 13.0" in str(error.value)
    assert f"{home} is CUDA 12.8" in str(error.value)


def test_no_toolkit_names_the_command_that_fetches_one(bare: Path) -> None:
    with pytest.raises(toolkit.ToolkitError, match=r"pip install 'batchnorm_cuda\[nvcc\]'"):
        toolkit.resolve_toolkit("13.0")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("include/cuda_runtime.h", "has no include/cuda_runtime.h"),
        ("lib64/libcudart.so", "has no libcudart.so"),
    ],
)
def test_incomplete_toolkit_is_refused_by_name(
    bare: Path, monkeypatch: pytest.MonkeyPatch, missing: str, said: str
) -> None:
    home = make_toolkit(bare / "partial")
    (home / missing).unlink()
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(toolkit.ToolkitError, match=f"{home} {said}"):
        toolkit.resolve_toolkit("13.0")


def test_missing_compiler_names_it_and_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(toolkit.ToolkitError, match=r"'no-such-compiler' does not run.*g\+\+"):
        toolkit.compiler_version()


@pytest.mark.parametrize("compiler", ["env c++", "env -i c++"])
def test_compiler_with_arguments_is_named_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    said = f"CXX='{re.escape(compiler)}' is a program with arguments.*PATH=/usr/lib/ccache"
    with pytest.raises(toolkit.ToolkitError, match=said):
        toolkit.compiler_version()


def test_every_name_of_torch_is_taken() -> None:
    """As torch takes it, read from its own source: the names are in no table that it exports."""
    source = inspect.getsource(cpp_extension._get_cuda_arch_flags)
    names = dict(re.findall(r"\('([A-Z][\w+]*)', '([\d.;+PTX]+)'\)", source))
    assert "Ampere+Tegra" in names
    for name, meaning in names.items():
        assert set(archs.parse(name)) >= set(meaning.removesuffix("+PTX").split(";"))


@pytest.mark.parametrize(
    ("explicit", "visible", "expected"),
    [
        (None, [], "7.5;8.0;9.0;10.0+PTX"),  # DEFAULT, less what this nvcc cannot generate
        (None, [(8, 6), (9, 0), (8, 6)], "8.6;9.0+PTX"),
        (None, [(12, 0)], "10.0+PTX"),  # newer than nvcc: PTX that its driver compiles
        (None, [(8, 9)], "8.6+PTX"),
        (None, [(6, 1), (8, 0)], "8.0+PTX"),  # an old card beside the one in use
        ("9.0;8.0", [(12, 0)], "8.0;9.0+PTX"),
        ("8.0+PTX 9.0", [], "8.0+PTX;9.0+PTX"),
        ("Ampere;Hopper+PTX", [(9, 0)], "8.0;8.6;9.0+PTX"),
        ("Ampere+Tegra", [], "8.7+PTX"),
        ("Ampere+Tegra+PTX Volta", [], "7.0;8.7+PTX"),
        ("Blackwell", [], "10.0+PTX"),  # of which this nvcc knows no more
        ("Pascal", [], "6.0;6.1+PTX"),  # of which it knows none, and will say so
    ],
)
def test_architectures(explicit: str | None, visible: list, expected: str) -> None:
    codes = ["7.5", "8.0", "8.6", "9.0", "10.0"] if visible else ["7.5", "8.0", "9.0", "10.0"]
    assert ";".join(archs.select(explicit, visible, codes)) == expected


@pytest.mark.parametrize("bad", ["sm_90", "9", "9.0+SASS", "Pentium"])
def test_bad_architecture_is_named(bad: str) -> None:
    with pytest.raises(ValueError, match=rf"TORCH_CUDA_ARCH_LIST=.*'{bad.replace('+', '.')}'"):
        archs.parse(f"8.0;{bad}")


@pytest.mark.parametrize(
    ("built", "gpu", "runs"),
    [
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0+PTX"], (8, 9), False),
        (["9.0a"], (9, 0), True),
        (["9.0a+PTX"], (10, 0), False),
        (["7.5", "10.0+PTX"], (12, 0), True),
    ],
)
def test_coverage(built: list[str], gpu: tuple[int, int], runs: bool) -> None:
    assert archs.covers(built, gpu) is runs


@pytest.mark.parametrize(
    ("cpus", "memory", "explicit", "expected"),
    [
        (16, 7 * GIB, None, 2),
        (2, 64 * GIB, None, 2),
        (8, 1 * GIB, None, 1),
        (8, None, None, 8),
        (2, 1 * GIB, "6", 6),
        (4, 64 * GIB, " 2 ", 2),
        (4, 64 * GIB, "", 4),
    ],
)
def test_jobs(cpus: int, memory: int | None, explicit: str | None, expected: int) -> None:
    assert jobs.max_jobs(3 * GIB, cpus, memory, explicit) == expected


@pytest.mark.parametrize("nonsense", ["many", "0", "-1", "2.5", "2 3", "²"])
def test_nonsense_for_jobs_is_named(nonsense: str) -> None:
    with pytest.raises(ValueError, match=f"MAX_JOBS='{nonsense}': expected .* whole number"):
        jobs.max_jobs(3 * GIB, 4, None, nonsense)


def test_available_memory_is_within_the_machine() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = jobs.available_memory()
    assert memory is not None and 0 < memory <= physical
