"""Every kernel instance that is compiled is one that some problem leads to, and no other is."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from bench import reach
from bench.machine_code import instances

# Found by `python -m bench reach`: with all operations, forms and dtypes, these lead to every
# instance. Some are rare.
PROBLEMS = [
    ("rtx5090", (2, 3, 1)),
    ("t4", (285, 16, 88)),
    ("t4", (480, 1024, 1)),
    ("t4", (783, 2048, 1)),
    ("h100", (87, 1091, 11)),
    ("a100", (784000, 3, 1)),
    ("a100", (1880, 2, 1113)),
    ("l40s", (71, 1, 55336)),
    ("h100", (1322, 1011, 5)),
    ("h100", (256, 1024, 7)),
    ("b200", (1161, 182, 55)),
    ("b200", (7200, 2048, 1)),
    ("b200", (8192, 2048, 1)),
    ("b200", (4096, 2048, 2)),
    ("rtx5090", (2849, 110, 89)),
    ("rtx4090", (1966080, 2, 1)),
    ("rtx4090", (2039210, 4, 1)),
    ("rtx4090", (1237, 18, 1784)),
    ("h100 without grids", (3831, 15, 177)),
    ("h100 without grids", (65536, 8, 7)),
    ("h100 without grids", (4096, 65, 196)),
    ("h100 without grids", (32, 65, 12544)),
    ("rtx4090", (32, 1, 2**24)),
    ("rtx5090", (2**19, 4096, 1)),
    ("b200", (2**30, 2, 1)),
]


def reached(extension: ModuleType) -> set[str]:
    described = reach.described()
    found = set()
    for device, sizes in PROBLEMS:
        for problem in reach.problems_of(sizes):
            found |= reach.launched(problem.plan(extension, described[device]), problem)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the host model, which has all in one")
def test_what_is_compiled_is_what_is_reached(extension: ModuleType) -> None:
    library = sys.modules[extension.__name__].__file__
    compiled, _ = instances.compiled([str(library)])
    unplanned = reach.FIXED
    assert compiled >= unplanned
    found = reached(extension)
    assert found.isdisjoint(unplanned)
    assert sorted(compiled - unplanned - found) == []
    assert sorted(found - compiled) == []
