"""Prints kernels as tables: one line per template and architecture, or one per instance."""

from __future__ import annotations

from itertools import groupby

from .kernels import Kernel, MainLoop


def template_table(kernels: list[Kernel]) -> str:
    """Ranges over the instances of each kernel template."""
    rows = [
        [
            "kernel", "arch", "instances", "registers", "blocks/SM", "stack", "local", "shared",
            "code", "loads", "stores", "instructions/16 B, exact", "masked",
        ]
    ]  # fmt: skip
    for (template, arch), group in groupby(
        sorted(kernels, key=lambda k: (k.template, float(k.arch))),
        key=lambda k: (k.template, k.arch),
    ):
        members = list(group)
        r = [member.resources for member in members]
        rows.append(
            [
                template,
                arch,
                str(len(members)),
                _range([x.registers for x in r]),
                _range([member.blocks_per_sm for member in members]),
                str(sum(x.stack_bytes for x in r)),
                str(sum(m.local_accesses for m in members)),
                _range([x.static_shared_bytes for x in r]),
                _range([member.instructions for member in members]),
                _widths([member.loads for member in members]),
                _widths([member.stores for member in members]),
                _range([_per_window(m) for m in members if m.exact]),
                _range([_per_window(m) for m in members if not m.exact]),
            ]
        )
    return align(rows)


def instance_table(kernels: list[Kernel]) -> str:
    rows = [
        [
            "kernel", "arch", "registers", "limit", "blocks/SM", "stack", "local", "shared",
            "code", "loads", "stores", "main loop", "moves", "instructions/16 B",
        ]
    ]  # fmt: skip
    for kernel in kernels:
        r, loop = kernel.resources, kernel.main_loop
        moves = f"{_widths([loop.loads])} > {_widths([loop.stores])}" if loop else "-"
        rows.append(
            [
                kernel.name,
                kernel.arch,
                str(r.registers),
                str(kernel.register_limit),
                str(kernel.blocks_per_sm),
                str(r.stack_bytes),
                str(kernel.local_accesses),
                str(r.static_shared_bytes),
                str(kernel.instructions),
                _widths([kernel.loads]),
                _widths([kernel.stores]),
                _loop(loop),
                moves,
                _range([_per_window(kernel)]),
            ]
        )
    return align(rows)


def _loop(loop: MainLoop | None) -> str:
    if loop is None:
        return "-"
    return f"{loop.instructions}" + (f" + {loop.nested} inside" if loop.nested else "")


def _per_window(kernel: Kernel) -> float | None:
    return kernel.main_loop.instructions_per_window if kernel.main_loop else None


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = (f"{value:.1f}".removesuffix(".0") for value in (min(known), max(known)))
    return low if low == high else f"{low}-{high}"


def _widths(counts: list[dict[int, int]]) -> str:
    """Instructions by width in bits: "128x4 32x1"; ranges over several kernels."""
    widths = sorted({bits for count in counts for bits in count}, reverse=True)
    texts = [f"{bits}x{_range([count.get(bits, 0) for count in counts])}" for bits in widths]
    return " ".join(texts) or "-"


def align(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
