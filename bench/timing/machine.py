"""What a measurement needs of the machine, in one object that tests replace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from .clock import Call, Clock, CudaClock, HostClock, capture


@dataclass(frozen=True)
class Machine:
    device: str
    name: str
    l2_bytes: int
    memory_bytes: int
    clock: Callable[[bool], Clock]  # whether it fills the cache
    capture: Callable[[Call], tuple[Call, object]] | None  # as a graph; None: call by call
    peak_bytes: Callable[[Call], int | None]  # allocated by a call beyond what was
    scope: Callable[[], AbstractContextManager]  # around everything that is measured
    release: Callable[[], None]  # gives memory back between cases


def gpu() -> Machine:
    """The current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    l2 = properties.L2_cache_size
    return Machine(
        device="cuda",
        name=properties.name,
        l2_bytes=l2,
        memory_bytes=properties.total_memory,
        clock=lambda fill: CudaClock(l2, fill),
        capture=capture,
        peak_bytes=_peak_bytes,
        # Graphs cannot be captured on the default stream.
        scope=lambda: torch.cuda.stream(torch.cuda.Stream()),
        release=torch.cuda.empty_cache,
    )


def host_model() -> Machine:
    """The model of CUDA on this CPU: what a GPU would be asked, answered in host time."""
    return Machine(
        device="cpu",
        name="model of CUDA",
        l2_bytes=1,  # two sets of inputs in rotation
        memory_bytes=2**30,
        clock=lambda fill: HostClock(),
        capture=None,
        peak_bytes=lambda call: None,
        scope=nullcontext,
        release=lambda: None,
    )


def _peak_bytes(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
