"""A row of a tune file: one plan of one problem, what the planner says of it, and its time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..rows.results import Workload

MEASURED = "measured"  # on a GPU
HOST = "host"  # on the model of CUDA, by the host's clock: tells nothing of a GPU
SYNTHETIC = "synthetic"  # made from a known cost model

OK = "ok"
INACCURATE = "inaccurate"  # beyond the tolerance from what the chosen plan computes
FAILED = "failed"  # an error, in the note
UNSUPPORTED = "unsupported"  # the device has no such plan
RETIRED = "retired"  # by a kernel that is no longer there, named in the note; only ever the best
COPY = "copy"  # the strategy of the row that copies as many bytes

# What forces a plan, with the value of a row where it does not apply.
OPTIONS: Mapping[str, Any] = {
    "strategy": "",
    "pattern": "",
    "scope": "",
    "team_size": 0,
    "slab": 0,
    "splits": 0,
}


@dataclass(frozen=True)
class TuneRow(Workload):
    n: int  # [n, c, s] as the planner sees it
    c: int
    s: int
    strategy: str
    pattern: str
    scope: str
    team_size: int
    slab: int
    splits: int  # of two passes, whoever chose them
    chosen: int  # 1: the planner's choice
    cost: float | None  # predicted, in moves
    predicted_bytes: int | None
    status: str
    ms: float | None = None  # median
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    method: str = ""  # graph, events or host
    note: str = ""

    @property
    def problem(self) -> tuple[Any, ...]:
        return (self.device, self.op, self.dtype, self.n, self.c, self.s)

    @property
    def forced(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in OPTIONS)


def forced_by(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What TuneRow.forced is of a row with these options."""
    return tuple(options.get(name, none) for name, none in OPTIONS.items())
