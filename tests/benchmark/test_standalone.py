"""The torch-free driver: kernels and plan as a C++ program, on the host model and on the GPU."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # bench/ is not installed

from bench.loading import ROOT
from bench.toolkit import ToolkitError, copy_objects, resolve, visible_gpus

CASES = [
    "--op forward --n 4 --c 6 --s 64 --dtype half --strategy team",
    "--op forward --n 3 --c 5 --s 49 --dtype half --strategy team",  # masked windows
    "--op forward --n 64 --c 8 --s 49 --dtype half --strategy team",  # along rows
    "--op forward --n 3 --c 5 --s 7 --dtype bfloat16 --strategy two_pass",
    "--op forward --n 64 --c 3 --s 1 --dtype float --strategy two_pass",  # C below a window
    "--op forward --n 4 --c 4 --s 1024 --dtype float --scope grid --team-size 2 --strategy team",
    "--op backward --n 128 --c 8 --s 1 --dtype float --scope cluster --team-size 2 --strategy team",
    "--op backward --n 4 --c 3 --s 9 --dtype double --strategy two_pass",
    "--op backward --n 2 --c 4 --s 32 --dtype bfloat16",
    "--op eval --n 4 --c 8 --s 16 --dtype half",
    "--op eval --n 5 --c 10 --s 1 --dtype double",
]
RESULTS = {
    "forward": {"output", "mean", "invstd", "running_mean", "running_var"},
    "backward": {"grad_input", "grad_weight", "grad_bias"},
    "eval": {"output", "mean", "invstd"},
}


def build(target: str, *variables: str) -> Path:
    """`make` it: only what has changed is compiled. One process at a time."""
    if shutil.which("make") is None or shutil.which("g++") is None:
        pytest.skip("needs make and g++")
    folder = ROOT / "build" / "standalone"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = f"-j{min(2, os.cpu_count() or 1)}"
    with (folder / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            ["make", "-C", str(ROOT / "bench" / "standalone"), jobs, target, *variables],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / target / "bn_standalone"


@pytest.fixture(scope="module")
def host() -> Path:
    return build("host", f"PYTHON={sys.executable}")


@pytest.fixture(scope="module")
def cuda() -> Path:
    try:
        resolve()
    except ToolkitError as error:
        pytest.skip(str(error))
    return build("cuda", f"PYTHON={sys.executable}")


def test_what_has_changed_is_linked_again(tmp_path: Path) -> None:
    """make compares the times of the program and of the folder."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "gone.cpp.o").write_text("of a file that is no more")
    compiled = tmp_path / "plan-0123.o"
    objects = {Path("csrc/plan.cpp"): compiled}
    for content, newer in (("old", True), ("old", False), ("new", True)):
        os.utime(folder, (1, 1))
        compiled.write_text(content)
        copy_objects(objects, folder)
        assert (folder.stat().st_mtime > 1) == newer
        assert [path.name for path in folder.iterdir()] == ["plan.cpp.o"]
        assert (folder / "plan.cpp.o").read_text() == content


def run(program: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments.split()], capture_output=True, text=True)


def check_passes(program: Path, case: str) -> str:
    done = run(program, case)
    assert done.returncode == 0, done.stdout + done.stderr
    words = case.split()
    checked = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("check:")}
    assert checked == RESULTS[words[words.index("--op") + 1]]
    if "--strategy" in words:
        assert f"plan: {words[words.index('--strategy') + 1]} (" in done.stdout
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_the_host_model_passes(host: Path, case: str) -> None:
    assert "host model: no timing" in check_passes(host, case)


@pytest.mark.parametrize("op", ["forward", "backward", "eval"])
def test_a_wrong_value_fails(host: Path, op: str) -> None:
    done = run(host, f"--op {op} --n 4 --c 3 --s 8 --dtype bfloat16 --break-reference")
    assert done.returncode == 1
    wrong = [line.split()[1] for line in done.stdout.splitlines() if line.endswith("WRONG")]
    assert wrong == ["grad_input" if op == "backward" else "output"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--n 2 --c 2", "expected --n, --c and --s"),
        ("--n 2 --c 2 --s 0", "--s: expected an integer of at least 1, got '0'"),
        ("--n 2 --c 2 --s 2 --dtype int", "--dtype: expected one of bfloat16 double float half"),
        ("--n 2 --c 2 --s 2 --shape 3", "unknown option --shape"),
        ("--n 2 --c 2 --s 2 --op eval --strategy team", "no team for this problem: eval"),
    ],
)
def test_wrong_usage_is_named(host: Path, arguments: str, message: str) -> None:
    done = run(host, arguments)
    assert done.returncode == 3
    assert message in done.stderr


def test_the_plan_is_made_for_the_described_device(host: Path, tmp_path: Path) -> None:
    device = tmp_path / "device.json"
    case = f"--n 64 --c 1 --s 1024 --strategy two_pass --device-json {device}"
    grids = []
    for count in (1, 3):
        device.write_text(f'{{"name": "a GPU with {count} SMs", "sm_count": {count}}}')
        done = run(host, case)
        assert done.returncode == 0, done.stderr
        assert f"on a GPU with {count} SMs" in done.stdout
        grids.append(next(x for x in done.stdout.splitlines() if x.startswith("plan: reduce")))
    assert grids[0] != grids[1]
    device.write_text('{"sm_cuont": 3}')
    assert "unknown property 'sm_cuont'" in run(host, case).stderr


@pytest.mark.nvcc
def test_the_cuda_build_says_that_there_is_no_gpu(cuda: Path) -> None:
    if visible_gpus():
        pytest.skip("there is a GPU")
    done = run(cuda, CASES[0])
    assert done.returncode == 2
    assert "no GPU to run on" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_gpu_passes(cuda: Path, case: str) -> None:
    assert "GB/s of compulsory bytes" in check_passes(cuda, case)
