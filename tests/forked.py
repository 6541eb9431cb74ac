"""Runs Python programs as forks of one process that has imported torch before.

Imports take seconds in each program: torch, and at the first optimizer or torch.compile much more
of it. A program is a script or "-m module", by its command line. It may use a GPU, because the
imports do not look for one.

python tests/forked.py MODULE...

imports the modules; then each line of stdin is a list of programs to run side by side, each the
fields of a Program and where its stdout and stderr go, and is answered by their exit codes.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path

from toy import fork

# What the first optimizer and the first torch.compile import.
MODULES = ["torch._dynamo", "torch._functorch.aot_autograd"]
DEADLINE = 120.0  # seconds that programs may take: a hang is an error
AFTER_A_FAILURE = 5.0  # that the others have left, which may wait for the one that failed


@dataclass
class Program:
    """A script or "-m module", with arguments, and what of its environment is its own."""

    command: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "."


class Forks:
    """The process that is forked. Programs get its environment and their own variables."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__, *MODULES],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, folder: str = ".") -> subprocess.CompletedProcess[str]:
        return self.run_together([Program(command, folder=folder)])[0]

    def run_together(self, programs: list[Program]) -> list[subprocess.CompletedProcess[str]]:
        with tempfile.TemporaryDirectory() as folder:
            outputs = [(f"{folder}/{i}.out", f"{folder}/{i}.err") for i in range(len(programs))]
            asked = [(*astuple(p), *output) for p, output in zip(programs, outputs, strict=True)]
            print(json.dumps(asked), file=self.server.stdin, flush=True)
            codes = json.loads(self.server.stdout.readline())
            return [
                subprocess.CompletedProcess(p.command, code, *(Path(o).read_text() for o in output))
                for p, code, output in zip(programs, codes, outputs, strict=True)
            ]

    def close(self) -> None:
        self.server.communicate()


def run(command: list[str], variables: dict[str, str], folder: str, *outputs: str) -> None:
    """In the fork: what `python command...` does."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= variables
    os.chdir(folder)
    code = 0
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.path.insert(0, os.getcwd())  # as python does
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))  # before this folder, which ranks need
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_codes(processes: list[int]) -> list[int]:
    """As subprocess has them: that of a killed one is negative."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + DEADLINE
    while len(codes) < len(processes):
        for process in set(processes) - codes.keys():
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process] != 0:
                    deadline = min(deadline, time.monotonic() + AFTER_A_FAILURE)
            elif time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[process] for process in processes]


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        processes = [fork(partial(run, *program)) for program in json.loads(line)]
        print(json.dumps(exit_codes(processes)), flush=True)
    os._exit(0)  # with all that is imported, ending in order takes a second or two


if __name__ == "__main__":
    main()
