"""Plots of a run: rates against size, and each provider against the floor.

Every provider has its own marker (style.py); nothing is told by colour alone. Text stays text in
the SVG, so that it can be read aloud and searched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ..rows.results import MODEL, Row
from .style import LOOKS

# Takes the place of text colour where the SVG is put into a page that is light or dark.
INK = "#1a1b1c"
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "batchnorm_cuda", "font.family": "sans-serif"}
_RC = _SVG | {"font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK}
_RC |= {"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False}
_RC |= {"axes.spines.right": False, "legend.frameon": False}


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """By name. Empty where no row has a figure."""
    with matplotlib.rc_context(_RC):
        if not rows:
            return {}
        if rows[0].kind == MODEL:
            shown = [row for row in rows if row.model_bytes is not None and row.provider != "copy"]
            if {row.op for row in shown} > {"both"}:  # which is the sum of the others
                shown = [row for row in shown if row.op != "both"]
            return {"bytes": bytes_over_compulsory(shown)} if shown else {}
        timed = [row for row in rows if row.ms is not None]
        if not timed:
            return {}
        return {"roofline": roofline(timed), "ratio": time_over_copy(timed)}


def save(figure: Figure, path: Path, description: str = "") -> None:
    """On white, without a date: the same rows give the same file."""
    described = {"Description": description} if description else {}
    metadata = {"Date": None, "Creator": None, **described} if path.suffix == ".svg" else described
    with matplotlib.rc_context(_RC):
        figure.savefig(path, dpi=150, facecolor="white", metadata=metadata)


def inline_svg(figure: Figure, title: str) -> str:
    """An <svg> element for a page: transparent, in the page's own text colour."""
    target = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    text = target.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def bytes_over_compulsory(rows: Sequence[Row]) -> Figure:
    """A model's bytes: a line for each case, a marker for each provider."""
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = _lines([_label(case) for case in cases], len({row.provider for row in rows}))
    place = _places(rows)
    for provider in dict.fromkeys(row.provider for row in rows):
        own = [row for row in rows if row.provider == provider]
        _dots(axes, provider, [row.model_ratio for row in own], [place(row) for row in own])
        if provider == "ours":
            counted = [row for row in own if row.model_counted_ratio is not None]
            values = [row.model_counted_ratio for row in counted]
            if counted:
                _dots(axes, "ours:counted", values, [place(row) for row in counted], size=10)
    axes.axvline(1.0, color=INK, linewidth=1, linestyle="--")
    device = rows[0].device
    axes.set_xlabel(
        f"model: DRAM bytes over compulsory bytes\n(a described {device}, not measured)"
    )
    axes.set_xlim(left=0.9)
    _legend(figure, axes)
    return figure


def time_over_copy(rows: Sequence[Row]) -> Figure:
    """Time over that of a copy of as many bytes: 1 is the floor."""
    shown = [row for row in rows if row.copy_percent and row.provider != "copy"]
    cases = list(dict.fromkeys(row.case for row in shown))
    figure, axes = _lines([_label(case) for case in cases], len({row.provider for row in shown}))
    place = _places(shown)
    for provider in dict.fromkeys(row.provider for row in shown):
        own = [row for row in shown if row.provider == provider]
        _dots(axes, provider, [100 / row.copy_percent for row in own], [place(row) for row in own])
    axes.axvline(1.0, color=INK, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"time over a copy of as many bytes\n(measured on {rows[0].device})")
    _legend(figure, axes)
    return figure


def roofline(rows: Sequence[Row]) -> Figure:
    """Rate against size; the copy's own rate is the roof."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    copies = sorted((row.compulsory_bytes, row.gb_s) for row in rows if row.provider == "copy")
    if copies:
        axes.plot(*zip(*copies, strict=True), color=INK, linewidth=1, linestyle="--", label="copy")
    for provider in dict.fromkeys(row.provider for row in rows if row.provider != "copy"):
        own = [row for row in rows if row.provider == provider]
        _dots(axes, provider, [row.compulsory_bytes for row in own], [row.gb_s for row in own])
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("compulsory bytes")
    axes.set_ylabel(f"GB/s of compulsory bytes\n(measured on {rows[0].device})")
    axes.grid(alpha=0.25)
    _legend(figure, axes)
    return figure


def _lines(labels: list[str], marks: int) -> tuple[Figure, Axes]:
    """A horizontal line for each label, the first at the top, with room for as many marks."""
    figure = Figure(figsize=(8, 1.3 + (0.22 + 0.035 * marks) * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", alpha=0.25)
    axes.grid(axis="x", alpha=0.12)
    return figure, axes


def _places(rows: Sequence[Row]) -> Callable[[Row], float]:
    """Heights of the marks: by case, and a little apart by provider where values coincide."""
    cases = {case: at for at, case in enumerate(dict.fromkeys(row.case for row in rows))}
    providers = list(dict.fromkeys(row.provider for row in rows))
    middle = (len(providers) - 1) / 2
    return lambda row: cases[row.case] + 0.13 * (providers.index(row.provider) - middle)


def _dots(axes: Axes, provider: str, x: Sequence, y: Sequence, size: float = 6) -> None:
    look = LOOKS[provider]
    face = look.colour if look.filled else "none"
    style = {"marker": look.marker, "linestyle": "none", "markersize": size, "clip_on": False}
    axes.plot(x, y, label=look.label, color=look.colour, markerfacecolor=face, **style)


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _label(case: tuple[str, ...]) -> str:
    name, shape, layout, dtype, op = case
    return f"{name}  {shape} {layout} {dtype}, {op}"
