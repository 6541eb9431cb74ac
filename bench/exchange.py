"""`python -m bench exchange`: what a launch costs, and an exchange between the blocks of a team.

Launches: a tiny problem, again and again, by one block (a plain launch), two blocks of a cluster,
and two of a cooperative grid; the latter two include one exchange. In one CUDA graph, where a
grid's flags are cleared by a node of their own, and launch by launch, where they need not be.

Exchanges: teams of each scope and size on problems of which every block holds the same few bytes,
warm in the L2 cache, in a few rounds and in many. The slope is the time of a round; what it exceeds
that of a lone block by is the exchange. Along S its slots are 16 bytes, and all of it is waiting;
along C they are a kilobyte. Without a GPU: see `python -m bench tune`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .loading import ROOT
from .rows import records
from .timing.clock import Call, interleave
from .timing.providers import EPS, MOMENTUM
from .timing.samples import Spread, spread
from .tune import Setting, find_setting
from .tuning.rows import FAILED, HOST, OK, UNSUPPORTED

# Of a block of 256 threads, in float16. Along S four windows a thread: with fewer, channels would
# share the block. Along C a slab of eight windows, one a thread.
_RUN, _ROWS, _SLAB_CHANNELS = 8192, 32, 64
_CLUSTERS, _GRIDS = (2, 4, 8), (2, 4, 8, 16, 33, 66, 132)
_MOST_GROUPS = 1024  # of the plan that is asked how many teams there are at once


@dataclass(frozen=True)
class ExchangeRow:
    kind: str
    device: str
    what: str  # launch or exchange
    pattern: str
    scope: str
    team_size: int
    two_level: int = 0
    us: float | None = None  # median, of a launch or of a round
    us_exchange: float | None = None  # of a round, beyond that of a lone block
    method: str = (
        ""  # graph, or launch by launch between two events; on the model, the host's clock
    )
    status: str = OK
    note: str = ""


@dataclass(frozen=True)
class Effort:
    calls: int  # in a row; the host must be done with them while the clock's spin runs
    rounds: tuple[int, int]  # of a team: few and many
    samples: int


GPU_EFFORT = Effort(calls=10, rounds=(2, 8), samples=20)
HOST_EFFORT = Effort(calls=1, rounds=(1, 2), samples=1)


@dataclass(frozen=True)
class Forced:
    """A team whose blocks hold a few kilobytes each."""

    pattern: str
    scope: str
    size: int

    @property
    def options(self) -> dict[str, Any]:
        options = {"pattern": self.pattern, "scope": self.scope}
        if self.pattern == "along_c":
            options["slab"] = 8
        return {**options, "strategy": "team", "team_size": self.size}

    def sizes(self, groups: int) -> tuple[int, int, int]:
        """[n, c, s] of so many channel groups."""
        if self.pattern == "along_s":
            return self.size, groups, _RUN
        return _ROWS * self.size, _SLAB_CHANNELS * groups, 1


def teams_of(patterns: tuple[str, ...]) -> Iterator[Forced]:
    """The lone block before those that are set against it."""
    for pattern in patterns:
        yield Forced(pattern, "block", 1)
        yield from (Forced(pattern, "cluster", size) for size in _CLUSTERS)
        yield from (Forced(pattern, "grid", size) for size in _GRIDS)


def planned(setting: Setting, team: Forced, sizes: tuple[int, int, int]) -> dict[str, Any] | None:
    """The team that the planner makes of it, or None where it cannot be honoured."""
    plan = setting.extension.make_plan(
        "forward_training", *sizes, "float16", setting.planner_device, team.options
    )
    found = plan.get("team", {})
    got = tuple(found.get(name) for name in ("pattern", "scope", "size"))
    return found if got == (team.pattern, team.scope, team.size) else None


def make_call(setting: Setting, team: Forced, sizes: tuple[int, int, int], calls: int) -> Call:
    """The problem so many times in a row."""
    n, c, s = sizes
    x = torch.randn((n, c, s) if s > 1 else (n, c), device=setting.machine.device).half()

    def run() -> None:
        setting.extension.set_plan_options(team.options)
        for _ in range(calls):
            setting.extension.forward(x, *(None,) * 5, True, MOMENTUM, EPS)

    run()  # loads the kernel, before a graph may capture it
    return run


def time_calls(setting: Setting, effort: Effort, calls: dict[str, Call]) -> dict[str, Spread]:
    """Microseconds of one call each; the first round loads what is still to be loaded."""
    clock = setting.machine.clock(False)
    found = interleave({name: [call] for name, call in calls.items()}, clock, effort.samples + 1)
    per_call = 1000 / effort.calls
    return {name: spread([ms * per_call for ms in times[1:]]) for name, times in found.items()}


def launch_rows(setting: Setting, effort: Effort) -> Iterator[ExchangeRow]:
    for scope, size in (("block", 1), ("cluster", 2), ("grid", 2)):
        team = Forced("along_s", scope, size)
        row = _row(setting, "launch", team)
        if planned(setting, team, team.sizes(1)) is None:
            yield replace(row, status=UNSUPPORTED, note="the device has no such teams")
            continue
        try:
            call = make_call(setting, team, team.sizes(1), effort.calls)
            calls = {_eager(setting): call}
            if setting.machine.capture is not None:
                calls["graph"] = setting.machine.capture(call)[0]
            for method, times in time_calls(setting, effort, calls).items():
                yield replace(row, us=times.median, method=method)
        except RuntimeError as reason:
            yield replace(row, status=FAILED, note=_first_line(reason))


def exchange_row(
    setting: Setting, effort: Effort, team: Forced, block_us: float | None
) -> ExchangeRow:
    row = _row(setting, "exchange", team)
    most = planned(setting, team, team.sizes(_MOST_GROUPS))
    if most is None:
        return replace(row, status=UNSUPPORTED, note="the device has no such teams")
    few, many = effort.rounds
    at_once = most["teams"] if team.scope != "block" else _places(setting, most)
    calls = {}
    try:
        for rounds in effort.rounds:
            sizes = team.sizes(at_once * rounds)
            found = planned(setting, team, sizes)
            if team.scope != "block" and (found is None or found["rounds"] != rounds):
                return replace(row, status=UNSUPPORTED, note=f"no plan of {rounds} rounds")
            calls[str(rounds)] = make_call(setting, team, sizes, effort.calls)
        times = time_calls(setting, effort, calls)
    except RuntimeError as reason:
        return replace(row, status=FAILED, note=_first_line(reason))
    us = (times[str(many)].median - times[str(few)].median) / (many - few)
    more = None if block_us is None else us - block_us
    values = {"us": us, "us_exchange": more, "two_level": int(most["two_level"])}
    return replace(row, **values, method=_eager(setting))


def _places(setting: Setting, team: dict[str, Any]) -> int:
    """Lone blocks at work at once, where the grid is of all of them."""
    return team["blocks_per_sm"] * setting.planner_device["sm_count"]


def _eager(setting: Setting) -> str:
    return "host" if setting.kind == HOST else "events"


def _row(setting: Setting, what: str, team: Forced) -> ExchangeRow:
    where = (setting.kind, setting.machine.name, what)
    return ExchangeRow(*where, team.pattern, team.scope, team.size)


def _first_line(reason: BaseException) -> str:
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]


def rows(setting: Setting, effort: Effort) -> Iterator[ExchangeRow]:
    with setting.machine.scope():
        try:
            yield from launch_rows(setting, effort)
            block_us = None
            for team in teams_of(("along_s", "along_c")):
                block_us = None if team.scope == "block" else block_us
                row = exchange_row(setting, effort, team, block_us)
                block_us = row.us if team.scope == "block" else block_us
                yield row
        finally:
            setting.extension.set_plan_options({})


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", metavar="FOLDER")
    options = parser.parse_args(arguments)
    setting = find_setting("exchange")
    if setting is None:
        return 2
    effort = HOST_EFFORT if setting.kind == HOST else GPU_EFFORT
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "exchange.csv"
    path.unlink(missing_ok=True)
    for row in rows(setting, effort):
        records.append(path, row)
        print(_line(row), flush=True)
    print(f"wrote {path}")
    return 0


def _line(row: ExchangeRow) -> str:
    name = f"{row.what:9}{row.pattern:8}{row.scope:8}{row.team_size:4}"
    if row.us is None:
        return f"{name}  {row.status}: {row.note}"
    unit = "us" if row.kind != HOST else "host us"
    beyond = "" if row.us_exchange is None else f", exchange {row.us_exchange:.3f}"
    return f"{name}{row.us:12.3f} {unit} by {row.method}{beyond}{', two levels' * row.two_level}"
