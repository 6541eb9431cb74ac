"""One HTML file that needs nothing else: no network, no script, plots as SVG in the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from ..rows.results import FAILED, INACCURATE, MODEL, UNSUPPORTED, Row
from .markdown import MEASURED_NOTE, MODEL_NOTE, Table, tables
from .plots import inline_svg

_PLOTS = {
    "bytes": (
        "Bytes moved (model)",
        "Model: DRAM bytes over the fewest possible, for each case. The dashed line is 1, every "
        "activation once. Rings are counts on a cut problem, other marks predictions.",
    ),
    "roofline": (
        "Rate against size",
        "Measured: compulsory bytes over time. The dashed line is a copy of as many bytes.",
    ),
    "ratio": (
        "Time over a copy",
        "Measured: time over that of a copy of as many bytes, logarithmic. The dashed line is 1.",
    ),
}
_CELLS = {"shape": "shape", "provider": "name", "what runs": "runs", "note": "note"}


def render(
    environment: Mapping[str, Any], rows: Sequence[Row], pictures: Mapping[str, Figure]
) -> str:
    model = rows[0].kind == MODEL
    folder = Path(__file__).parent / "templates"
    jinja = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = [
        {"title": _PLOTS[name][0], "caption": _PLOTS[name][1], "svg": inline_svg(figure, name)}
        for name, figure in pictures.items()
    ]
    return jinja.get_template("report.html").render(
        title=f"Batch norm on {environment.get('device', rows[0].device)}"
        + (" (model)" if model else ""),
        subtitle=f"batchnorm_cuda {environment.get('batchnorm_cuda', '')}, commit "
        f"{environment.get('commit', 'unknown')}, {environment.get('date', '')}",
        note=(MODEL_NOTE if model else MEASURED_NOTE).replace("**", ""),
        model=model,
        environment=environment,
        plots=plots,
        tables=[_prepared(table) for table in tables(rows)],
    )


def _prepared(table: Table) -> dict[str, Any]:
    lines, before = [], None
    for cells in table.rows:
        first = cells[0] != before
        before = cells[0]
        lines.append({"classes": _line_classes(table, cells, first), "cells": _cells(table, cells)})
    return {
        "title": table.title,
        "columns": table.columns,
        "numbers": list(table.numbers),
        "lines": lines,
    }


def _line_classes(table: Table, cells: tuple[str, ...], first: bool) -> str:
    provider, note = cells[table.columns.index("provider")], cells[-1]
    chosen = {
        "first": first,
        "ours": provider == "ours",
        "bad": note.startswith((FAILED, INACCURATE)),
        "without": note.startswith(UNSUPPORTED),
    }
    return " ".join(name for name, holds in chosen.items() if holds)


def _cells(table: Table, cells: tuple[str, ...]) -> list[dict[str, str]]:
    result = []
    for at, (column, text) in enumerate(zip(table.columns, cells, strict=True)):
        kind = "number" if at in table.numbers else _CELLS.get(column, "")
        result.append({"text": text, "classes": kind})
    return result
