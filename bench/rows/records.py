"""Rows of a dataclass in a CSV file that grows by a row at a time: a run that is cut short leaves
what it has.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

R = TypeVar("R")


class RecordsError(ValueError):
    """A file is not one of ours."""


def columns(cls: type) -> list[str]:
    return [field.name for field in fields(cls)]


def append(path: Path, row: Any) -> None:
    """Adds a line, and before the first one the header."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns(type(row)), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: _text(value) for name, value in asdict(row).items()})
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, cls: type[R]) -> list[R]:
    """Raises RecordsError where the file is missing, has other columns or unreadable values."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != columns(cls):
                raise RecordsError(f"{path}: expected the columns {', '.join(columns(cls))}")
            return [_row(path, reader.line_num, record, cls) for record in reader]
    except OSError as error:
        raise RecordsError(f"{path}: {error.strerror}") from None


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _row(path: Path, line: int, record: Mapping[str, Any], cls: type[R]) -> R:
    types, values = get_type_hints(cls), {}
    for name, text in record.items():
        try:
            values[name] = _value(str(types[name]), text)
        except (KeyError, TypeError, ValueError):
            raise RecordsError(f"{path}, line {line}: {name} cannot be {text!r}") from None
    return cls(**values)


def _value(kind: str, text: str) -> object:
    if "None" in kind and text == "":
        return None
    if "float" in kind:
        return float(text)
    if "int" in kind:
        return int(text)
    if text is None:
        raise ValueError("the line is cut short")
    return text
