"""The walk of the kernels over the tensor, restated in numpy from what csrc/geometry.h says.

It knows nothing of the planner's choices, nor does it share a line with csrc/kernels/traversal.cuh.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

WINDOW_BYTES = 16
Part = tuple[int, int, int]  # channel block, first unit, the one behind the last
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def elements_of(
    pattern: str, vec: int, t: dict[str, Any], c: int, s: int, numel: int, part: Part
) -> np.ndarray:
    """The elements that one part of traversal t visits: some units of a channel block."""
    if c == 1:  # the samples of a single channel are one run
        s = numel
    lanes = np.arange(vec)
    block, first, end = part
    units = np.arange(first, end)
    if pattern == "along_s":
        first = block * t["threads_y"]
        channels = np.arange(first, min(first + t["threads_y"], c))[:, None]
        ends = edges(t, vec, channels, c, s, units)
        if t["row_windows"] == 0:  # runs without whole windows
            return ends
        run, column = np.divmod(units, t["row_windows"])
        start = (run * c + channels) * s
        offset = start + column * vec
        if not t["exact"]:
            offset += -(start + t["shift"]) % vec  # to the first boundary
        elements = offset[..., None] + lanes
        assert ((elements >= start[..., None]) & (elements < start[..., None] + s)).all()
        return np.concatenate([elements.ravel(), ends])
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
    t: dict[str, Any], vec: int, channels: np.ndarray, c: int, s: int, units: np.ndarray
) -> np.ndarray:
    """What the whole windows leave at the ends of the runs that begin with one of these units."""
    per_run = max(t["row_windows"], 1)
    runs = units[units % per_run == 0] // per_run
    start = (runs * c + channels)[..., None] * s
    first = start + -(start + t["shift"]) % vec
    elements = start + np.arange(s)
    whole = (elements >= first) & (elements < first + t["row_windows"] * vec)
    return elements[~whole]


def covered(plan: dict[str, Any], t: dict[str, Any], c: int, s: int, numel: int) -> np.ndarray:
    """How often each element of the tensor is visited by the kernel that follows traversal t."""
    parts = itertools.chain.from_iterable(stretches(t))
    elements = [elements_of(t["pattern"], plan["vec"], t, c, s, numel, part) for part in parts]
    return np.bincount(np.concatenate(elements).astype(np.int64), minlength=numel)


def stretches(t: dict[str, Any]) -> Iterator[list[Part]]:
    """The parts of every block of a stage kernel: an even share of all units, cut where a channel
    block ends.
    """
    units = t["channel_blocks"] * t["work"]
    for block in range(t["grid"]):
        first, end = (number * units // t["grid"] for number in (block, block + 1))
        blocks = range(first // t["work"], -(-end // t["work"]))
        yield [
            (b, max(first - b * t["work"], 0), min(end - b * t["work"], t["work"])) for b in blocks
        ]


def team_parts(team: dict[str, Any]) -> Iterator[Part]:
    """Of every block and round: teams take the channel groups in turn."""
    t = team["traversal"]
    for block in range(team["grid"]):
        number, rank = divmod(block, team["size"])
        first = rank * t["per_split"]
        for group in range(number, t["channel_blocks"], team["teams"]):
            yield group, first, min(first + t["per_split"], t["work"])
