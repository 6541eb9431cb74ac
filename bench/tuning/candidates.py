"""Which of a problem's plans are worth a GPU's time."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from ..cases.case import BenchCase
from .rows import forced_by

Candidate = dict[str, Any]  # as `_C.plan_candidates` gives them

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
# A plan that is predicted to take so many times the chosen one's cost takes a GPU's time from
# others, and no constant of the model is so far off.
HOPELESS = 4.0


def geometry(case: BenchCase) -> tuple[int, int, int]:
    """[n, c, s] as the planner sees the case's tensors."""
    n, c, *spatial = case.shape.sizes
    positions = math.prod(spatial)
    return (n * positions, c, 1) if case.layout == "nhwc" else (n, c, positions)


def identity(candidate: Candidate) -> tuple[Any, ...]:
    """As TuneRow.forced has it: with the splits that the planner chose, where it did. What it
    chooses changes with its constants.
    """
    return forced_by({**candidate["options"], "splits": candidate["splits"]})


def list_plans(
    extension: ModuleType,
    op: str,
    dtype: str,
    nchw: tuple[int, int, int],
    device: dict[str, Any],
    costs: dict[str, float] | None = None,
    options: dict[str, Any] | None = None,
) -> list[Candidate]:
    """All of a training pass on tensors of their own memory, or those that `options` leave."""
    problem = {"grad_output_shift": 0} if op == "backward" else {}
    problem |= options or {}
    return extension.plan_candidates(
        f"{op}_training", *nchw, DTYPES[dtype], device, problem, costs or {}
    )


def thin(candidates: list[Candidate], most: int) -> list[Candidate]:
    """At most about `most`, without the hopeless: of teams that differ in size alone, those go
    whose neighbours are nearest. The chosen plan and the automatic two passes stay.
    """
    chosen = next(each for each in candidates if each["chosen"])
    limit = HOPELESS * chosen["cost"]
    kept = [each for each in candidates if each["cost"] <= limit or _stays(each)]
    while len(kept) > most:
        sizes: dict[Any, list[int]] = {}
        for each in kept:
            sizes.setdefault(_family(each), []).append(_size(each))
        removable = [i for i, each in enumerate(kept) if not _stays(each)]
        if not removable:
            break
        gaps = {i: _gap(_size(kept[i]), sizes[_family(kept[i])]) for i in removable}
        del kept[min(gaps, key=lambda i: (gaps[i], -kept[i]["cost"]))]
    return kept


def _stays(candidate: Candidate) -> bool:
    automatic = candidate["options"]["strategy"] == "two_pass"
    return candidate["chosen"] or (automatic and "splits" not in candidate["options"])


def _family(candidate: Candidate) -> tuple[Any, ...]:
    options = candidate["options"]
    return tuple(options.get(name) for name in ("strategy", "pattern", "scope", "slab"))


def _size(candidate: Candidate) -> int:
    return candidate["options"].get("team_size", 0)


def _gap(own: int, sizes: list[int]) -> float:
    """The ratio between the next sizes on both sides; infinite at the ends."""
    below = [size for size in sizes if size < own]
    above = [size for size in sizes if size > own]
    return min(above) / max(below) if below and above else math.inf
