"""Who may include or import whom: the folders of csrc/, the headers that take seconds to compile,
the package's modules, and the benchmark's.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import batchnorm_cuda
from batchnorm_cuda._build import sources

CSRC = sources.csrc_dir()
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"][^">]+)[">]', re.MULTILINE)
SOURCES = sorted({*sources.cuda_sources(), *sources.emulated_cpp_sources()})
FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h"))

TORCH = ("ATen/", "c10/", "pybind11/", "torch/")
CUDA = ("cooperative_groups", "cuda")
HOST_MODEL = "simt.h"  # platform.cuh, where it is compiled for the host model

# By folder, "" for csrc/ itself: what its files may include of the others, and the beginnings of
# headers that they may not.
ROOMS = {
    "": (("geometry.h", "plan/plan.h"), TORCH),
    "plan": (("geometry.h",), TORCH + CUDA),
    "kernels": (("geometry.h", "kernel_table.h", "launch.h", "params.h", "rank_params.h"), TORCH),
    "torch": (("*.h", "plan/*.h"), CUDA),
}

# By the beginning of a header's name: the files that may reach it.
EXPENSIVE = {
    "pybind11/": {"bindings.cpp", "host_bindings.cpp"},
    "torch/": {"bindings.cpp", "recorded.cpp"},
    "ATen/ops/": {"tensors.cpp"},
    "c10/cuda/": {"device_context.cpp"},
}


def includes(path: Path) -> tuple[set[Path], set[str]]:
    """The files of ours that a file includes, and the names of all other headers."""
    ours, others = set(), set()
    for word in INCLUDE.findall(path.read_text()):
        name = word[1:]
        # The host model's own build names files from csrc/.
        found = [place for place in (path.parent / name, CSRC / name) if place.is_file()]
        if word[0] == '"' and found:
            ours.add(found[0].resolve())
        else:
            others.add(name)
    return ours, others


def reached(source: Path) -> set[str]:
    """The headers of others that a source includes, itself or through files of ours."""
    names: set[str] = set()
    seen, pending = set(), [source.resolve()]
    while pending:
        path = pending.pop()
        seen.add(path)
        ours, others = includes(path)
        names |= others
        pending += ours - seen
    return names


def room(path: Path) -> str:
    return "" if path.parent == CSRC else str(path.parent.relative_to(CSRC))


def named(path: Path) -> str:
    return str(path.relative_to(path.parents[1]))


def test_the_rooms_are_these() -> None:
    assert {room(path) for path in FILES} == ROOMS.keys()
    stems = Counter(path.stem for path in FILES if path.suffix in (".cpp", ".cu"))
    assert max(stems.values()) == 1, stems.most_common(3)  # objects are named by it


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_includes_what_its_room_may(path: Path) -> None:
    allowed, forbidden = ROOMS[room(path)]
    ours, others = includes(path)
    elsewhere = {p.relative_to(CSRC) for p in ours if p.parent != path.parent}
    assert not {str(p) for p in elsewhere if not any(fits(p, pattern) for pattern in allowed)}
    assert not {name for name in others if name.startswith(forbidden)}


def fits(path: Path, pattern: str) -> bool:
    """As a whole, where Path.match compares the last parts alone."""
    return path.parent == Path(pattern).parent and path.match(pattern)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_csrc_compiles_without_an_include_path(path: Path) -> None:
    quoted = {word[1:] for word in INCLUDE.findall(path.read_text()) if word[0] == '"'}
    assert not {name for name in quoted - {HOST_MODEL} if not (path.parent / name).is_file()}


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".h"], ids=named)
def test_headers_of_host_code_need_no_cuda(path: Path) -> None:
    assert not {name for name in reached(path) if name.startswith(CUDA)}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_has_a_page(name: str) -> None:
    if not sources.in_checkout():
        pytest.skip("an installed package has sources alone")
    lines = (CSRC / name / "README.md").read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) > 3


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_expensive_headers_stay_where_they_are_needed(source: Path) -> None:
    found = {
        (header, prefix)
        for header in reached(source)
        for prefix, files in EXPENSIVE.items()
        if header.startswith(prefix) and source.name not in files
    }
    assert not found


# -------------------------------------------------------------------------------- the package

PACKAGE = Path(batchnorm_cuda.__file__).parent
PRIVATE = ("_build", "_explain", "_fusion", "_models", "_ops")
WITHOUT_TORCH = {"archs", "builder", "compile", "jobs", "kernels", "sources", "toolkit", "trust"}
ALONE = {"archs", "jobs", "sources", "toolkit", "trust"}  # of setup.py, the Makefile and the bench


def modules_of(folder: Path) -> dict[str, Path]:
    """By name: "_build.toolkit", "functional", and "" for the package itself."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules_of(PACKAGE)


def imported(name: str, text: str, modules: dict[str, Path]) -> tuple[set[str], set[str]]:
    """What a module imports, anywhere in it: modules of its package, and the others by their first
    name. "from . import x" is the module x.
    """
    ours, others = set(), set()
    package = name.split(".") if modules[name].stem == "__init__" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            others.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1], node.module or "")
            for alias in node.names:
                whole = ".".join(part for part in (*base, alias.name) if part)
                ours.add(whole if whole in modules else whole.rpartition(".")[0])
    return ours, others


def imports_of(modules: dict[str, Path]) -> dict[str, tuple[set[str], set[str]]]:
    return {name: imported(name, path.read_text(), modules) for name, path in modules.items()}


