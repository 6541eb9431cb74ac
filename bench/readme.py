"""The README's section on performance, written from the files in bench/results.

    python -m bench readme [--recount] [--check]

Where a GPU's results are there, they are shown; until then bytes by models, and said to be that.
--recount runs the models again first, some minutes. --check writes nothing; exit status 1 if the
section or its plot is not what the files give.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from . import environment, model
from .cases.case import cases
from .cases.shapes import README_SHAPES
from .loading import ROOT
from .pages import markdown, plots
from .rows.results import MEASURED, OK, ResultsError, Row, read_csv, write_csv, write_json

RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- performance: written by `make readme` from bench/results; do not edit -->"
END = "<!-- end of performance -->"

_MODEL_PROVIDERS = ["ours", "native"]
_MEASURED_PROVIDERS = ["ours", "cudnn", "native", "compile"]
_ELEMENTS = 2**19
_MODEL_TEXT = (
    "**Model, not measured.** Bytes to and from DRAM over the fewest possible, on a described {}. "
    "*Planned* is what the planner predicts for the shape; *counted* what the CPU model of CUDA "
    "counts while the kernels' own source runs, with batch, SMs and L2 cache cut alike; *PyTorch "
    "native* the byte model of its two passes, 2R + 1W forward and 4R + 1W backward, less what the "
    "L2 cache still holds ([byte_model.py](bench/models/byte_model.py)). cuDNN's traffic is not "
    "published. Bytes are not time: nobody has run this on a GPU yet; `make gpu-check` does."
)
_MEASURED_TEXT = (
    "Measured on {0}: medians, cold L2 cache, providers in turns; every row, other dtypes too, is "
    "in [{1}]({1}). Where no time is given, the provider does not take the input (cuDNN: torch "
    "takes another backend) or its result is far beyond the tests' tolerance."
)
_OPS = ("forward", "backward")


def recount(folder: Path, settings: model.ModelSettings) -> None:
    """model.csv and model.json, of the README's shapes."""
    found = environment.collect(settings.device)  # first: what follows changes files
    rows = []
    for case in tqdm(cases(README_SHAPES, ["nchw"], ["fp16"], _OPS), unit="case", disable=None):
        rows += model.rows(case, _MODEL_PROVIDERS, settings)
    write_csv(folder / "model.csv", rows)
    found["command"] = "python -m bench readme --recount"
    write_json(folder / "model.json", found, rows)


def load(folder: Path) -> list[tuple[Path, list[Row]]]:
    """The GPUs' results, or else the model's. Raises ResultsError if there are none."""
    paths = [path for path in sorted(folder.glob("*.csv")) if not path.stem.endswith("-tune")]
    files = [(path, read_csv(path)) for path in paths]
    measured = [(path, rows) for path, rows in files if rows and rows[0].kind == MEASURED]
    chosen = measured or [(path, rows) for path, rows in files if rows]
    if not chosen:
        raise ResultsError(f"{folder}: no results; --recount makes those of the models")
    return chosen


def section(folder: Path) -> str:
    """What stands between the markers."""
    parts = [_part(path, rows) for path, rows in load(folder)]
    return "\n\n".join([BEGIN, *parts, END])


def _part(path: Path, rows: Sequence[Row]) -> str:
    plot = f"bench/results/{_plot_path(path, rows).name}"
    if rows[0].kind == MEASURED:
        return measured_part(rows, plot, f"bench/results/{path.name}")
    return model_part(rows, plot)


def _plot_path(path: Path, rows: Sequence[Row]) -> Path:
    return path.with_name(f"{path.stem}-{'ratio' if rows[0].kind == MEASURED else 'bytes'}.svg")


def _by_shape(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[tuple[str, str], Row]]:
    """For each shape, in layout and dtype, rows by operation and provider."""
    found: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        key = (row.set, row.shape, row.layout, row.dtype)
        found.setdefault(key, {})[row.op, row.provider] = row
    return found


