"""Runs the driver without PyTorch over cases of every kind of kernel, under compute-sanitizer.

    python -m bench.sanitize DRIVER [--tool memcheck --sanitizer PATH]

Without a sanitizer the driver runs by itself: that of the host build is watched by the CPU model of
CUDA. A sanitizer makes a kernel up to 100 times slower, so the cases are small.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

CASES = (
    "--op forward --n 8 --c 24 --s 784 --dtype half --strategy team --scope block",
    "--op forward --n 64 --c 16 --s 49 --dtype half --strategy team",
    "--op forward --n 8 --c 8 --s 3136 --dtype bfloat16 --strategy team --scope grid --team-size 3",
    "--op forward --n 512 --c 64 --s 1 --dtype half --strategy team --scope grid --team-size 4",
    "--op forward --n 5 --c 7 --s 131 --dtype float --strategy two_pass",
    "--op forward --n 300 --c 3 --s 1 --dtype double --strategy two_pass",
    "--op backward --n 8 --c 24 --s 784 --dtype half --strategy team --scope block",
    "--op backward --n 8 --c 8 --s 1024 --dtype float --strategy team --scope grid --team-size 2",
    "--op backward --n 512 --c 64 --s 1 --dtype bfloat16 --strategy team",
    "--op backward --n 33 --c 10 --s 27 --dtype half --strategy two_pass",
    "--op eval --n 9 --c 17 --s 50 --dtype half",
)
# The driver's own exit status for "no team for this problem" and wrong usage (options.cpp).
_ERROR_EXIT = 99


def command(driver: str, case: str, tool: str | None, sanitizer: str | None) -> list[str]:
    plain = [driver, *case.split(), "--repeat", "1"]
    if sanitizer is None:
        return plain
    options = ["--error-exitcode", str(_ERROR_EXIT), "--print-limit", "3"]
    return [sanitizer, "--tool", tool or "memcheck", *options, *plain]


def run(driver: str, case: str, tool: str | None, sanitizer: str | None) -> str | None:
    """What went wrong, or None."""
    done = subprocess.run(command(driver, case, tool, sanitizer), capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    what = "reports errors" if done.returncode == _ERROR_EXIT else f"status {done.returncode}"
    return f"{case}: {what}\n" + "\n".join(lines[-12:])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("driver")
    parser.add_argument("--tool", help="of compute-sanitizer")
    parser.add_argument("--sanitizer", help="the program")
    options = parser.parse_args()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(run, options.driver, case, options.tool, options.sanitizer)
            for case in CASES
        ]
    wrong = [job.result() for job in jobs if job.result() is not None]
    for text in wrong:
        print(text)
    print(f"{len(CASES) - len(wrong)} of {len(CASES)} cases without an error")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
