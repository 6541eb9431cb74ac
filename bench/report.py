"""Writes what is read by people from the rows of a run: Markdown, plots, and one HTML file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pages import fused, html, markdown, plots
from .rows.fused import FusedRow
from .rows.results import ResultsError, Row, read_csv, read_environment


@dataclass(frozen=True)
class Written:
    markdown: str
    files: tuple[Path, ...]


def write(csv_path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> Written:
    """Beside the CSV file, under its name."""
    text = markdown.document(environment, rows)
    pictures = plots.draw(rows)
    files = [csv_path, csv_path.with_suffix(".json"), csv_path.with_suffix(".md")]
    files[-1].write_text(text)
    for name, picture in pictures.items():
        for kind in ("svg", "png"):
            files.append(csv_path.with_name(f"{csv_path.stem}-{name}.{kind}"))
            plots.save(picture, files[-1])
    files.append(csv_path.with_suffix(".html"))
    files[-1].write_text(html.render(environment, rows, pictures))
    return Written(text, tuple(files))


def write_fused(csv_path: Path, environment: dict[str, Any], rows: Sequence[FusedRow]) -> Written:
    """Of `--fuse`: Markdown beside the CSV file."""
    text = fused.document(environment, rows)
    files = (csv_path, csv_path.with_suffix(".json"), csv_path.with_suffix(".md"))
    files[-1].write_text(text)
    return Written(text, files)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("run", type=Path, help="the CSV file of a run")
    options = parser.parse_args(arguments)
    try:
        rows = read_csv(options.run)
        if not rows:
            raise ResultsError(f"{options.run}: no rows")
    except ResultsError as error:
        print(f"python -m bench report: {error}", file=sys.stderr)
        return 2
    for file in write(options.run, read_environment(options.run), rows).files:
        print(f"wrote {file}")
    return 0
