"""Who may include whom: the folders of csrc/, and the headers that take seconds to compile."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from batchnorm_cuda import _sources

CSRC = _sources.csrc_dir()
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"][^">]+)[">]', re.MULTILINE)
SOURCES = sorted({*_sources.cuda_sources(), *_sources.emulated_cpp_sources()})
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
    "torch/": {"bindings.cpp"},
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
    if not _sources.in_checkout():
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
