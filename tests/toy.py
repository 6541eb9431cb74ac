"""A tiny extension to try the build cache with, and what builds it in other processes."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from batchnorm_cuda._build.compile import Recipe

# A module without torch's headers compiles in a second.
TOY = """
#include <Python.h>
#include "toy_value.h"
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "toy", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_toy(void) {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "value", toy_value());
  return module;
}
"""
HEADER = "int toy_value();\n"
VALUE = '#include "toy_value.h"\nint toy_value() { return 42; }\n'

# Builds the toy of the folder in argv[1] and prints its value.
WORKER = """
import importlib.util, sys
from pathlib import Path
from toy import toy_recipe
from batchnorm_cuda._build.builder import build
spec = importlib.util.spec_from_file_location("toy", build(toy_recipe(Path(sys.argv[1]))))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.value)
"""


def toy_recipe(folder: Path) -> Recipe:
    sources = [folder / "toy.cpp", folder / "toy_value.cpp"]
    texts = [path.read_text() for path in (*sources, folder / "toy_value.h")]
    key = {"sources": "".join(texts), "torch": torch.__version__}
    return Recipe("toy", "a toy", sources, key, job_bytes=1 << 20)


def write_toy(folder: Path) -> Path:
    folder.mkdir()
    (folder / "toy.cpp").write_text(TOY)
    (folder / "toy_value.cpp").write_text(VALUE)
    (folder / "toy_value.h").write_text(HEADER)
    return folder


def fork(work: Callable[[], object]) -> int:
    """Start a process that does `work` and ends, whatever comes of it: it runs no further test."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return process


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
