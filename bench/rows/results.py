"""Rows of results, and the files that hold them.

A CSV file grows by a row at a time, so that a run that is cut short leaves what it has; the JSON
file beside it holds the same rows and the environment. A row is either measured on a GPU or a
model's: then every figure stands in a column whose name begins with "model", and no time is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import records

MEASURED, MODEL = "measured", "model"

# Of a row. Only "ok" has figures that may be compared.
OK = "ok"
INACCURATE = "inaccurate"  # beyond the tolerance: not timed
UNSUPPORTED = "unsupported"  # the provider does not take this input
FAILED = "failed"  # an error, in the note


@dataclass(frozen=True)
class Workload:
    """What a row is about: one operation on one shape, and where its figures come from."""

    kind: str  # MEASURED, or what else the kind of row may be
    device: str
    set: str
    shape: str  # 32x64x56x56
    layout: str
    dtype: str
    op: str
    count: int  # batch norms of this shape in the network


@dataclass(frozen=True)
class Row(Workload):
    """A workload by one provider, of kind MEASURED or MODEL. None is what does not apply."""

    provider: str
    status: str
    compulsory_bytes: int
    backend: str = ""  # what ran: torch's own choice, or the plan's
    ms: float | None = None  # median
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    method: str = ""  # graph or events
    gb_s: float | None = None  # compulsory bytes over time
    copy_percent: float | None = None  # of the rate of a copy of as many bytes
    peak_bytes: int | None = None  # allocated beyond the inputs
    error: float | None = None  # largest error over what the tolerance allows
    model_bytes: int | None = None  # DRAM bytes: the plan's, or the peer's byte model
    model_counted_ratio: float | None = None  # DRAM bytes over compulsory, counted on a cut problem
    model_counted_shape: str = ""  # that problem
    model_counted_sms: int | None = None  # and how many SMs of the device it was given
    note: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        """What providers are compared on."""
        return (self.set, self.shape, self.layout, self.dtype, self.op)

    @property
    def model_ratio(self) -> float | None:
        return self.model_bytes / self.compulsory_bytes if self.model_bytes is not None else None


ResultsError = records.RecordsError
COLUMNS = records.columns(Row)
append_row = records.append


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    path.unlink(missing_ok=True)
    for row in rows:
        append_row(path, row)


def read_csv(path: Path) -> list[Row]:
    """Raises ResultsError where the file is missing, has other columns or unreadable values."""
    return records.read(path, Row)


def write_json(path: Path, environment: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """A line for each row, so that a change of one is a change of one line."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    facts = json.dumps(dict(environment), indent=1)
    path.write_text(f'{{"environment": {facts},\n"rows": [\n{lines}\n]}}\n')


def read_environment(path: Path) -> dict[str, Any]:
    """Of the JSON file beside a CSV file; empty where there is none."""
    beside = path.with_suffix(".json")
    return json.loads(beside.read_text())["environment"] if beside.exists() else {}
