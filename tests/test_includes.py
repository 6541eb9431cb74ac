"""What the C++ files include: the headers that take seconds to compile, where they are needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from batchnorm_cuda import _sources

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)

# By the beginning of a header's name: the files that may reach it.
ALLOWED = {
    "pybind11/": {"bindings.cpp", "host_bindings.cpp"},
    "torch/": {"bindings.cpp"},
    "ATen/ops/": {"tensors.cpp"},
    "c10/cuda/": {"device_context.cpp"},
}
SOURCES = sorted({*_sources.cuda_sources(), *_sources.emulated_cpp_sources()})


def reached(source: Path) -> set[str]:
    """The headers that a source includes, itself or through a header of ours."""
    names: set[str] = set()
    pending = [source]
    while pending:
        new = set(INCLUDE.findall(pending.pop().read_text())) - names
        names |= new
        pending += [path for name in new if (path := _sources.csrc_dir() / name).is_file()]
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_expensive_headers_stay_where_they_are_needed(source: Path) -> None:
    found = {
        (header, prefix)
        for header in reached(source)
        for prefix, files in ALLOWED.items()
        if header.startswith(prefix) and source.name not in files
    }
    assert not found


@pytest.mark.parametrize("source", [path for path in SOURCES if path.name.startswith("plan")])
def test_plans_need_no_torch(source: Path) -> None:
    assert not {name for name in reached(source) if name.startswith(("ATen/", "c10/", "torch/"))}