def model_part(rows: Sequence[Row], plot: str) -> str:
    device = rows[0].device
    columns = ["network", "shape"]
    for op in _OPS:
        columns += [f"{op}, model: ours planned", "model: ours counted", "model: PyTorch native"]
    lines = []
    for (name, shape, layout, dtype), found in _by_shape(rows).items():
        cells = [name, f"{shape} {layout} {dtype}"]
        for op in _OPS:
            ours, native = found[op, "ours"], found[op, "native"]
            cells.append(markdown.number(ours.model_ratio, ".2f"))
            cells.append(markdown.number(ours.model_counted_ratio, ".2f"))
            cells.append(markdown.number(native.model_ratio, ".2f"))
        lines.append(tuple(cells))
    table = markdown.Table("", tuple(columns), tuple(lines), range(2, len(columns)))
    picture = f"![Model: DRAM bytes over compulsory bytes, by shape]({plot})"
    return "\n\n".join([_wrapped(_MODEL_TEXT.format(device)), markdown.render(table), picture])


def shown(rows: Sequence[Row]) -> list[Row]:
    """Of a measurement: one dtype, the first, and no operation that is the sum of two others."""
    return [row for row in rows if row.dtype == rows[0].dtype and row.op in _OPS]


def measured_part(rows: Sequence[Row], plot: str, path: str) -> str:
    device, part = rows[0].device, shown(rows)
    providers = [name for name in _MEASURED_PROVIDERS if any(r.provider == name for r in part)]
    operations = [op for op in _OPS if any(row.op == op for row in part)]
    columns = ["network", "shape"]
    for op in operations:
        columns += [f"{op}, ms: ours", *providers[1:], "ours, % of a copy's rate"]
    lines = []
    for (name, shape, layout, dtype), found in _by_shape(part).items():
        cells = [name, f"{shape} {layout} {dtype}"]
        for op in operations:
            cells += [_time(found.get((op, provider))) for provider in providers]
            ours = found.get((op, "ours"))
            cells.append(markdown.number(ours.copy_percent if ours else None, ".0f"))
        lines.append(tuple(cells))
    table = markdown.Table("", tuple(columns), tuple(lines), range(2, len(columns)))
    picture = f"![Time over a copy of as many bytes]({plot})"
    text = _wrapped(_MEASURED_TEXT.format(device, path))
    return "\n\n".join([text, markdown.render(table), picture])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _time(row: Row | None) -> str:
    if row is None or row.status != OK:
        return "-" if row is None else f"- ({row.status})"
    return markdown.number(row.ms, ".4f")


def replace_section(readme: str, new: str) -> str:
    """Raises ResultsError without exactly one pair of markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ResultsError("README.md: expected one pair of markers of the performance section")
    before, rest = readme.split(BEGIN)
    return before + new + rest.split(END)[1]


def digest(path: Path) -> str:
    """Of the data, in the plot drawn from it: so a stale plot is seen without drawing again."""
    return f"drawn from {path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def write_plots(folder: Path) -> None:
    for path, rows in load(folder):
        measured = rows[0].kind == MEASURED
        picture = plots.draw(shown(rows) if measured else rows)["ratio" if measured else "bytes"]
        plots.save(picture, _plot_path(path, rows), digest(path))


def problems(folder: Path, readme: Path) -> list[str]:
    found = []
    text = readme.read_text()
    if replace_section(text, section(folder)) != text:
        found.append(f"{readme.name}: the section on performance is not what bench/results gives")
    for path, rows in load(folder):
        plot = _plot_path(path, rows)
        if not plot.exists() or digest(path) not in plot.read_text():
            found.append(f"{plot.name} was not drawn from {path.name} as it is")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--recount", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            found = problems(RESULTS, README)
            print("\n".join(found) or "the README's section on performance is up to date")
            return 1 if found else 0
        if options.recount:
            recount(RESULTS, model.ModelSettings(count_elements=_ELEMENTS))
        write_plots(RESULTS)
        README.write_text(replace_section(README.read_text(), section(RESULTS)))
    except ResultsError as error:
        print(f"python -m bench readme: {error}", file=sys.stderr)
        return 2
    return 0
