"""Tests that an older torch cannot pass, for reasons of its own; `make versions` found them.

Marked as expected to fail, strictly: a row that no longer holds fails the suite of that torch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Known:
    until: tuple[int, int]  # the last version that was seen to fail
    test: str
    reason: str
    only: str = ""  # part of the parameters
    passes_on: tuple[int, int] | None = None  # a version of Python, whatever the torch

    def holds_for(self, item: pytest.Item, version: tuple[int, int]) -> bool:
        test, _, parameters = item.name.partition("[")
        concerned = test == self.test and self.only in parameters
        return version <= self.until and concerned and sys.version_info[:2] != self.passes_on


_FX = "torch.fx cannot pickle a graph whose annotations are strings"
_NO_STATISTICS = "torch.export fails for modules without running statistics"
_UNTRACKED = "'track_running_stats': False"

KNOWN = (
    Known((2, 13), "test_fx_keeps_modules_as_leaves", _FX, passes_on=(3, 11)),
    Known((2, 13), "test_symbolic_trace_of_the_function", _FX, passes_on=(3, 11)),
    Known((2, 9), "test_module_errors", "this torch has no wrong inputs for modules to try"),
    Known(
        (2, 6),
        "test_environment_is_not_guarded",
        "a change of the environment compiles a compiled function again",
    ),
    Known((2, 6), "test_export", _NO_STATISTICS, only=_UNTRACKED),
    Known((2, 6), "test_exported_program_trains", _NO_STATISTICS, only=_UNTRACKED),
    Known((2, 6), "test_strict_export", "torch.export(strict=True) fails", only="emulated"),
    Known(
        (2, 6),
        "test_export_says_what_is_updated",
        "exported programs cannot update buffers on the CPU",
        only="aten",
    ),
)


def mark(items: list[pytest.Item]) -> None:
    major, minor = torch.__version__.split(".")[:2]
    for item in items:
        for known in KNOWN:
            if known.holds_for(item, (int(major), int(minor))):
                item.add_marker(pytest.mark.xfail(reason=known.reason, strict=True))
