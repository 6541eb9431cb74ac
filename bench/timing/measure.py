"""Checks and times one case: a row for each provider, also for those that cannot take part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cases.case import BenchCase
from ..models import byte_model
from ..rows.results import FAILED, INACCURATE, UNSUPPORTED, Row
from .check import MOST_ELEMENTS, Expected, error, expect
from .clock import CACHES, Call, measure, rotation
from .machine import Machine
from .providers import COPY, Tensors, make, missing
from .samples import Spread
from .steps import copy_of, make_call, make_copy, make_tensors, own_statistics, run_once

# x, dy, output and gradient of each set, and as much again that providers keep.
_TENSORS_PER_SET = 8


@dataclass
class Entry:
    """A provider in one case: what its row will say, and the calls to time if there are any."""

    values: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)


class CheckCache:
    """The expected results of the last inputs: the operations of a shape share them."""

    def __init__(self, most: int = MOST_ELEMENTS) -> None:
        self._most = most  # elements that are compared
        self._key: object = None
        self._expected: Expected | None = None

    def get(self, case: BenchCase, tensors: Tensors) -> Expected:
        key = (case.shape.sizes, case.layout, case.dtype)
        if self._expected is None or key != self._key:
            self._key, self._expected = key, expect(tensors, self._most)
        return self._expected


def rows(
    case: BenchCase,
    names: Sequence[str],
    machine: Machine,
    *,
    seconds: float,
    peer_tolerance: float,
    cache: CheckCache,
) -> Iterator[Row]:
    for group in _groups(case, names, machine):
        with machine.scope():
            try:
                entries, fill = _prepare(case, group, machine, peer_tolerance, cache)
                calls = {name: entry.calls for name, entry in entries.items() if entry.calls}
                spreads = measure(calls, machine.clock(fill), seconds)
            except (RuntimeError, MemoryError) as reason:  # CUDA's out of memory is the former
                entries = {name: Entry(_failure(reason)) for name in group}
                spreads = {}
            for name, entry in entries.items():
                if name != COPY or group[0] == names[0]:
                    times = _times(case, name, spreads)
                    yield case.row(name, machine.name, **entry.values, **times)
            entries, calls = {}, {}
        machine.release()


def _groups(case: BenchCase, names: Sequence[str], machine: Machine) -> list[list[str]]:
    """All in turns, or where they do not fit the memory together, each in turns with the copy."""
    if _TENSORS_PER_SET * case.nbytes * len(names) <= machine.memory_bytes:
        return [list(names)]
    others = [name for name in names if name != COPY] or [COPY]
    return [[name, COPY] if COPY in names and name != COPY else [name] for name in others]


def _prepare(
    case: BenchCase,
    names: Sequence[str],
    machine: Machine,
    peer_tolerance: float,
    cache: CheckCache,
) -> tuple[dict[str, Entry], bool]:
    """An entry for each provider, and whether the clock has to fill the cache."""
    first = make_tensors(case, machine.device, seed=0)
    count, fill = rotation(2 * case.nbytes, machine.l2_bytes)
    affordable = machine.memory_bytes // (_TENSORS_PER_SET * case.nbytes)
    sets = [first] + [copy_of(first) for _ in range(max(1, min(count, affordable)) - 1)]
    expected = cache.get(case, first)
    entries = {}
    for name in names:
        try:
            if name == COPY:
                # Large ones follow each other through the cache, and memory may be short.
                large = case.compulsory_bytes >= CACHES * machine.l2_bytes
                copies = [make_copy(case, machine.device) for _ in sets[: 1 if large else None]]
                calls, method, why = captured(copies, machine)
                values = {"backend": "device to device copy", "method": method, "note": why}
                entries[name] = Entry(values, calls)
            else:
                entries[name] = _entry(case, name, sets, expected, machine, peer_tolerance)
        except (RuntimeError, ImportError, TypeError, ValueError) as reason:
            entries[name] = Entry(_failure(reason))
    return entries, fill


def _entry(
    case: BenchCase,
    name: str,
    sets: list[Tensors],
    expected: Expected,
    machine: Machine,
    peer_tolerance: float,
) -> Entry:
    absent = missing(name)
    if absent is not None:
        return Entry({"status": UNSUPPORTED, "note": absent})
    provider = make(name, machine.device)
    reason = provider.why_not(case, sets[0])
    if reason is not None:
        return Entry({"status": UNSUPPORTED, "note": reason})
    values: dict[str, Any] = {"backend": provider.describe(case, sets[0]), "note": expected.note}
    run = provider.call(case)
    values["error"] = error(run_once(case, provider, run, sets[0]), expected)
    allowed = 1.0 if name.startswith("ours") else peer_tolerance
    if not values["error"] <= allowed:
        note = f"{values['error']:.3g} times the tolerance: not timed"
        note += "" if name.startswith("ours") else "; --peer-tolerance compares it all the same"
        return Entry(values | {"status": INACCURATE, "note": note})
    if values["error"] > 1:
        values["note"] = "; ".join(filter(None, [expected.note, "beyond the tolerance"]))
    own = [copy_of(t) if provider.in_place else own_statistics(t) for t in sets]
    calls = [make_call(case, provider, run, t) for t in own]
    values["peak_bytes"] = machine.peak_bytes(calls[0])
    calls, values["method"], why = captured(calls, machine)
    values["note"] = "; ".join(filter(None, [values["note"], why]))
    return Entry(values, calls)


def captured(calls: list[Call], machine: Machine) -> tuple[list[Call], str, str]:
    """The calls as graphs, if every one can be captured and the first computes the same again.

    Returns them, the method by which they are then timed, and why that is not graphs.
    """
    if machine.capture is None:
        return calls, "events", ""
    eager = calls[0]()
    for call in calls[1:]:  # each must have run once: that loads kernels
        call()
    try:
        graphs = [machine.capture(call) for call in calls]
    except RuntimeError as reason:
        return calls, "events", f"no graph: {_first_line(reason)}"
    replay, results = graphs[0]
    replay()
    if not _same(results, eager):
        return calls, "events", "no graph: its results differ from those of the call"
    return [graph for graph, _ in graphs], "graph", ""


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """But for what a peer may sum in another order."""
    return all(torch.allclose(one[name], other[name], rtol=1e-2, atol=1e-2) for name in other)


def _failure(reason: BaseException) -> dict[str, Any]:
    return {"status": FAILED, "note": f"{type(reason).__name__}: {_first_line(reason)}"}


def _first_line(reason: BaseException) -> str:
    lines = str(reason).strip().splitlines()
    return lines[0][:180] if lines else "no message"


def _times(case: BenchCase, name: str, spreads: dict[str, Spread]) -> dict[str, Any]:
    if name not in spreads:
        return {}
    times = spreads[name]
    values = {"ms": times.median, "ms_p20": times.low, "ms_p80": times.high}
    values |= {"samples": times.samples, "gb_s": math.nan}
    if times.median > 0:
        values["gb_s"] = byte_model.gb_per_s(case.compulsory_bytes, times.median)
    if COPY in spreads and times.median > 0:
        values["copy_percent"] = 100 * spreads[COPY].median / times.median
    return values
