"""Prints issue budgets: kernels by name, and a summary for docs/issue-budget.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .budget import ISSUE_SHARE, Budget, slots_per_window
from .kernels import is_exact, is_fused
from .listing import KINDS
from .table import align

Devices = Mapping[str, Mapping[str, Any]]


def devices_of(arch: str, known: Devices) -> Devices:
    """Those of an architecture ("8.0")."""
    return {
        name: device
        for name, device in known.items()
        if f"{device['compute_major']}.{device['compute_minor']}" == arch
    }


def budget_table(found: list[Budget], known: Devices) -> str:
    """A line per kernel and part; the share of issue slots on each device of its architecture."""
    rows = [["kernel", "arch", "part", "per 16 B", "per element", *KINDS, "issue slots"]]
    for budget in found:
        rows.append(
            [
                budget.kernel.name,
                budget.kernel.arch,
                budget.part,
                f"{budget.instructions:.1f}",
                f"{budget.per_element:.1f}",
                *(f"{budget.per_window.get(kind, 0):.1f}" for kind in KINDS),
                ", ".join(
                    f"{name} {budget.share(device):.0%}"
                    for name, device in devices_of(budget.kernel.arch, known).items()
                ),
            ]
        )
    return align(rows)


def budget_markdown(found: list[Budget], known: Devices) -> str:
    """One line per kernel, access pattern, part and dtype; the most of its instances (index widths,
    variants) and, for instructions, of the architectures."""
    archs = {budget.kernel.arch for budget in found}
    shown = {
        name: device for arch in sorted(archs) for name, device in devices_of(arch, known).items()
    }
    limits = " | ".join(f"{slots_per_window(device):.0f}" for device in shown.values())
    lines = [
        f"| kernel | part | dtype | instructions per element | {' | '.join(shown)} |",
        "|---" * (4 + len(shown)) + "|",
        f"| *issue slots per 16 B a thread at full bandwidth* | | | | {limits} |",
    ]
    groups: dict[tuple[str, str, str], list[Budget]] = {}
    for budget in found:
        key = (
            short_name(budget.kernel.name),
            budget.part,
            budget.scalar.removeprefix("__nv_").removeprefix("__"),
        )
        groups.setdefault(key, []).append(budget)
    for (name, part, scalar), group in sorted(groups.items()):
        counts = [budget.per_element for budget in group]
        shares = [_share(group, device) for device in shown.values()]
        count = f"{min(counts):.1f}-{max(counts):.1f}"
        lines.append(f"| {name} | {part} | {scalar} | {count} | {' | '.join(shares)} |")
    return "\n".join(lines)


_PATTERNS = {"Row": "a row", "Runs": "S", "Samples": "samples"}


def short_name(name: str) -> str:
    """ "team forward, along S" of a kernel's full name."""
    operation = re.search(r"Team(Forward|Backward)", name)
    kernel = f"team {operation.group(1).lower()}" if operation else name.split("_kernel")[0]
    pattern = re.search(r"Along(\w+)", name)
    along = _PATTERNS.get(pattern.group(1), pattern.group(1)) if pattern else ""
    edges = "" if is_exact(name) or along == "samples" else ", with edges"
    fused = ", fused" if is_fused(name) else ""
    return f"{kernel.replace('_', ' ')}, along {along}{edges}{fused}"


def _share(group: list[Budget], device: Mapping[str, Any]) -> str:
    arch = f"{device['compute_major']}.{device['compute_minor']}"
    share = max((b.share(device) for b in group if b.kernel.arch == arch), default=None)
    if share is None:
        return "-"
    over = any(b.held_to_share for b in group) and share > ISSUE_SHARE
    return f"**{share:.0%}**" if over else f"{share:.0%}"


def over_budget(found: list[Budget], known: Devices) -> list[str]:
    """The parts that need more than ISSUE_SHARE of the issue slots of a device."""
    return [
        f"{budget.kernel.name} for {budget.kernel.arch}, {budget.part}: "
        f"{budget.instructions:.1f} instructions per 16 B, {budget.share(device):.0%} of "
        f"{name}'s issue slots"
        for budget in found
        if budget.held_to_share
        for name, device in devices_of(budget.kernel.arch, known).items()
        if budget.share(device) > ISSUE_SHARE
    ]
