"""The kernels as shared objects: built by the recipe's own ninja file, loaded when first needed."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from fake_toolkit import write_program
from simt_build import CSRC

from batchnorm_cuda._build import builder
from batchnorm_cuda._build import extension as _extension
from batchnorm_cuda._build.compile import BuildError
from batchnorm_cuda._build.kernels import KernelRecipe
from batchnorm_cuda._build.sources import compiled_text

# Asks for tables, each time a line is read, and prints what they answer.
PROGRAM = r"""
#include <iostream>
#include "kernel_table.h"

namespace bn = batchnorm_cuda;

int main(int, char** argv) {
  std::string table;
  while (std::cin >> table) {
    try {
      if (table == "set") {
        bn::set_kernel_loader([argv](const std::string& name) {
          std::cout << "loads " << name << ", ";
          return std::string(argv[1]) + "/kernels_" + name + ".so";
        });
      } else if (table == "half") {
        std::cout << bn::kernels<__half>().team_forward({}, nullptr) << std::endl;
      } else {
        std::cout << bn::kernels<float>().team_forward({}, nullptr) << std::endl;
      }
    } catch (const std::runtime_error& error) {
      std::cout << error.what() << std::endl;
    }
  }
}
"""
TABLE = r"""
#include "kernel_table.h"
namespace bn = batchnorm_cuda;
BATCHNORM_CUDA_EXPORT const void* batchnorm_cuda_kernels_half() {
  static bn::KernelTable<__half> table{};
  table.team_forward = [](const auto&, cudaStream_t) { return 42; };
  return &table;
}
"""


def test_a_table_is_loaded_once_when_it_is_first_needed(tmp_path: Path) -> None:
    (tmp_path / "program.cpp").write_text(PROGRAM)
    (tmp_path / "table.cpp").write_text(TABLE)
    common = ["g++", "-std=c++17", f"-I{CSRC}", "-fPIC", "-fvisibility=hidden"]
    library = ["-shared", "-o", "kernels_half.so", "table.cpp"]
    subprocess.run([*common, *library], cwd=tmp_path, check=True)
    subprocess.run([*common, "-shared", "-o", "kernels_float.so", "table.cpp"], cwd=tmp_path)
    sources = ["program.cpp", str(CSRC / "kernel_loading.cpp")]
    subprocess.run([*common, "-o", "program", *sources, "-ldl"], cwd=tmp_path, check=True)
    done = subprocess.run(
        ["./program", str(tmp_path)],
        input="half set half half float\n",
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    missing, first, second, wrong = done.stdout.splitlines()
    assert "the kernels of half are not linked into this module" in missing
    assert first == "loads half, 42"
    assert second == "42"
    path = tmp_path / "kernels_float.so"
    assert wrong.endswith(f"{path} does not define batchnorm_cuda_kernels_float")


def test_linked_tables_need_no_loader(extension: ModuleType) -> None:
    if extension.__name__.endswith("_emulated"):
        loader = pytest.fail
        extension.set_kernel_loader(loader)
        assert extension.device_info()["sm_count"] > 0


# ------------------------------------------------------------------------------ the build

KERNEL = '#include "value.h"\nextern "C" int value() { return VALUE; }  // 2 files\n'


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel and its header, an nvcc that is the C++ compiler, and an empty cache."""
    monkeypatch.setenv("BATCHNORM_CUDA_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "it's (a) größe & more: $HOME"
    folder.mkdir()
    (folder / "toy.cu").write_text(KERNEL)
    (folder / "more.cu").write_text('extern "C" int more() { return 1; }\n')
    (folder / "value.h").write_text("#define VALUE 42\n")
    log = folder / "compiled"
    script = '#!/bin/sh\ncd "$PWD"\nfor word; do case "$word" in *.cu) echo "$word" >> '
    script += f'"{str(log).replace("$", chr(92) + "$")}" ;; esac; done\nexec c++ "$@"\n'
    write_program(folder / "nvcc", script)
    return folder


def recipe_of(folder: Path, table: str = "toy", **key: str) -> KernelRecipe:
    return KernelRecipe(
        table=table,
        label="toy kernels",
        sources=[folder / "toy.cu", folder / "more.cu"],
        key={"cuda": "13.0", "archs": "9.0", **key},
        job_bytes=1 << 20,
        compiler=[str(folder / "nvcc"), "-x", "c++", "-fPIC"],
        linker=["c++", "-shared"],
        libraries=[],
    )


def compiled(folder: Path) -> int:
    log = folder / "compiled"
    return len(log.read_text().splitlines()) if log.exists() else 0


def value_of(path: Path) -> int:
    return ctypes.CDLL(str(path)).value()


def test_what_an_edit_reaches_is_compiled_again_and_a_comment_is_no_edit(toy: Path) -> None:
    first = builder.build(recipe_of(toy))
    assert value_of(first) == 42 and compiled(toy) == 2
    (toy / "value.h").write_text("// said\n#define VALUE /* twice */ 42\n")
    assert builder.build(recipe_of(toy)) == first and compiled(toy) == 2
    (toy / "value.h").write_text("#define VALUE 43\n")
    second = builder.build(recipe_of(toy))
    assert value_of(second) == 43 and compiled(toy) == 3


def test_tables_share_objects(toy: Path) -> None:
    paths = builder.build_kernels([recipe_of(toy), recipe_of(toy, "other")])
    assert [value_of(path) for path in paths] == [42, 42]
    assert compiled(toy) == 2
    assert [path.name for path in paths] == ["kernels_toy.so", "kernels_other.so"]


def test_compilers_of_a_killed_build_write_nowhere_else(toy: Path, tmp_path: Path) -> None:
    """Their folder is not that of the next build, in which half an object would pass for whole."""
    builder.build_kernels([recipe_of(toy)])
    left = os.open(tmp_path / "cache" / builder.KERNELS, os.O_RDONLY)
    (toy / "value.h").write_text("#define VALUE 43\n")
    builder.build_kernels([recipe_of(toy)])
    assert os.fstat(left).st_ino != (tmp_path / "cache" / builder.KERNELS).stat().st_ino
    os.close(left)
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


@pytest.mark.parametrize("name", ["cuda", "archs", "compiler", "flags"])
def test_all_that_matters_is_in_the_key(toy: Path, name: str) -> None:
    plain, changed = recipe_of(toy), recipe_of(toy, **{name: "another"})
    assert plain.folder != changed.folder
    source = toy / "more.cu"
    assert plain.object_name(source) != changed.object_name(source)


def test_failure_quotes_the_compiler_and_keeps_the_other_objects(toy: Path) -> None:
    (toy / "toy.cu").write_text('extern "C" int value() { return forty_two; }\n')
    with pytest.raises(BuildError, match=r"compiling toy kernels failed.*\n.*forty_two"):
        builder.build(recipe_of(toy))
    before = compiled(toy)
    (toy / "toy.cu").write_text(KERNEL)
    assert value_of(builder.build(recipe_of(toy))) == 42
    assert compiled(toy) <= before + 2


def test_kernels_come_from_the_cache_or_the_installation(
    toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_extension, "_info", {})
    monkeypatch.setattr(_extension.recipes, "kernel_recipe", lambda table: recipe_of(toy, table))
    path = _extension._kernels_just_in_time("half")
    assert value_of(Path(path)) == 42
    assert _extension.build_info()["loaded"]["kernels_half"]["origin"] == "just in time"
    monkeypatch.setattr(_extension, "_AOT_RECORD", tmp_path / "_aot.json")
    assert _extension._kernels_ahead_of_time("half") == str(tmp_path / "kernels_half.so")
    assert _extension.build_info()["loaded"]["kernels_half"]["origin"] == "ahead of time"


# ------------------------------------------------------------------------------ the keys


@pytest.mark.parametrize(
    ("text", "compiled"),
    [
        ("int a;  // one\n\n\nint b;\n", "int a;\nint b;"),
        ("  int /* in\nthe midst */  a ;", "int a ;"),
        ('auto s = "// none";  // one', 'auto s = "// none";'),
        ("char c = '\"';  // one\nint d;", "char c = '\"';\nint d;"),
        ('R"(/* none */)" /* one */', 'R"(/* none */)"'),
        ("int n = 1'000'000;  // one", "int n = 1'000'000;"),
        (r'"a\"// none" // one', r'"a\"// none"'),
    ],
)
def test_compiled_text(text: str, compiled: str) -> None:
    assert compiled_text(text.encode(), lines=False).decode() == compiled


def test_lines_keep_their_numbers_where_they_are_named() -> None:
    text = b"// one\nint a; /* two\nthree */\nint b;\n// end\n"
    assert compiled_text(text, lines=True) == b"\nint a;\n\nint b;"
