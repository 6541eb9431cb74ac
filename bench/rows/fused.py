"""Rows of `python -m bench --model PATH --fuse`: a batch norm and what stands behind it."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Workload


@dataclass(frozen=True)
class FusedRow(Workload):
    """By one provider, of kind MEASURED or MODEL, as `results.Row`. None is what does not apply."""

    behind: str  # "add, relu", or "nothing"
    provider: str
    status: str
    compulsory_bytes: int  # of one pass that does it all
    backend: str = ""
    ms: float | None = None  # median
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    method: str = ""  # graph or events
    gb_s: float | None = None  # compulsory bytes over time
    model_bytes: int | None = None  # DRAM bytes: the plan's, and byte models
    note: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        """What providers are compared on."""
        return (self.set, self.shape, self.layout, self.dtype, self.op, self.behind)

    @property
    def model_ratio(self) -> float | None:
        return self.model_bytes / self.compulsory_bytes if self.model_bytes is not None else None
