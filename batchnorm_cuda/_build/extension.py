"""Gives the compiled extension: `_C` for CUDA tensors, `_C_emulated` for the CPU emulation.

Importing this module needs neither a GPU nor a compiler. The first `load_cuda()` takes the module
compiled at installation if there is one that fits, else compiles it just in time (see builder.py).
Whatever is missing for that is said in one message with the command that mends it, and every
detour is announced on stderr.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from .._version import __version__
from . import builder, recipes, sources
from .compile import BuildError
from .toolkit import ToolkitError

_PACKAGE = __package__.rpartition(".")[0]
# Written beside `_C` by an ahead-of-time build (setup.py): the versions that its binary is tied to.
_AOT_RECORD = Path(__file__).parents[1] / "_aot.json"
_REINSTALL = "BATCHNORM_CUDA_AOT=1 pip install --no-build-isolation --force-reinstall --no-deps"

_EMULATE = "BATCHNORM_CUDA_EMULATE"
# What os.environ keeps, encoded. Every call with a CPU tensor looks there; os.environ itself takes
# five calls of Python to do so.
_environment = os.environ._data
_EMULATE_ENCODED = os.environ.encodekey(_EMULATE)
_ON = os.environ.encodevalue("1")

_JIT, _AOT = "just in time", "ahead of time"  # where a binary comes from

_load_lock = threading.RLock()
_cuda: ModuleType | None = None
_emulated: ModuleType | None = None
_info: dict[str, dict[str, Any]] = {}


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels take `tensor`: on a GPU, and on the CPU where emulation is asked for."""
    if tensor.is_cuda or not tensor.is_cpu:
        return tensor.is_cuda
    if is_dynamo_compiling():  # which would guard every variable of _environment
        return os.environ.get(_EMULATE) == "1"
    return emulates()


def emulates() -> bool:
    """Whether emulation is asked for: `has_kernels` of a CPU tensor, where no compiler looks."""
    return _environment.get(_EMULATE_ENCODED) == _ON


def load_cuda() -> ModuleType:
    """The CUDA extension, loaded once per process."""
    global _cuda
    if _cuda is None:  # without the lock: this is on the path of every call
        with _load_lock:
            if _cuda is None:
                _cuda = _load_aot() or _load_jit("cuda")
    return _cuda


def build_kernels() -> list[Path]:
    """All that `load_cuda()` leaves to the first tensor of a dtype, compiled if need be, at once:
    the shared objects of all kernels.
    """
    load_cuda()
    if _info["cuda"]["origin"] == _AOT:
        return [Path(_kernels_ahead_of_time(table)) for table in sources.KERNEL_TABLES]
    return builder.build_kernels([recipes.kernel_recipe(x) for x in sources.KERNEL_TABLES])


def load_emulated() -> ModuleType:
    """The host build of the kernels, loaded once per process."""
    global _emulated
    if _emulated is None:
        with _load_lock:
            if _emulated is None:
                _emulated = _load_jit("emulated")
    return _emulated


def build_info() -> dict[str, Any]:
    """What is built and loaded: plain values, to be printed into a bug report.

    Returns:
        "version", "torch" and "torch_cuda" (None for a build of torch without CUDA), all strings;
        "cache_dir", where just-in-time builds are kept, or None if this user has no home folder;
        "ahead_of_time", what was recorded when the kernels were compiled at installation, or None;
        and "loaded", for each extension that this process has loaded so far ("cuda", "emulated",
        and the kernels of "cuda" by what they are for, such as "kernels_bfloat16") its file, its
        origin ("ahead of time" or "just in time") and what it was compiled from and for.
    """
    try:
        cache = str(builder.cache_dir())
    except BuildError:
        cache = None
    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cache_dir": cache,
        "ahead_of_time": _read_aot_record(),
        "loaded": {name: dict(info) for name, info in _info.items()},
    }


def _load_jit(kind: str) -> ModuleType:
    recipe = recipes.cuda_recipe() if kind == "cuda" else recipes.emulated_recipe()
    path = builder.build(recipe)
    module = _import(recipe.name, path)
    if kind == "cuda":
        module.set_kernel_loader(_kernels_just_in_time)
    _info[kind] = {"origin": _JIT, "path": str(path), **recipe.key}
    return module


def _kernels_just_in_time(table: str) -> str:
    """The path of the shared object of a table of kernels, compiled if need be."""
    recipe = recipes.kernel_recipe(table)
    path = str(builder.build(recipe))
    _info[recipe.name] = {"origin": _JIT, "path": path, **recipe.key}
    return path


def _kernels_ahead_of_time(table: str) -> str:
    """The path of the shared object that was compiled with `_C`."""
    path = str(_AOT_RECORD.with_name(f"kernels_{table}.so"))
    _info[f"kernels_{table}"] = {"origin": _AOT, "path": path}
    return path


def _load_aot() -> ModuleType | None:
    """The module compiled at installation; None if there is none, or if compiling it anew helps."""
    path = _aot_path()
    if path is None:
        return None
    record = _read_aot_record() or {}
    problem = aot_problem(record, path)
    if problem is None:
        try:
            module = _import("_C", path)
        except ImportError as error:
            problem = f"the extension compiled at installation does not load ({error})"
        else:
            module.set_kernel_loader(_kernels_ahead_of_time)
            _info["cuda"] = {"origin": _AOT, "path": str(path), **record}
            return module
    problem += f"; to rebuild it: `{_REINSTALL} batchnorm_cuda`"
    builder.say(f"{problem}. Using a just-in-time build instead")
    try:
        return _load_jit("cuda")
    except (BuildError, ToolkitError) as error:
        raise BuildError(f"{problem}. Compiling it just in time instead failed: {error}") from error


def aot_problem(record: dict[str, Any], path: Path) -> str | None:
    """Why the module compiled at installation must not be loaded, if so.

    A C++ extension is tied to the exact PyTorch it was compiled with: another version may lack its
    symbols or, worse, have them with other layouts.
    """
    built, running = record.get("torch", "unknown"), torch.__version__
    if built != running:
        return f"{path} was compiled for PyTorch {built}, but this is PyTorch {running}"
    if record["sources"] != sources.content_hash(emulated=False):
        return f"{path} was compiled from other sources than {sources.csrc_dir()} now holds"
    recipes.require_cuda_torch()
    uncovered = recipes.uncovered_gpu(record["archs"])
    return f"{uncovered}, for which {path} was compiled" if uncovered else None


def _aot_path() -> Path | None:
    spec = importlib.util.find_spec(f"{_PACKAGE}._C")
    return Path(spec.origin) if spec is not None and spec.origin else None


def _read_aot_record() -> dict[str, Any] | None:
    try:
        return json.loads(_AOT_RECORD.read_text())
    except (OSError, ValueError):  # there is none, or only a part of one: then none is known
        return None


def _import(name: str, path: Path) -> ModuleType:
    qualified = f"{_PACKAGE}.{name}"
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None and spec.loader is not None  # the path ends in .so
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[qualified] = module
    return module
