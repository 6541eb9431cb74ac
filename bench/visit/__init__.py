"""`python -m bench visit`: all that a GPU can tell, in parts that cannot take each other along.

    parts.py    what a part is, and what is here to run it on
    plans.py    which parts a visit has, in order
    process.py  a command that ends in time, with everything that it started
    runner.py   the parts one after the other: limits, needs, verdicts
    folder.py   the few files that come back
    table.py    what is said at the end

`python -m bench gpu-check` is one of the plans. The other modules are parts of their own.
"""

from __future__ import annotations


def main(arguments: list[str]) -> int:
    from .command import main  # with torch, which the parts' own modules may not need

    return main(arguments)
