"""The page of `--fuse`: a batch norm and what stands behind it, by shape, and the sum of a step."""

from __future__ import annotations

from collections.abc import Sequence

from ..rows.fused import FusedRow
from ..rows.results import MODEL, OK
from .markdown import Table, mega, number, page, shape, sum_table

_WHO = (
    "Forward and backward in training. `torch`: torch.nn's batch norm, then the add and the "
    "activation in place; `ours`: the same with our batch norm; `ours:fused`: all in one. "
    "Compulsory bytes are those of one pass that does it all, the same for every provider."
)
MODEL_NOTE = (
    f"**Model.** No figure below is measured. {_WHO} Our batch norms' bytes are predicted by the "
    "plan for a described device. Those of torch's operators are byte models "
    "(bench/models/byte_model.py), of PyTorch's native batch norm: cuDNN's traffic is not "
    "published. Each operator finds the cache cold; where tensors fit it, operators of their own "
    "move less."
)
MEASURED_NOTE = (
    f"Median and 20th to 80th percentile, cold L2 cache, providers in turns. {_WHO} GB/s are "
    "compulsory bytes over time. Outputs that differ from float64 by too much are not timed."
)


def tables(rows: Sequence[FusedRow]) -> list[Table]:
    """One for each network, layout and dtype, and the sums of a training step."""
    networks: dict[tuple[str, ...], dict[str, list[FusedRow]]] = {}
    for row in rows:
        key = (row.set, row.layout, row.dtype)
        networks.setdefault(key, {}).setdefault(row.provider, []).append(row)
    model = rows[0].kind == MODEL
    found = [
        _table(" ".join(key), [row for row in rows if (row.set, row.layout, row.dtype) == key])
        for key in networks
    ]
    return [*found, sum_table(networks, model)]


def _table(name: str, rows: Sequence[FusedRow]) -> Table:
    model = rows[0].kind == MODEL
    if model:
        figures: tuple[str, ...] = ("model: bytes", "model: x compulsory")
    else:
        figures = ("ms", "20-80 %", "GB/s", "time / torch")
    columns = ("shape", "behind", "provider", "what runs", *figures, "note")
    torchs = {row.case: row.ms for row in rows if row.provider == "torch"}
    cells = tuple(_cells(row, model, torchs.get(row.case)) for row in rows)
    title = name + (" (model)" if model else "")
    return Table(title, columns, cells, range(4, 4 + len(figures)))


def _cells(row: FusedRow, model: bool, torch_ms: float | None) -> tuple[str, ...]:
    if model:
        figures: tuple[str, ...] = (mega(row.model_bytes), number(row.model_ratio, ".2f"))
    else:
        figures = (
            number(row.ms, ".4f"),
            f"{row.ms_p20:.4f}-{row.ms_p80:.4f}" if row.ms_p20 is not None else "",
            number(row.gb_s, ".0f"),
            number(row.ms / torch_ms if row.ms and torch_ms else None, ".2f"),
        )
    note = row.note if row.status == OK else f"{row.status}: {row.note}"
    return (shape(row), row.behind, row.provider, row.backend, *figures, note)


def document(environment: dict, rows: Sequence[FusedRow]) -> str:
    model = rows[0].kind == MODEL
    title = "# Batch norm and what stands behind it on "
    title += environment.get("device", rows[0].device) + (" (model)" if model else "")
    return page(title, MODEL_NOTE if model else MEASURED_NOTE, environment, tables(rows))
