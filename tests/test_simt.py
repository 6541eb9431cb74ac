"""Tests of the host model of CUDA in tests/simt: each planted fault is found, good kernels pass.

The cases are C++ (tests/simt/tests), compiled with g++ into a folder of the system's temporary
directory named after the sources' content, so that only a change compiles again. Each case runs
under several seeds of the thread order.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIMT = ROOT / "tests" / "simt"
ENGINE = sorted(SIMT.glob("*.cpp"))
CASE_FILES = sorted(path for path in (SIMT / "tests").iterdir() if path.suffix in (".cu", ".cpp"))
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-DBATCHNORM_CUDA_HOST_MODEL",
    f"-I{SIMT / 'include'}",
    f"-I{ROOT / 'csrc'}",
]


def case_names(path):
    return re.findall(r"^SIMT_CASE\((\w+)\)", path.read_text(), re.MULTILINE)


CASES = [name for path in CASE_FILES for name in case_names(path)]
CONVERSION_CASES = case_names(SIMT / "tests" / "conversions.cpp")


def host_has_f16c():
    cpuinfo = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpuinfo.exists() and "f16c" in cpuinfo.read_text()


def compile_objects(sources, folder, flags):
    """Object files of the sources, named after everything that goes into them."""
    digest = hashlib.sha256(" ".join(flags).encode())
    headers = [path for path in SIMT.rglob("*.h")] + [ROOT / "csrc" / "platform.cuh"]
    for path in sorted(headers):
        digest.update(path.read_bytes())

    def compile_one(source):
        content = digest.copy()
        content.update(source.read_bytes())
        target = folder / f"{source.stem}-{content.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.replace(target)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link(name, objects, folder):
    digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    target = folder / f"{name}-{digest}"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *map(str, objects), "-ldl", "-o", str(partial)], check=True)
        partial.replace(target)
    return target


@pytest.fixture(scope="module")
def build_folder():
    assert shutil.which("g++"), "the host model needs g++"
    folder = Path(tempfile.gettempdir()) / f"batchnorm_cuda_simt_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def engine_objects(build_folder):
    return compile_objects(ENGINE, build_folder, FLAGS)


@pytest.fixture(scope="module")
def driver(build_folder, engine_objects):
    objects = compile_objects(CASE_FILES, build_folder, FLAGS)
    return link("driver", objects + engine_objects, build_folder)


@pytest.fixture(scope="module")
def driver_f16c(build_folder, engine_objects):
    sources = [SIMT / "tests" / "driver.cpp", SIMT / "tests" / "conversions.cpp"]
    objects = compile_objects(sources, build_folder, [*FLAGS, "-mf16c"])
    return link("driver_f16c", objects + engine_objects, build_folder)


def run_case(driver, case):
    environment = {k: v for k, v in os.environ.items() if k != "BATCHNORM_CUDA_EMULATE_SEED"}
    result = subprocess.run(
        [str(driver), case], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("case", CASES)
def test_case(driver, case):
    run_case(driver, case)


@pytest.mark.parametrize("case", CONVERSION_CASES if host_has_f16c() else [])
def test_conversions_by_instruction(driver_f16c, case):
    run_case(driver_f16c, case)


def test_case_names_are_unique():
    assert len(CASES) == len(set(CASES))
