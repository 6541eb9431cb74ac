"""Runs parts one after the other: each within its time, and only if what it needs is there."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .log import Log
from .parts import (
    FAIL,
    HOST,
    MISSING,
    NO_GPU,
    NO_TIME,
    NOTHING_TO_RUN_ON,
    PASS,
    SKIPPED,
    Outcome,
    Part,
    Site,
)
from .process import Done, Sink, run_command

_SHOWN_COMMAND = 60  # characters
_LEAST_SECONDS = 3.0  # with less a part is not begun: Python and torch take that to start


FIRST = "device"  # the part without which it is not known what the others run on


class Stopped(BaseException):
    """The visit itself is to end, by the signal that this names."""


@dataclass(frozen=True)
class Verdict:
    name: str
    outcome: Outcome
    seconds: float

    def __str__(self) -> str:
        status, text = self.outcome.status, self.outcome.text
        return f"{status:<8} {self.name:<12} {self.seconds:5.0f} s  {text}"


def tail(output: str) -> str:
    """The last line that says something."""
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    return lines[-1][:300] if lines else "no output"


def run_part(part: Part, site: Site, left: float, sink: Sink | None = None) -> Outcome:
    """The commands of a part one after the other, up to the first that does not pass."""
    absent = part.absent()
    if absent is not None:
        return absent
    missing = part.missing(site)
    if missing is not None and not (part.host and not site.gpu):
        return missing
    deadline = time.monotonic() + left
    last = Done(0, "")
    for command in part.commands(replace(site, seconds=left)):
        if sink is not None:
            sink(f"$ {' '.join(command)}\n".encode())
        seconds = deadline - time.monotonic()
        emulate, variables = not site.gpu, site.variables
        last = run_command(command, seconds, emulate=emulate, variables=variables, sink=sink)
        if last.status != 0:
            return _not_passed(part, site, command, last, left)
    text = tail(last.output)
    if site.gpu:
        return Outcome(PASS, text)
    return Outcome(HOST, f"{text} [{missing.text if missing else 'on the host build'}]")


def _not_passed(part: Part, site: Site, command: Sequence[str], done: Done, left: float) -> Outcome:
    shown = tail(done.output)
    if done.status is None:
        return Outcome(FAIL, f"out of time after {left:.0f} s: {shown}")
    if done.status == NOTHING_TO_RUN_ON and part.module:
        return Outcome(MISSING if site.gpu else NO_GPU, shown)
    how = f"exit status {done.status}"
    if done.status < 0:
        how = f"ended by {signal.Signals(-done.status).name}"
    said = " ".join([Path(command[0]).name, *command[1:]])
    said = said if len(said) <= _SHOWN_COMMAND else f"{said[:_SHOWN_COMMAND]}..."
    return Outcome(FAIL, f"{how} of `{said}`: {shown}")


def run_all(
    parts: Sequence[Part],
    site: Site,
    seconds: float,
    show: Callable[[Verdict], object],
    log: Log | None = None,
    before: Sequence[Verdict] = (),
) -> list[Verdict]:
    """A part may take what is left when those behind it have their reserve."""
    verdicts = list(before)
    end = time.monotonic() + seconds
    for at, part in enumerate(parts):
        started = time.monotonic()
        reserve = sum(later.reserve for later in parts[at + 1 :])
        outcome = _unmet(part, verdicts)
        if outcome is None:
            # Compiling and running the host build takes as long as it takes.
            limit = part.limit if site.gpu else float("inf")
            left = min(max(part.reserve, end - started - reserve), end - started, limit)
            outcome = Outcome(NO_TIME, f"{max(0.0, end - started):.0f} s were left")
            if left >= min(_LEAST_SECONDS, part.reserve / 2):
                if log is not None:
                    log.begin(part.name)
                try:
                    outcome = run_part(part, site, left, log.write if log else None)
                except Stopped as stop:
                    outcome = Outcome(FAIL, f"stopped by {stop}")
                    show(Verdict(part.name, outcome, time.monotonic() - started))
                    raise
        verdicts.append(Verdict(part.name, outcome, time.monotonic() - started))
        show(verdicts[-1])
    return verdicts


def _unmet(part: Part, verdicts: Sequence[Verdict]) -> Outcome | None:
    """What is missing, rather than failed, a part may have by other ways, or says so itself."""
    for verdict in verdicts:
        if verdict.name in (FIRST, *part.needs) and verdict.outcome.status in (
            FAIL,
            SKIPPED,
            NO_TIME,
        ):
            return Outcome(SKIPPED, f"needs {verdict.name}: {verdict.outcome.status}")
    return None


def exit_status(verdicts: Sequence[Verdict], rehearse: bool) -> int:
    """0: all passed; 1: something failed; 2: nothing failed, but something is missing."""
    statuses = {verdict.outcome.status for verdict in verdicts}
    if FAIL in statuses:
        return 1
    return 0 if statuses <= {PASS} or (rehearse and NO_TIME not in statuses) else 2


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """The last line: what is missing, by name."""
    by_status = {
        status: [v.name for v in verdicts if v.outcome.status == status]
        for status in dict.fromkeys(v.outcome.status for v in verdicts)
    }
    passed = len(by_status.pop(PASS, []))
    parts = [f"{status}: {', '.join(names)}" for status, names in by_status.items()]
    return f"{passed} of {len(verdicts)} passed on a GPU" + "".join(f"; {part}" for part in parts)