IMPORTS = imports_of(MODULES)
OURS = {name: ours for name, (ours, _) in IMPORTS.items()}


def room_of(name: str) -> str:
    return name.partition(".")[0] if name.startswith(PRIVATE) else ""


def test_every_import_of_the_package_is_seen() -> None:
    text = (
        "from . import convert\nfrom ._build import extension\nfrom ._version import __version__\n"
    )
    assert imported("sync", text, MODULES)[0] == {"convert", "_build.extension", "_version"}
    text = "from .. import devices\nfrom .explanation import Cost\nimport torch.nn\n"
    expected = ({"devices", "_explain.explanation"}, {"torch"})
    assert imported("_explain.explain", text, MODULES) == expected
    assert OURS[""] >= {"functional", "_build.extension", "_explain.explain"}


@pytest.mark.parametrize("name", MODULES)
def test_nobody_imports_the_compiled_module_by_name(name: str) -> None:
    """It is there or built: `_build/extension.py` gives it."""
    text = MODULES[name].read_text()
    assert not re.search(r"^\s*(from|import)\b.*\b_C(_emulated)?\b", text, re.MULTILINE)
    assert "batchnorm_cuda" not in IMPORTS[name][1]  # by its own name, it would not be seen above


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "_build"])
def test_building_needs_no_operators_and_mostly_no_torch(name: str) -> None:
    ours, others = IMPORTS[name]
    stem = name.removeprefix("_build").lstrip(".")
    assert {each for each in ours if room_of(each) != "_build"} <= {"_version"}
    if stem in WITHOUT_TORCH or not stem:
        assert "torch" not in others
        assert {each.rpartition(".")[2] for each in ours} <= WITHOUT_TORCH | {"_version"}
    if stem in ALONE or not stem:
        assert not ours


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "_explain"])
def test_explaining_asks_for_little(name: str) -> None:
    asked = {"_explain.explain": {"_build.extension", "_ops.layout", "devices", "functional"}}
    assert {each for each in OURS[name] if room_of(each) != "_explain"} <= asked.get(name, set())
    if name != "_explain.explain":
        assert "torch" not in IMPORTS[name][1]


@pytest.mark.parametrize("name", [name for name in MODULES if not room_of(name)])
def test_private_rooms_have_one_door_each(name: str) -> None:
    behind = {each for each in OURS[name] if room_of(each) in ("_build", "_explain")}
    front = {"_explain.explain", "_explain.explanation"} if not name else set()
    assert behind <= {"_build.extension"} | front


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "_ops"])
def test_operators_know_nothing_of_what_calls_them(name: str) -> None:
    assert {each for each in OURS[name] if room_of(each) != "_ops"} <= {"_build.extension"}


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "_models"])
def test_whole_models_are_above_the_modules(name: str) -> None:
    allowed = {"modules", "convert", "sync", "_ops.choice"}
    elsewhere = {each for each in OURS[name] if room_of(each) not in ("_fusion", "_models")}
    assert elsewhere <= allowed


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "_fusion"])
def test_what_waits_is_below_the_modules(name: str) -> None:
    allowed = {"_ops.activations", "_ops.calls", "_ops.choice"}
    assert {each for each in OURS[name] if room_of(each) != "_fusion"} <= allowed


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_package_says_what_lives_there(name: str) -> None:
    check_page(MODULES[name])


def check_page(init: Path) -> None:
    """What is imported with a package takes time, and may not be there."""
    tree = ast.parse(init.read_text())
    words = ast.get_docstring(tree) or ""
    assert "May import:" in words and "Must not import:" in words
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


# ------------------------------------------------------------------------------ the benchmark

BENCH = Path(__file__).parents[2] / "bench"
BENCH_MODULES = modules_of(BENCH)
BENCH_IMPORTS = imports_of(BENCH_MODULES)
SHARED = {"environment", "loading", "toolkit"}  # at the top of bench, beside the commands
# What of bench a room may import, beside itself.
BENCH_ROOMS: dict[str, set[str]] = {
    "rows": set(),
    "models": set(),
    "pages": {"rows"},
    "machine_code": {"loading", "toolkit"},
    "cases": {"models", "rows"},
    "timing": {"cases", "models", "rows", *SHARED},
    "tuning": {"cases", "rows", "timing"},
    "gpu": {"models", "rows", "timing", *SHARED},
}
BENCH_WITHOUT_TORCH = {"rows", "pages", "machine_code"}
IN_ROOMS = [name for name in BENCH_MODULES if name.split(".")[0] in BENCH_ROOMS]


@pytest.mark.parametrize("name", IN_ROOMS)
def test_a_room_of_the_benchmark_imports_what_it_may(name: str) -> None:
    room = name.split(".")[0]
    ours, others = BENCH_IMPORTS[name]
    assert {each.split(".")[0] for each in ours} <= {room, *BENCH_ROOMS[room]}
    if room in BENCH_WITHOUT_TORCH:
        assert not others & {"torch", "batchnorm_cuda"}


@pytest.mark.parametrize("room", BENCH_ROOMS)
def test_a_room_of_the_benchmark_says_what_lives_there(room: str) -> None:
    check_page(BENCH / room / "__init__.py")


def test_at_the_top_of_the_benchmark_are_its_commands() -> None:
    own = {"", "__main__", "model", "options", "runner", "visit"}
    top = {name for name in BENCH_MODULES if "." not in name} - own - SHARED - BENCH_ROOMS.keys()
    assert not {name for name in top if "def main(" not in BENCH_MODULES[name].read_text()}
