"""Compiles the kernels for every architecture and reports what the compiler made of them.

    python -m bench.sass [--arch sm_80]... [--kernel transform]... [--all] [--json]
    python -m bench.sass --budget [--markdown] [--arch sm_80]... [--kernel transform]...

Per kernel: registers against what its launch bounds allow, spills, local and shared memory, widths
of global accesses, resident blocks per SM by registers and threads, and the instructions that the
main loop spends on each 16 bytes it loads or stores. Exit status 1 if a kernel breaks the rules of
bench/machine_code/kernels.py.

--budget shows instead which share of the issue slots of described devices each loop takes at full
bandwidth (bench/machine_code/budget.py); with --markdown as the table of docs/issue-budget.md. Exit
status 1 if a loop takes more than it may.

Needs nvcc, cuobjdump and nvdisasm, and neither a GPU nor PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace

from .machine_code.budget import budgets
from .machine_code.budget_table import budget_markdown, budget_table, over_budget
from .machine_code.compile import CompileError, compile_all
from .machine_code.kernels import Kernel, describe, problems
from .machine_code.table import instance_table, template_table
from .toolkit import Toolkit, ToolkitError, archs, devices, resolve


def kernels_for(wanted: list[str], kit: Toolkit) -> list[Kernel]:
    """Compiles every kernel source for the architectures ("8.0") and describes what came out."""
    return [k for job, text in compile_all(wanted, kit).items() for k in describe(job, text)]


def supported(wanted: list[str], kit: Toolkit) -> list[str]:
    codes = kit.gpu_codes()
    for arch in wanted:
        if arch not in codes:
            print(f"skipping {arch}: nvcc {kit.version} cannot generate it", file=sys.stderr)
    return [arch for arch in wanted if arch in codes]


def described_archs() -> list[str]:
    """The architectures of the described devices."""
    capabilities = {(d["compute_major"], d["compute_minor"]) for d in devices.DEVICES.values()}
    return [f"{major}.{minor}" for major, minor in sorted(capabilities)]


def as_dict(kernel: Kernel) -> dict[str, object]:
    record = asdict(replace(kernel, loops=())) | {
        "exact": kernel.exact,
        "register_limit": kernel.register_limit,
    }
    record |= {"blocks_per_sm": kernel.blocks_per_sm, "problems": problems(kernel)}
    if kernel.main_loop:
        record["main_loop"]["windows"] = kernel.main_loop.windows
        record["main_loop"]["instructions_per_window"] = kernel.main_loop.instructions_per_window
    return record


def parse_arch(text: str) -> str:
    number = text.removeprefix("sm_").replace(".", "")
    if len(number) < 2 or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture such as sm_80")
    return f"{number[:-1]}.{number[-1]}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", action="append", type=parse_arch, help="sm_80; repeatable")
    parser.add_argument("--kernel", action="append", help="part of a kernel's name; repeatable")
    parser.add_argument("--all", action="store_true", help="one line per template instance")
    parser.add_argument("--budget", action="store_true", help="shares of issue slots")
    parser.add_argument("--markdown", action="store_true", help="with --budget: a summary")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    return parser.parse_args()


def report_budget(kernels: list[Kernel], *, markdown: bool) -> int:
    found = budgets(kernels)
    table = budget_markdown if markdown else budget_table
    print(table(found, devices.DEVICES))
    over = over_budget(found, devices.DEVICES)
    for line in over:
        print(line, file=sys.stderr)
    print(f"{len(found)} parts of {len(kernels)} kernels, {len(over)} over", file=sys.stderr)
    return 1 if over or not found else 0


def main() -> int:
    arguments = parse_arguments()
    try:
        kit = resolve()
        known = described_archs() if arguments.budget else list(archs.DEFAULT)
        kernels = kernels_for(supported(arguments.arch or known, kit), kit)
    except (ToolkitError, CompileError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.kernel:
        kernels = [k for k in kernels if any(part in k.name for part in arguments.kernel)]
    if arguments.budget:
        return report_budget(kernels, markdown=arguments.markdown)
    if arguments.json:
        print(json.dumps([as_dict(kernel) for kernel in kernels], indent=1))
    else:
        print(instance_table(kernels) if arguments.all else template_table(kernels))
    bad = [(kernel, problem) for kernel in kernels for problem in problems(kernel)]
    for kernel, problem in bad:
        print(f"{kernel.name} for {kernel.arch} {problem}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(bad)} problems", file=sys.stderr)
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
