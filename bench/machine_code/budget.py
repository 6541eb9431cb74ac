"""Issue budget: does memory bound a loop, or the issue of its instructions?

An SM of every architecture here has four warp schedulers, each of which issues at most one
instruction of a warp a cycle. A warp-wide access of 16 bytes a thread moves 512 bytes; at the
device's full bandwidth an SM moves those in

    512 / (bandwidth / (SMs * clock)) cycles,    with four issue slots each.

Instructions per window (16 bytes loaded or stored by a thread) over those slots is the share of
issue slots that the loop needs to keep up with memory. At most ISSUE_SHARE of them: the rest is for
reductions and exchanges, and for cycles in which no warp is ready. All kernels have 16 warps an SM
(csrc/geometry.h), four a scheduler: as many as the four cycles that arithmetic takes, so that a
scheduler can issue in every cycle though each warp waits for its own last result. The windows of a
loop count as traffic of DRAM, also where the L2 cache serves them and time would be shorter; clocks
are boost clocks.

A team kernel is a round, not a loop. It is counted in parts:
    round      the code outside of its inner loops, over the windows held in registers, which
               straight-line code loads, reduces and writes once each. Parameters, exchange and
               every branch of rare cases are in there: an upper bound, of which most is paid once
               a round and not per window, and which is reported only.
    shared     a window held in shared memory: an iteration each of the loops that copy it, reduce
               it and write its output.
    streamed   a window that is not held: an iteration each of the loops that reduce it and that
               read it again to write its output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .kernels import WINDOW_BITS, Kernel, MainLoop

SCHEDULERS = 4
WARP_ACCESS_BYTES = 512
ISSUE_SHARE = 0.6
_LANES = {"__half": 8, "__nv_bfloat16": 8, "float": 4, "double": 2}


def slots_per_window(device: Mapping[str, Any]) -> float:
    """Issue slots of an SM while memory moves one warp-wide access of 16 bytes a thread."""
    cycles_per_second = device["sm_count"] * device["boost_mhz"] * 1e6
    bytes_per_cycle = device["bandwidth_gb_s"] * 1e9 / cycles_per_second
    return WARP_ACCESS_BYTES / bytes_per_cycle * SCHEDULERS


@dataclass(frozen=True)
class Budget:
    """Instructions of one part of a kernel for each window of global memory that it moves."""

    kernel: Kernel
    part: str  # "loop", or of a team kernel "round", "shared" or "streamed"
    per_window: Mapping[str, float]  # by class of instruction

    @property
    def instructions(self) -> float:
        return sum(self.per_window.values())

    @property
    def scalar(self) -> str:
        return scalar_of(self.kernel.name)

    @property
    def per_element(self) -> float:
        return self.instructions / _LANES[self.scalar]

    @property
    def held_to_share(self) -> bool:
        """A round is an upper bound and reported only.

        So is double: most devices issue its arithmetic at 1/32 or 1/64 of the rate, so that its own
        pipe bounds it, which no count of issue slots shows.
        """
        return self.scalar != "double" and self.part != "round"

    def share(self, device: Mapping[str, Any]) -> float:
        return self.instructions / slots_per_window(device)


def scalar_of(name: str) -> str:
    """The activations' type, of the cursor in a kernel's name."""
    found = re.search(r"\bAlong\w+<(\w+)", name)
    return found.group(1) if found else ""


def budgets(kernels: list[Kernel]) -> list[Budget]:
    """Every part of the kernels that walk over activations; none of the merge kernels."""
    return [budget for kernel in kernels for budget in _parts(kernel)]


def moved_by_round(kernel: Kernel) -> float:
    """Windows that a round loads into registers and stores from there."""
    held = kernel.held_windows or 0
    return held + held * kernel.passing / kernel.tensors


def _parts(kernel: Kernel) -> list[Budget]:
    if kernel.main_loop is None or not scalar_of(kernel.name):
        return []
    if kernel.held_windows is None:
        return [Budget(kernel, "loop", _over([(kernel.main_loop, 1)], kernel.main_loop.windows))]
    # Not the main loop: before 8.0 the unrolled copies to shared memory may move more windows.
    whole = max(kernel.loops, key=lambda loop: loop.nested)
    parts = {"round": _over([(whole, 1)], moved_by_round(kernel))}
    parts["shared"] = _shared(kernel)
    parts["streamed"] = _streamed(kernel)
    return [Budget(kernel, part, mix) for part, mix in parts.items() if mix]


def _over(work: list[tuple[MainLoop, float]], windows: float) -> dict[str, float]:
    """Instructions of all the loops, each weighted, by class and window."""
    total: Counter[str] = Counter()
    for loop, weight in work:
        for name, count in loop.kinds.items():
            total[name] += count * weight
    return {name: count / windows for name, count in total.items()} if windows else {}


def _longest(loops: list[MainLoop], windows: str) -> MainLoop | None:
    """The loop of a phase: without the remainder of its unrolling, which moves less."""
    return max(loops, key=lambda loop: (getattr(loop, windows), -loop.instructions), default=None)


def _shared(kernel: Kernel) -> dict[str, float]:
    inner = [loop for loop in kernel.loops if not loop.nested]
    copy = _longest([x for x in inner if x.copied and not _filters(x)], "copied")
    reduce = _sweeps([x for x in inner if x.shared_loads and not (x.copied or _stores(x))])
    write = _longest([x for x in inner if x.shared_loads and _stores(x)], "shared_loads")
    if copy is None or not reduce or write is None:
        return {}
    work = [(loop, 1 / loop.shared_loads) for loop in (*reduce, write)]
    # A fused backward filters one of its tensors in place.
    filtering = _longest([x for x in inner if _filters(x)], "shared_loads")
    if filtering is not None:
        work.append((filtering, 1 / filtering.shared_loads / kernel.tensors))
    if (
        not write.copied
    ):  # else the kernel copies the next group's window where it writes this one's
        work.append((copy, 1 / copy.copied))
    return _over(work, 1 + kernel.passing / kernel.tensors)


def _filters(loop: MainLoop) -> bool:
    return bool(loop.copied and loop.shared_loads) and not _stores(loop)


def _sweeps(loops: list[MainLoop]) -> list[MainLoop]:
    """The loops that reduce what is in shared memory: one, or two for mean and deviations."""
    most = max((loop.shared_loads for loop in loops), default=0)
    return [loop for loop in loops if loop.shared_loads == most]


def _streamed(kernel: Kernel) -> dict[str, float]:
    inner = [x for x in kernel.loops if not (x.nested or x.copied or x.shared_loads) and _loads(x)]
    read = _longest([loop for loop in inner if not _stores(loop)], "windows")
    write = _longest([loop for loop in inner if _stores(loop)], "windows")
    if read is None or write is None:
        return {}
    # A fused forward reads the residual beside what it reads again.
    again = 2 if kernel.fused and kernel.tensors == 1 else 1
    work = [(read, 1 / _loads(read)), (write, again / _loads(write))]
    return _over(work, 2 + kernel.passing / kernel.tensors)


def _loads(loop: MainLoop) -> int:
    return loop.loads.get(WINDOW_BITS, 0)


def _stores(loop: MainLoop) -> int:
    """Of any width: a masked window may leave in parts."""
    return sum(loop.stores.values())
