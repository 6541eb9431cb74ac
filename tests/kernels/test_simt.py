"""Tests of the host model of CUDA in tests/simt: each planted fault is found, good kernels pass.

The cases are C++ (tests/simt/tests), compiled with g++. Each runs under several seeds of the thread
order.
"""

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
from simt_build import FLAGS, SIMT, build_folder, compile_objects, link

CASE_FILES = sorted(path for path in (SIMT / "tests").iterdir() if path.suffix in (".cu", ".cpp"))


def case_names(path):
    return re.findall(r"^SIMT_CASE\((\w+)\)", path.read_text(), re.MULTILINE)


CASES = [name for path in CASE_FILES for name in case_names(path)]
CONVERSION_CASES = case_names(SIMT / "tests" / "conversions.cpp")


def host_has_f16c():
    cpuinfo = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpuinfo.exists() and "f16c" in cpuinfo.read_text()


@pytest.fixture(scope="module")
def folder():
    return build_folder()


@pytest.fixture(scope="module")
def driver(folder):
    return link("driver", compile_objects(CASE_FILES, folder), folder)


@pytest.fixture(scope="module")
def driver_f16c(folder):
    sources = [SIMT / "tests" / "driver.cpp", SIMT / "tests" / "conversions.cpp"]
    objects = compile_objects(sources, folder, [*FLAGS, "-mf16c"])
    return link("driver_f16c", objects, folder)


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
