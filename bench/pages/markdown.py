"""Tables of results as Markdown; the HTML report shows the same cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..rows.fused import FusedRow
from ..rows.results import INACCURATE, MODEL, OK, Row

MODEL_NOTE = (
    "**Model.** No figure below is measured: bytes are predicted by the plan for a described "
    "device, counted on a CPU model of CUDA for a problem cut to a part of that device, or taken "
    "from the peers' byte models (bench/models/byte_model.py). There is no byte model of cuDNN, "
    "whose source is closed, nor of torch.compile."
)
MEASURED_NOTE = (
    "Median and 20th to 80th percentile, cold L2 cache, providers in turns. GB/s are compulsory "
    "bytes over time, the same bytes for every provider. Error: the largest over what the tests "
    "allow; beyond 1 nothing is timed."
)


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: range  # the columns that are numbers


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each set and operation, and last the sums of the sets that are whole networks."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.set, row.op), []).append(row)
    found = [_table(name, op, members) for (name, op), members in groups.items()]
    sums = step_sums(rows)
    return [*found, *([sums] if sums else [])]


def _table(name: str, op: str, rows: list[Row]) -> Table:
    if rows[0].kind == MODEL:
        columns = ("shape", "provider", "what runs", "model: bytes", "model: x compulsory")
        columns += ("model: counted x compulsory", "on a cut problem", "note")
        return Table(
            f"{name}, {op} (model)", columns, tuple(_model_cells(r) for r in rows), range(3, 6)
        )
    columns = ("shape", "provider", "what runs", "ms", "20-80 %", "GB/s", "% of copy")
    columns += ("time / native", "error", "peak", "note")
    natives = {row.case: row for row in rows if row.provider == "native"}
    cells = tuple(_measured_cells(row, natives.get(row.case)) for row in rows)
    return Table(f"{name}, {op}", columns, cells, range(3, 10))


def shape(row: Row | FusedRow) -> str:
    times = f" ({row.count} of them)" if row.count > 1 else ""
    return f"{row.shape} {row.layout} {row.dtype}{times}"


def _model_cells(row: Row) -> tuple[str, ...]:
    cut = ""
    if row.model_counted_shape:
        cut = f"{row.model_counted_shape} on {row.model_counted_sms} SMs"
    return (
        shape(row),
        row.provider,
        row.backend,
        mega(row.model_bytes),
        number(row.model_ratio, ".2f"),
        number(row.model_counted_ratio, ".2f"),
        cut,
        row.note if row.status == OK else f"{row.status}: {row.note}",
    )


def _measured_cells(row: Row, native: Row | None) -> tuple[str, ...]:
    ratio = row.ms / native.ms if row.ms and native and native.ms else None
    note = row.note if row.status == OK else f"{row.status}: {row.note}"
    return (
        shape(row),
        row.provider,
        row.backend,
        number(row.ms, ".4f"),
        f"{row.ms_p20:.4f}-{row.ms_p80:.4f}" if row.ms_p20 is not None else "",
        number(row.gb_s, ".0f"),
        number(row.copy_percent, ".0f"),
        number(ratio, ".2f"),
        number(row.error, ".2g" if row.status != INACCURATE else ".3g"),
        mega(row.peak_bytes),
        note,
    )


def step_sums(rows: Sequence[Row | FusedRow]) -> Table | None:
    """Of all batch norms of a network in a training step, by provider. None if there is no such:
    of shapes that are given one by one, each is there once.
    """
    groups: dict[tuple[str, ...], dict[str, list[Row | FusedRow]]] = {}
    for row in rows:
        if row.op == "both":
            key = (row.set, row.layout, row.dtype)
            groups.setdefault(key, {}).setdefault(row.provider, []).append(row)
    networks = {}
    for key, providers in groups.items():
        most = max(sum(r.count for r in members) for members in providers.values())
        if most > len(next(iter(providers.values()))):
            networks[key] = providers
    return sum_table(networks, rows[0].kind == MODEL) if networks else None


def sum_table(
    networks: Mapping[tuple[str, ...], Mapping[str, Sequence[Row | FusedRow]]], model: bool
) -> Table:
    """Of the rows of each network by provider."""
    lines = [
        _sum_cells(key, name, members)
        for key, providers in networks.items()
        for name, members in providers.items()
    ]
    figures = ("model: bytes", "model: x compulsory") if model else ("ms", "GB/s")
    columns = ("network", "provider", "batch norms", *figures)
    return Table(
        "Sum of a training step" + (" (model)" if model else ""), columns, tuple(lines), range(2, 5)
    )


def _sum_cells(
    key: tuple[str, ...], provider: str, rows: Sequence[Row | FusedRow]
) -> tuple[str, ...]:
    total = sum(row.count for row in rows)
    ran = [row for row in rows if row.ms is not None or row.model_bytes is not None]
    left_out = total - sum(row.count for row in ran)
    compulsory = sum(row.count * row.compulsory_bytes for row in ran)
    cells = (" ".join(key), provider, f"{total - left_out} of {total}" if left_out else str(total))
    if left_out:  # a sum of fewer layers must not pass for a faster one
        return (*cells, "", "")
    if rows[0].kind == MODEL:
        moved = sum(row.count * (row.model_bytes or 0) for row in ran)
        return (*cells, mega(moved), f"{moved / compulsory:.2f}")
    ms = sum(row.count * (row.ms or 0.0) for row in ran)
    return (*cells, f"{ms:.3f}", f"{compulsory / ms * 1e-6:.0f}")


def number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def mega(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.1f} MB"


def render(table: Table) -> str:
    """As Markdown, numbers to the right."""
    right = ["---:" if at in table.numbers else "---" for at in range(len(table.columns))]
    lines = [table.columns, right, *table.rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def document(environment: dict, rows: Sequence[Row]) -> str:
    """A page: where it ran, what the figures are, and all tables."""
    model = rows[0].kind == MODEL
    title = f"# Batch norm on {environment.get('device', rows[0].device)}"
    title += " (model)" if model else ""
    return page(title, MODEL_NOTE if model else MEASURED_NOTE, environment, tables(rows))


def page(title: str, note: str, environment: dict, tables: Sequence[Table]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in environment.items())
    parts = [title, note, facts]
    for table in tables:
        parts += [f"## {table.title}", render(table)]
    return "\n\n".join(parts) + "\n"
