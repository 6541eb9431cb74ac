"""The benchmark's rows in a few lines: by kind of case, the worst, and case by case."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

_PEERS = ("cudnn", "native", "compile")
_SHORT = {"forward": "fwd", "backward": "bwd", "both": "both"}
_OPS = tuple(_SHORT)
_WORST = 6
_WORST_PLANS = 12

Row = Mapping[str, str]
Case = tuple[str, str, str, str]  # shape, layout, dtype, op


def times(rows: Iterable[Row]) -> dict[Case, dict[str, float]]:
    """Milliseconds by case and provider. The copy's are those beside which ours were taken."""
    found: dict[Case, dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok" and row["ms"]:
            case = (row["shape"], row["layout"], row["dtype"], row["op"])
            found.setdefault(case, {}).setdefault(row["provider"], float(row["ms"]))
    return found


def _mean(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}"


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric means of peers' times over ours: above 1 we are faster."""
    found = times(rows)
    bad = [row for row in rows if row["provider"] == "ours" and row["status"] != "ok"]
    lines = []
    for key in dict.fromkeys(case[1:3] for case in found):
        words = []
        for op in _OPS:
            of = [t for case, t in found.items() if case[1:] == (*key, op) and "ours" in t]
            means = [
                f"{peer} {_mean([t[peer] / t['ours'] for t in of if peer in t])}"
                for peer in (*_PEERS, "copy")
            ]
            words.append(f"{op}: {' '.join(means)}")
        lines.append(f"{' '.join(key)}  {'  '.join(words)}")
    for row in bad[:3]:
        names = ("shape", "layout", "dtype", "op", "status", "note")
        lines.append("ours " + " ".join(row[name] for name in names))
    title = f"== bench: time over ours, geometric means of {len(found)} cases; ours failed in "
    return [f"{title}{len(bad)}", *lines] if lines else []


def worst(rows: Sequence[Row]) -> list[str]:
    """Where the fastest peer is furthest ahead, and where the copy is."""
    found = {case: t for case, t in times(rows).items() if "ours" in t}
    lines: list[str] = []
    for title, peers in (("the fastest peer", _PEERS), ("the copy", ("copy",))):
        ratios = {
            case: t["ours"] / min(t[peer] for peer in peers if peer in t)
            for case, t in found.items()
            if any(peer in t for peer in peers)
        }
        ordered = sorted(ratios, key=lambda case: -ratios[case])[:_WORST]
        if ordered:
            said = [f"{' '.join(case)} {ratios[case]:.2f}" for case in ordered]
            lines.append(f"== ours over {title}, the worst:")
            lines += [" | ".join(said[at : at + 3]) for at in range(0, len(said), 3)]
    return lines


def cases(rows: Sequence[Row]) -> list[str]:
    """A line for each shape, layout and dtype."""
    found = times(rows)
    lines = []
    for key in dict.fromkeys(case[:3] for case in found):
        words = []
        for op in _OPS:
            t = found.get((*key, op))
            if t is None or "ours" not in t:
                continue
            shown = [f"{t[name]:.4f}" if name in t else "-" for name in ("ours", *_PEERS)]
            percent = f"{100 * t['copy'] / t['ours']:.0f}%" if "copy" in t else "-"
            words.append(f"{_SHORT[op]} {'/'.join(shown)} {percent}")
        lines.append(f"{' '.join(key)}  {'  '.join(words)}")
    title = "== ms of ours/cudnn/native/compile, percent of the copy's rate"
    return [title, *lines] if lines else []


def regret(rows: Sequence[Row]) -> list[str]:
    """Of a tune file: the chosen plan's time over that of the best, the worst first."""
    plans: dict[Case, list[Row]] = {}
    for row in rows:
        if row["status"] == "ok" and row["ms"] and row["strategy"] != "copy":
            case = (row["shape"], row["layout"], row["dtype"], row["op"])
            plans.setdefault(case, []).append(row)
    found = []
    for case, timed in plans.items():
        best = min(timed, key=lambda row: float(row["ms"]))
        chosen = [row for row in timed if row["chosen"] == "1"]
        if chosen:
            ratio = float(chosen[0]["ms"]) / float(best["ms"])
            found.append((ratio, case, f"{_plan(chosen[0])}; best {_plan(best)}"))
    found.sort(reverse=True)
    if not found:
        return []
    middle = found[len(found) // 2][0]
    lines = [f"{ratio:.2f} {' '.join(case)}: {said}" for ratio, case, said in found[:_WORST_PLANS]]
    return [f"== tune: regret of {len(found)} problems, median {middle:.3f}", *lines]


def _plan(row: Row) -> str:
    names = ("strategy", "pattern", "scope", "team_size", "slab", "splits")
    said = [row[name] for name in names if row[name] not in ("", "0")]
    return f"{' '.join(said)} {float(row['ms']):.4f} ms"
