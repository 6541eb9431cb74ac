"""Writes the operators' part of batchnorm_cuda/_C.pyi from their declaration in Python.

    python -m tools.stub                            # writes it
    python -m tools.stub --check                    # exit 1 where the file has something else

What arguments there are is told by the records of _ops/calls.py, which of them an operator has by
_ops/operators.py. What is no operator stands below that part, written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys

from batchnorm_cuda._ops.operators import OPERATORS, Operator
from bench.loading import ROOT

STUB = ROOT / "batchnorm_cuda" / "_C.pyi"
BEGIN = "# ---- operators: written by `python -m tools.stub`\n"
END = "# ---- what is no operator\n"


def function(operator: Operator) -> str:
    """The declaration of an operator, a signature a line."""
    schema = re.sub(r"\(.!\)", "", operator.schema)  # without the marks of what is updated
    listed = re.search(r"\((.*)\) ->", schema).group(1)
    arguments = ", ".join(map(_argument, listed.split(", ")))
    needs = ["need_" + result.removeprefix("grad_") for result in operator.results]
    kinds = ["Tensor | None" if need in operator.arguments else "Tensor" for need in needs]
    types, names = ", ".join(kinds), ", ".join(operator.results)
    if len(kinds) > 1:
        types, names = f"tuple[{types}]", f"({names})"
    about = operator.record.__doc__.partition("\n")[0]
    return f'def {operator.name}({arguments}) -> {types}:\n    """{about} Gives {names}."""\n'


def _argument(text: str) -> str:
    """As Python writes it, of a schema's: a default may follow."""
    kind, name, default = re.fullmatch(r"(\S+) (\w+)=?(.*)", text).groups()
    return f"{name}: {kind.replace('?', ' | None')}" + (f" = {default}" if default else "")


def generated(text: str) -> str:
    """The stub, with its operators' part as it ought to be."""
    head, begin, rest = text.partition(BEGIN)
    end, tail = rest.partition(END)[1:]
    if not (begin and end):
        raise ValueError(f"{STUB}: expected the lines {BEGIN.strip()!r} and {END.strip()!r}")
    functions = "\n".join(function(operator) for operator in OPERATORS.values())
    return f"{head}{begin}\n{functions}\n{end}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.stub")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    text = STUB.read_text()
    wanted = generated(text)
    if options.check:
        print("as generated" if text == wanted else "run `python -m tools.stub`", STUB, sep=": ")
        return int(text != wanted)
    STUB.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
