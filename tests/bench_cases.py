"""What the benchmark's tests share: rows and kernels made up, a machine whose clock they set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench.cases.case import BenchCase
from bench.cases.shapes import Shape
from bench.machine_code.kernels import Kernel, MainLoop
from bench.machine_code.listing import LaunchBounds, Resources
from bench.rows.results import MEASURED, MODEL, OK, Row
from bench.timing.clock import Call
from bench.timing.machine import Machine

MIB = 1024 * 1024


def case(op: str = "forward", sizes: tuple[int, ...] = (2, 3, 5, 5), **values: Any) -> BenchCase:
    fixed = {"layout": "nchw", "dtype": "fp16"}
    return BenchCase(Shape("tiny", sizes), op=op, **{**fixed, **values})


def row(**values: Any) -> Row:
    """A measured row; with kind=MODEL, one of the models'."""
    fixed: dict[str, Any] = {
        "kind": MEASURED,
        "device": "GPU 1",
        "set": "net",
        "shape": "2x3x5x5",
        "layout": "nchw",
        "dtype": "fp16",
        "op": "forward",
        "count": 1,
        "provider": "ours",
        "status": OK,
        "compulsory_bytes": 1000,
    }
    if values.get("kind") == MODEL:
        fixed |= {"model_bytes": 1500, "model_counted_ratio": 1.25}
        fixed |= {"model_counted_shape": "1x3x5x5", "model_counted_sms": 4}
    else:
        fixed |= {"ms": 2.0, "ms_p20": 1.9, "ms_p80": 2.1, "samples": 9, "gb_s": 500.0}
        fixed |= {"copy_percent": 80.0, "error": 0.5, "peak_bytes": 4000, "backend": "team"}
    return Row(**{**fixed, **values})


def kernel(**values: Any) -> Kernel:
    """A kernel without fault, as the compiler might have made it."""
    fixed: dict[str, Any] = {
        "name": "transform_input_kernel<AlongS<__half, int>>",
        "arch": "8.0",
        "source": "stages_half.cu",
        "bounds": LaunchBounds(256, 2),
        "resources": Resources(128, 0, 0),
        "instructions": 100,
        "loads": {128: 4, 16: 2},
        "stores": {128: 4},
        "local_accesses": 0,
        "generic_accesses": 0,
        "bulk_copies": 0,
        "main_loop": MainLoop(0x100, 80, {128: 4}, {128: 4}, 0),
    }
    return Kernel(**{**fixed, **values})


class FakeClock:
    """Runs the calls, and says that they took what `took` gives for the number of the start."""

    idle_ms = 0.0

    def __init__(self, took: Callable[[int], float]) -> None:
        self.took = took
        self.starts = 0
        self.log: list[str] = []

    def start(self, call: Call) -> int:
        call()
        self.log.append("start")
        self.starts += 1
        return self.starts - 1

    def wait(self) -> None:
        self.log.append("wait")

    def milliseconds(self, handle: int) -> float:
        return self.took(handle)


def machine(took: Callable[[int], float] = lambda start: 1.0, **values: Any) -> Machine:
    """The CPU, with the emulated kernels."""
    fixed = {
        "device": "cpu",
        "name": "a clock that is set",
        "l2_bytes": 64,  # two sets of inputs in rotation do
        "memory_bytes": 1024 * MIB,
        "clock": lambda fill: FakeClock(took),
        "capture": None,
        "peak_bytes": lambda call: 123,
        "scope": nullcontext,
        "release": lambda: None,
    }
    return Machine(**{**fixed, **values})
