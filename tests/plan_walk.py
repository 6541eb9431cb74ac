"""The walk of the kernels over the tensor, restated in numpy from the description in csrc/plan.h.

It knows nothing of the planner's choices, nor does it share a line with csrc/traversal.cuh.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

WINDOW_BYTES = 16
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def elements_of(
    pattern: str, vec: int, t: dict[str, Any], c: int, s: int, numel: int, task: int
) -> np.ndarray:
    """The elements that one task of traversal t visits."""
    if c == 1:  # the samples of a single channel are one run
        s = numel
    lanes = np.arange(vec)
    work = t["rows"] * (t["row_windows"] if pattern == "along_s" else 1)
    split, block = divmod(task, t["channel_blocks"])
    units = np.arange(split * t["per_split"], min((split + 1) * t["per_split"], work))
    if pattern == "along_s":
        first = block * t["threads_y"]
        channels = np.arange(first, min(first + t["threads_y"], c))[:, None]
        run, column = np.divmod(units, t["row_windows"])
        start = (run * c + channels) * s
        offset = start + column * vec
        if not t["exact"]:
            offset += -(start + t["shift"]) % vec  # to the first boundary
        elements = offset[..., None] + lanes
        assert ((elements >= start[..., None]) & (elements < start[..., None] + s)).all()
        return np.concatenate([elements.ravel(), edges(t, vec, channels, c, s, split)])
    if pattern == "along_row" and not t["exact"] and t["segments"] > 0:
        # Whole channels of a sample; a unit is row_repeat samples.
        samples = (units[:, None] * t["row_repeat"] + np.arange(t["row_repeat"])).ravel()
        start = (samples[samples < numel // (c * s), None] * c + block * t["segments"]) * s
        run = min(t["segments"], c - block * t["segments"]) * s
        elements = start - start % vec + np.arange(t["threads_x"] * vec)
        return elements[(elements >= start) & (elements < start + run)]
    columns = block * t["threads_x"] + np.arange(t["threads_x"])
    columns = columns[columns < t["row_windows"]]
    windows = units[:, None] * t["row_windows"] + columns
    elements = windows[..., None] * vec + lanes - t["shift"]
    valid = (elements >= 0) & (elements < numel)
    assert valid.all() or not t["exact"]
    return elements[valid]


def edges(
    t: dict[str, Any], vec: int, channels: np.ndarray, c: int, s: int, split: int
) -> np.ndarray:
    """What the whole windows of a split's share of the runs leave at their ends."""
    runs = np.arange(split * t["edge_runs"], min((split + 1) * t["edge_runs"], t["rows"]))
    start = (runs * c + channels)[..., None] * s
    first = start + -(start + t["shift"]) % vec
    elements = start + np.arange(s)
    whole = (elements >= first) & (elements < first + t["row_windows"] * vec)
    return elements[~whole]


def covered(plan: dict[str, Any], t: dict[str, Any], c: int, s: int, numel: int) -> np.ndarray:
    """How often each element of the tensor is visited by the kernel that follows traversal t."""
    visits = np.zeros(numel, dtype=np.int64)
    for task in range(t["tasks"]):
        np.add.at(visits, elements_of(t["pattern"], plan["vec"], t, c, s, numel, task), 1)
    return visits


def team_tasks(team: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(group, task) of every block and round: teams take the channel groups in turn."""
    groups = team["traversal"]["channel_blocks"]
    for block in range(team["grid"]):
        number, rank = divmod(block, team["size"])
        for group in range(number, groups, team["teams"]):
            yield group, rank * groups + group
