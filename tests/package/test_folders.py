"""Folders of any name: blanks, quotes, parentheses, ampersands, letters beyond ASCII."""

from __future__ import annotations

import os
import re
import shutil
import sys
import venv
from pathlib import Path

import pytest
import torch
from fake_toolkit import make_linkable_toolkit, make_toolkit, make_wrapper, write_program
from toy import VALUE, toy_recipe

from batchnorm_cuda._build import builder, recipes, sources
from batchnorm_cuda._build.compile import BuildError, Recipe
from batchnorm_cuda._build.kernels import KernelRecipe
from batchnorm_cuda._build.toolkit import resolve_toolkit

NAME = """it's a "größe" (more) & more"""
TOOLKIT = "the toolkit"
PLACES = ["sources", "cache", "checkout", "python", TOOLKIT, "compiler"]


def python_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter and site-packages whose paths lead through `folder`."""
    venv.create(folder / "venv", symlinks=True)
    monkeypatch.setattr(sys, "executable", str(folder / "venv" / "bin" / "python"))
    packages = Path(torch.__file__).parent.parent
    (folder / "packages").symlink_to(packages)
    here = [entry for entry in sys.path if Path(entry) != packages]
    monkeypatch.setattr(sys, "path", [str(folder / "packages"), *here])


def recipe_of(toy: Path, toolkit: Path | None) -> Recipe:
    """The toy with a `.cu` file compiled as C++, and linked with the toolkit's library if any."""
    recipe = toy_recipe(toy)
    device = toy / "device.cu"
    device.write_text("int of_the_device() { return 1; }\n")
    kernels = KernelRecipe(
        table="emulated",
        label="toy kernels",
        sources=[device],
        key={},
        job_bytes=1 << 20,
        compiler=[os.environ.get("CXX", "c++"), "-fPIC", "-x", "c++"],
        include_dirs=[toy],
        lines=True,
    )
    options = {"kernels": kernels, "include_dirs": [toy]}
    if toolkit:
        environment = {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "8.0"}
        options |= {"with_cuda": True, "environment": environment}
    return Recipe("toy", "a toy", recipe.sources, recipe.key, 1 << 20, **options)


@pytest.mark.parametrize("places", [*([place] for place in PLACES), PLACES], ids=", ".join)
def test_a_build_in_folders_of_any_name(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: list[str]
) -> None:
    if TOOLKIT in places and not torch.version.cuda:
        pytest.skip("torch's loader needs a build of torch with CUDA to look at a toolkit")
    odd = tmp_path / NAME
    odd.mkdir()
    toolkit = make_linkable_toolkit(odd / "cuda") if TOOLKIT in places else None
    if "sources" in places:
        toy = toy.rename(odd / "sources")
    if "cache" in places:
        monkeypatch.setenv("BATCHNORM_CUDA_CACHE_DIR", str(odd / "cache"))
    if "checkout" in places:
        monkeypatch.setattr(sources, "path_maps", lambda: [f"-ffile-prefix-map={odd}/="])
    if "python" in places:
        python_below(odd, monkeypatch)
    if "compiler" in places:
        script = f'#!/bin/sh\nexec {shutil.which("c++")} "$@"\n'
        monkeypatch.setenv("CXX", str(write_program(odd / "bin" / "c++", script)))
    assert builder.build(recipe_of(toy, toolkit)).exists()
    if "cache" in places:  # an object of an earlier build is linked
        (toy / "toy_value.cpp").write_text(VALUE.replace("42", "43"))
        assert builder.build(recipe_of(toy, toolkit)).exists()


def kernels_of(folder: Path, toolkit: Path) -> KernelRecipe:
    source = folder / "kernels.cu"
    source.write_text("int of_the_device() { return 1; }\n")
    return KernelRecipe(
        table="toy",
        label="toy kernels",
        sources=[source],
        key={},
        job_bytes=1 << 20,
        compiler=[str(toolkit / "bin" / "nvcc")],
        linker=["c++", "-shared"],
        libraries=[],
    )


@pytest.mark.parametrize("place", ["sources", TOOLKIT])
def test_what_nvcc_itself_does_not_take_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("BATCHNORM_CUDA_CACHE_DIR", str(tmp_path / "cache"))
    odd = tmp_path / NAME
    odd.mkdir()
    toolkit = make_toolkit((odd if place == TOOLKIT else tmp_path) / "cuda")
    with pytest.raises(BuildError, match=f"nvcc takes no double quote.*: {re.escape(str(odd))}.*"):
        builder.build(kernels_of(odd if place == "sources" else tmp_path, toolkit))


def test_a_toolkit_in_a_folder_of_any_name_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_toolkit(tmp_path / NAME / "cuda", libcudart="lib/libcudart.so.13")
    for variable in ("CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    wrapper = make_wrapper(tmp_path / f"path of {NAME}" / "nvcc", home)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert resolve_toolkit("13.0").home == home
    assert recipes.cuda_recipe().environment["CUDA_HOME"] == str(home)
