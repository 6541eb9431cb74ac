"""Compiles C++ against the host model of CUDA in tests/simt, for the tests that run without torch.

Objects and programs lie in a folder of the system's temporary directory and are named after
everything that goes into them, so that only a change compiles again. The model itself and the plan
are objects in the package's cache, which the standalone driver links as well.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench.loading import ROOT
from bench.toolkit import host_model_objects

CSRC = ROOT / "csrc"
SIMT = ROOT / "tests" / "simt"
KERNEL_FLAGS = [
    "-std=c++17",
    "-O1",
    "-DBATCHNORM_CUDA_HOST_MODEL",
    f"-I{SIMT / 'include'}",
    f"-I{CSRC}",
]
FLAGS = [*KERNEL_FLAGS, "-Wall", "-Wextra", "-Werror"]  # for what only the host compiles
# What the model's cases include.
HEADERS = [*SIMT.rglob("*.h"), CSRC / "kernels" / "platform.cuh"]


def build_folder():
    assert shutil.which("g++"), "the host model needs g++"
    folder = Path(tempfile.gettempdir()) / f"batchnorm_cuda_simt_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def digest_of(texts):
    digest = hashlib.sha256()
    for text in texts:
        digest.update((text if isinstance(text, bytes) else str(text).encode()) + b"\0")
    return digest.hexdigest()[:16]


def compile_objects(sources, folder, flags=FLAGS, headers=HEADERS):
    """Object files of the sources. `headers`: all that they may include, beside the system's."""
    included = digest_of([*flags, *(path.read_bytes() for path in sorted(headers))])

    def compile_one(source):
        target = folder / f"{source.stem}-{digest_of([included, source.read_bytes()])}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.replace(target)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link(name, objects, folder):
    """A program of the objects and the host model."""
    objects = [*objects, *host_model_objects()]
    target = folder / f"{name}-{digest_of(objects)}"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *map(str, objects), "-ldl", "-o", str(partial)], check=True)
        partial.replace(target)
    return target
