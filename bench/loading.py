"""Python files taken by their path: of the package without its torch, and of the tests' tables."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = "batchnorm_cuda_without_torch"


def load_package(name: str) -> ModuleType:
    """A module of the package that needs no torch, which importing the package itself would."""
    if _PACKAGE not in sys.modules:
        sys.modules[_PACKAGE] = ModuleType(_PACKAGE)
        sys.modules[_PACKAGE].__path__ = [str(ROOT / "batchnorm_cuda")]
    return importlib.import_module(f"{_PACKAGE}.{name}")


def load(folder: str, name: str) -> ModuleType:
    """The module in ROOT/folder/name.py. ImportError where it is not: bench needs its checkout."""
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench.{folder}_{name}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no {path}: the benchmark needs the files of its own checkout")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks up its annotations
    spec.loader.exec_module(module)
    return module
