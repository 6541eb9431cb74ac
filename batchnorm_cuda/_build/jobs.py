"""How many compiler processes to run at once: as many as cores and free memory carry.

Standard library only, and no imports from the package: setup.py loads this file by its path.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Memory one compiler process may take, with room to spare: nvcc on a file of many template
# instances, and g++ on PyTorch's headers.
CUDA_JOB_BYTES = 3 << 30
HOST_JOB_BYTES = 2 << 30


def compile_jobs(job_bytes: int) -> int:
    """The number for this machine, now."""
    cpus = len(os.sched_getaffinity(0))
    return max_jobs(job_bytes, cpus, available_memory(), os.environ.get("MAX_JOBS"))


def max_jobs(job_bytes: int, cpus: int, memory: int | None, explicit: str | None) -> int:
    """MAX_JOBS if it is set, else one per core while the memory lasts, but one."""
    wanted = (explicit or "").strip()
    if wanted:
        if not (wanted.isascii() and wanted.isdigit() and int(wanted)):
            raise ValueError(
                f"MAX_JOBS={explicit!r}: expected how many compilers to run at once, as a whole "
                "number above 0; correct it or unset it"
            )
        return int(wanted)
    return max(1, cpus if memory is None else min(cpus, memory // job_bytes))


def available_memory() -> int | None:
    """Bytes free on the machine or left to the control group, if less; None if unknown."""
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) << 10)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        found.append(max(0, limit - int((group / "memory.current").read_text())))
    return min(found, default=None)
