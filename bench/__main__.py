"""`python -m bench`: see `--help` (bench/options.py)."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = ("compare", "report", "readme", "gpu-check", "visit", "tune", "exchange", "calibrate")
COMMANDS += ("build-time", "reach")
EXTRA = ("matplotlib", "tqdm", "jinja2")  # "bench" of pyproject.toml


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            return _command(arguments[0], arguments[1:])
        return _run(arguments)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(f"python -m bench: {error}: `pip install '.[bench]'` brings it", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    from . import options, runner
    from .cases.collect import CollectError

    try:
        return runner.run(options.parse(arguments))
    except CollectError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


def _command(name: str, rest: list[str]) -> int:
    """Imported one by one: a comparison of files should not wait for torch."""
    module = import_module(f".{name.replace('-', '_')}", __package__)
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
