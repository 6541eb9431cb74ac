"""Everything that needs a GPU, in one command, with a verdict a line.

    python -m bench gpu-check [--minutes 10] [--rehearse] [--out FOLDER] [--peer-tolerance 1]

Builds the kernels, runs the whole test suite on cuda, compute-sanitizer over the driver without
PyTorch, 100 equal runs, CUDA graphs, and the benchmark's short set, which leaves CSV, Markdown and
HTML in bench/results under the GPU's name.

Without a GPU each step is rehearsed on the host build, or says that it needs one. Exit status 0 if
all passed, 1 if something failed, 2 if nothing failed but something is missing; with --rehearse 0
for that as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import report
from .rows.results import read_csv, read_environment, write_json
from .visit import plans
from .visit.parts import Site, find_site
from .visit.runner import Verdict, conclusion, exit_status, run_all


def add_to_report(site: Site, verdicts: Sequence[Verdict]) -> list[Path]:
    """The verdicts go into the files that the benchmark has written, if it has."""
    path = site.csv_path
    if not path.exists():
        return []
    rows, environment = read_csv(path), read_environment(path)
    if not rows:
        return []
    environment |= {f"check, {v.name}": f"{v.outcome.status}, {v.outcome.text}" for v in verdicts}
    write_json(path.with_suffix(".json"), environment, rows)
    return list(report.write(path, environment, rows).files)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu-check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rehearse", action="store_true", help="as if there were no GPU")
    parser.add_argument("--out", type=Path, help="default: bench/results, or build/gpu-check")
    parser.add_argument("--peer-tolerance", type=float, default=1, help="see python -m bench")
    options = parser.parse_args(arguments)
    site = find_site(options.rehearse, options.out)
    site = replace(site, peer_tolerance=options.peer_tolerance)
    show = partial(print, flush=True)
    verdicts = run_all(plans.CHECK, site, 60 * options.minutes, show)
    for file in add_to_report(site, verdicts):
        print(f"wrote {file}")
    print(conclusion(verdicts))
    return exit_status(verdicts, options.rehearse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
