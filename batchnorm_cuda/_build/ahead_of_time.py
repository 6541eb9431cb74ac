"""What setup.py compiles at installation: the same builds, from the same cache, as at first use."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from . import builder, recipes, sources
from .compile import BuildError


def build_into(folder: Path, module: str, archs: list[str]) -> None:
    """Leave `_C` under the name `module`, the kernels and the record of them in `folder`."""
    try:
        recipe, *kernels = recipes.all_cuda_recipes(any_gpu=True)
        built = [builder.build(recipe), *builder.build_kernels(kernels)]
    except (BuildError, ValueError) as error:
        sys.exit(f"BATCHNORM_CUDA_AOT=1: {error}")
    folder.mkdir(parents=True, exist_ok=True)
    for path, name in zip(built, (module, *(f"{each.name}.so" for each in kernels)), strict=True):
        shutil.copyfile(path, folder / name)  # not the mode: the cache's are for one user
    record = {
        "torch": torch.__version__,
        "cuda": recipe.key["cuda"],
        "archs": archs,
        "sources": sources.content_hash(emulated=False),
    }
    (folder / "_aot.json").write_text(json.dumps(record) + "\n")
