"""The only place that times: cold L2 cache, providers in turns, on a clock that tests replace.

Every provider gets its inputs in several sets, used in rotation, so that a call finds nothing of an
earlier one in the L2 cache. Where sets enough for that would be too many (small tensors), the cache
is filled by reading a buffer before each call. Providers take turns call by call (A B C, A B C):
a clock that drifts weighs on all alike.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from .samples import Spread, spread

Call = Callable[[], object]

CACHES = 3  # what lies between two uses of a set, in sizes of the L2 cache
_MOST_SETS = 16
_ROUNDS = (10, 200)  # the fewest and the most
_WARM_UP = 3


class Clock(Protocol):
    idle_ms: float  # that a call costs besides what is timed

    def start(self, call: Call) -> object:
        """Runs `call`, perhaps later; gives what `milliseconds` takes."""

    def wait(self) -> None:
        """Until all that was started is done."""

    def milliseconds(self, handle: object) -> float:
        """That the call took on the device."""


def rotation(nbytes: int, l2_bytes: int) -> tuple[int, bool]:
    """How many sets of `nbytes` to use in turn, and whether the cache must be filled besides."""
    needed = math.ceil(CACHES * l2_bytes / max(nbytes, 1)) + 1
    return max(2, min(needed, _MOST_SETS)), needed > _MOST_SETS


def rounds_for(seconds: float, round_ms: float, limits: tuple[int, int] = _ROUNDS) -> int:
    fewest, most = limits
    return max(fewest, min(most, math.ceil(seconds * 1000 / max(round_ms, 1e-6))))


def interleave(
    calls: Mapping[str, Sequence[Call]], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Times of each name's calls: in every round one of each name, on the next set of inputs."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turn = itertools.count()
    for _ in range(rounds):
        started = []
        for name, sets in calls.items():
            started.append((name, clock.start(sets[next(turn) % len(sets)])))
        clock.wait()
        for name, handle in started:
            samples[name].append(clock.milliseconds(handle))
    return samples


def measure(calls: Mapping[str, Sequence[Call]], clock: Clock, seconds: float) -> dict[str, Spread]:
    """Median and spread of each name, all of them together in about `seconds`."""
    if not calls:
        return {}
    trial = interleave(calls, clock, _WARM_UP)
    # The last of the warm-up alone: the first calls load kernels.
    rounds = rounds_for(seconds, sum(times[-1] + clock.idle_ms for times in trial.values()))
    return {name: spread(times) for name, times in interleave(calls, clock, rounds).items()}


class CudaClock:
    """CUDA events around a call, behind a read of a buffer that fills the L2 cache if asked to.

    A spin keeps the GPU busy until all behind it is enqueued, so that no host time lies between the
    two events, not even that of an autograd step that is launched kernel by kernel.
    """

    _SPIN_CYCLES = 1_000_000
    idle_ms = 0.5  # of the spin, about

    def __init__(self, l2_bytes: int, fill_cache: bool) -> None:
        self._filler = None
        if fill_cache:
            self._filler = torch.zeros(CACHES * l2_bytes // 4, device="cuda")
        self._events: list[torch.cuda.Event] = []

    def _event(self) -> torch.cuda.Event:
        return self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)

    def start(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        if self._filler is not None:
            self._filler.max()  # a read: it leaves nothing that must be written back later
        torch.cuda._sleep(self._SPIN_CYCLES)
        first, last = self._event(), self._event()
        first.record()
        call()
        last.record()
        return first, last

    def wait(self) -> None:
        torch.cuda.synchronize()

    def milliseconds(self, handle: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        first, last = handle
        self._events += handle
        return first.elapsed_time(last)


class HostClock:
    """The host's time of a call, for the model of CUDA: it says nothing of a GPU."""

    idle_ms = 0.0

    def start(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000

    def wait(self) -> None:
        pass

    def milliseconds(self, handle: float) -> float:
        return handle


def capture(call: Call) -> tuple[Call, object]:
    """The call as a CUDA graph, and what it computes into. The call must have run before.

    Raises RuntimeError where something in it cannot be captured. Not by `torch.cuda.graph`, which
    empties the allocator's cache each time: there are hundreds of graphs. Each has a memory pool of
    its own, because a capture that failed leaves its pool without use. What threads do besides, as
    those of autograd, breaks no capture.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin(capture_error_mode="relaxed")
    try:
        results = call()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error says what is wrong
            graph.capture_end()
        raise
    graph.capture_end()
    return graph.replay, results
