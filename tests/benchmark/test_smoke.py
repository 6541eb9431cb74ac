"""`bench.smoke`: a wrong result, a crash and a hang are rows, and no instance is counted unseen."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_cases  # noqa: F401, which finds bench/
import pytest
import torch
from conftest import KERNELS
from torch import Tensor

from bench import smoke
from bench.gpu import smoke_cases, smoke_worker
from bench.gpu.smoke_worker import FAIL, NOT_RUN, PASS, UNREACHED
from bench.machine_code import instances
from bench.smoke import Group

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = 'import json, os, sys, time\nsay = lambda **m: print("@" + json.dumps(m), flush=True)\n'


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def worker(code: str) -> list[str]:
    """A process that answers as a group's does; sys.argv ends with the first case to run."""
    return [sys.executable, "-c", ANSWERS + "first = int(sys.argv[-1])\n" + code]


def case(i: int, status: str = PASS) -> dict[str, Any]:
    return {"case": f"case {i}", "status": status}


def run(tmp_path: Path, code: str, seconds: float = 60) -> tuple[int, list[dict[str, str]]]:
    group = Group("fp16", worker(code))
    status = smoke.run([group], tmp_path, seconds)
    return status, rows_of(tmp_path / "smoke.csv")


# Three cases, of which the middle one is `{}`.
THREE = """
say(cases=3, libraries=[], device="GPU 1")
for i in range(first, 3):
    say(start=i, case={{"case": f"case {{i}}"}})
    if i == 1:
        {}
    say(row={{"case": f"case {{i}}", "status": "PASS", "error": "0.5"}})
say(end=True)
"""


@pytest.fixture
def planner(extension: ModuleType) -> smoke_cases.Planner:
    return smoke_cases.Planner(extension)


def few(planner: smoke_cases.Planner, op: str, form: str = "") -> list[smoke_cases.Case]:
    """A case of two passes and one of a team, float32."""
    found = [
        case
        for case in smoke_cases.all_cases("fp32", planner)
        if (case.op, case.form, case.pattern) == (op, form, "along S")
    ]
    return [next(c for c in found if bool(c.scope) == team) for team in (False, True)]


def verdicts(cases: list[smoke_cases.Case], planner: smoke_cases.Planner) -> list[dict[str, Any]]:
    return [smoke_worker.run_case(case, planner, KERNELS.device) for case in cases]


# -------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    "op, form, result",
    [
        ("forward", "", 0),
        ("forward", "residual+relu", 3),
        ("backward", "", 0),
        ("backward", "residual+relu", 3),
        ("backward", "", 2),
    ],
)
def test_a_wrong_result_fails(
    planner: smoke_cases.Planner, monkeypatch: pytest.MonkeyPatch, op: str, form: str, result: int
) -> None:
    cases = few(planner, op, form)
    assert [row["status"] for row in verdicts(cases, planner)] == [PASS, PASS]
    break_result(planner.extension, ("fused_" if form else "") + op, result, monkeypatch)
    for case, row in zip(cases, verdicts(cases, planner), strict=True):
        assert row["status"] == FAIL
        assert row["case"] == case.id and "beyond the tolerance" in row["note"]


def break_result(
    extension: ModuleType, name: str, result: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element of one result is off by a little; one bit of a mask."""
    function = getattr(extension, name)

    def broken(*arguments: object) -> tuple[Tensor, ...]:
        results = list(function(*arguments))
        value = results[result].view(-1)
        value[-1] = value[-1] ^ 1 if value.dtype == torch.uint8 else value[-1] * 1.001 + 1e-3
        return tuple(results)

    monkeypatch.setattr(extension, name, broken)


@pytest.mark.parametrize("name, index", [("sync_statistics", -1), ("sync_sum", -1)])
def test_a_wrong_stage_of_sync_fails(
    planner: smoke_cases.Planner, monkeypatch: pytest.MonkeyPatch, name: str, index: int
) -> None:
    cases = [c for c in smoke_cases.all_cases("fp32", planner) if c.op == "sync"][:2]
    assert [row["status"] for row in verdicts(cases, planner)] == [PASS, PASS]
    function = getattr(planner.extension, name)

    def broken(tensor: Tensor) -> Tensor:
        result = function(tensor)
        result.view(-1)[index] *= 1.01
        return result

    monkeypatch.setattr(planner.extension, name, broken)
    assert [row["status"] for row in verdicts(cases, planner)] == [FAIL, FAIL]


def test_an_error_is_the_cases_own(
    planner: smoke_cases.Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("launching failed: too many blocks")

    monkeypatch.setattr(planner.extension, "forward", refuse)
    row = verdicts(few(planner, "forward"), planner)[0]
    assert (row["status"], row["note"]) == (FAIL, "RuntimeError: launching failed: too many blocks")


def test_a_team_that_was_refused_did_not_run(
    planner: smoke_cases.Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are right, for others computed them."""
    teams = [c for c in smoke_cases.all_cases("fp32", planner) if c.scope == "cluster"][:1]
    assert [row["status"] for row in verdicts(teams, planner)] == [PASS]
    left = planner.extension.device_info() | {"max_cluster": 0}
    monkeypatch.setattr(planner.extension, "device_info", lambda: left)
    row = verdicts(teams, planner)[0]
    assert row["status"] == FAIL and "refused" in row["note"]


def test_what_the_device_cannot_reach_is_said(
    planner: smoke_cases.Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "leads_there", lambda case: False)
    two_pass, team = verdicts(few(planner, "forward"), planner)
    assert (two_pass["status"], team["status"]) == (PASS, UNREACHED)


def test_every_case_of_a_large_gpu_is_small(planner: smoke_cases.Planner) -> None:
    from batchnorm_cuda import devices

    planner.device = devices.planner_properties(devices.describe("h100"))
    reached = [planner.reach(case) for case in smoke_cases.all_cases("fp32", planner)]
    found = [case for case in reached if case is not None]
    assert len(found) >= 0.98 * len(reached)
    assert sum(case.nbytes for case in found) < 300e6
    assert {case.keeps for case in found if case.scope == "grid"} == {"holds", "streams"}


# -------------------------------------------------------------------------------- processes


def test_a_failed_case_fails_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = THREE.format('say(row={"case": "x", "status": "FAIL", "note": "off"}); continue')
    status, rows = run(tmp_path, code)
    assert status == 1
    assert [row["status"] for row in rows] == [PASS, FAIL, PASS]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAIL x: off"
    assert lines[-1].startswith("smoke: FAIL on GPU 1: 2 cases passed, 1 failed, 0 not run")


def test_all_passed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, rows = run(tmp_path, THREE.format("pass"))
    assert status == 0 and len(rows) == 3
    assert "smoke: PASS on GPU 1: 3 cases passed, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("fault, said", [("print('bad'); os._exit(7)", "status 7: bad")])
def test_the_cases_behind_a_crash_still_run(tmp_path: Path, fault: str, said: str) -> None:
    status, rows = run(tmp_path, THREE.format(fault))
    assert status == 1
    assert [(row["case"], row["status"]) for row in rows] == [
        ("case 0", PASS),
        ("case 1", FAIL),
        ("case 2", PASS),
    ]
    assert said in rows[1]["note"]


def test_a_case_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "SECONDS_PER_CASE", 2)
    status, rows = run(tmp_path, THREE.format("time.sleep(60)"))
    assert status == 1
    assert [row["status"] for row in rows] == [PASS, FAIL, PASS]
    assert rows[1]["note"] == "killed: no answer in 2 s"


def test_what_is_left_at_the_limit_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    status, rows = run(tmp_path, THREE.format("time.sleep(60)"), seconds=2)
    assert status == 1
    assert [row["status"] for row in rows] == [PASS, NOT_RUN]
    assert "1 cases passed, 0 failed, 2 not run" in capsys.readouterr().out


def test_a_process_that_never_begins_fails(tmp_path: Path) -> None:
    status, rows = run(tmp_path, "raise SystemExit('no compiler')")
    assert status == 1
    assert rows[0]["status"] == FAIL and "no compiler" in rows[0]["note"]


def test_nothing_passed_is_no_pass(tmp_path: Path) -> None:
    assert run(tmp_path, 'say(cases=0, libraries=[], device=""); say(end=True)')[0] == 1


def test_rows_are_on_disk_when_killed(tmp_path: Path) -> None:
    """Whatever kills the whole leaves the rows that were there."""
    script = (
        "import sys; from pathlib import Path; from bench import smoke\n"
        f"group = smoke.Group('fp16', {worker(THREE.format('time.sleep(60)'))!r})\n"
        f"smoke.run([group], Path({str(tmp_path)!r}), 60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    path = tmp_path / "smoke.csv"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (path.exists() and "case 0" in path.read_text()):
        time.sleep(0.1)
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    assert [row["case"] for row in rows_of(path)] == ["case 0"]


def test_without_a_gpu_there_is_nothing_to_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("BATCHNORM_CUDA_EMULATE", raising=False)
    assert smoke.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().out.splitlines()[-1]


# -------------------------------------------------------------------------------- instances

FORWARD = "team_kernel<AlongS<float, int>, TeamForward, 16, Identity<float>>"
PROFILED = (
    "void batchnorm_cuda::team_kernel<batchnorm_cuda::AlongS<float, int>, "
    "batchnorm_cuda::TeamForward, 16, batchnorm_cuda::Identity<float> >"
    "(batchnorm_cuda::TeamForwardParams<float>, batchnorm_cuda::Identity<float>)"
)
MANGLED = "_ZN14batchnorm_cuda12merge_kernelINS_7WelfordIfEENS_21MergeStatisticsParamsIfEEEEvT0_"


def test_instances_that_did_not_run_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    idle = "merge_kernel<Welford<float>>"
    monkeypatch.setattr(instances, "compiled", lambda path: ({FORWARD, idle}, "cuobjdump"))
    code = THREE.format("pass").replace("libraries=[]", 'libraries=["x.so"]')
    status, rows = run(tmp_path, code + f"say(ran={json.dumps([PROFILED])})\n")
    assert status == 0
    ran = {row["case"]: row["ran"] for row in rows if row["kind"] == "instance"}
    assert ran == {FORWARD: "1", idle: "0"}
    assert (tmp_path / "smoke-instances.txt").read_text() == idle + "\n"
    assert "1 of 2 kernel instances ran (listed by cuobjdump)" in capsys.readouterr().out


def test_names_compare_whoever_gave_them() -> None:
    aten = "void at::native::elementwise_kernel<128, 2>(int, float)"
    assert instances.short_names([PROFILED, MANGLED, aten]) == {
        FORWARD,
        "merge_kernel<Welford<float>, MergeStatisticsParams<float>>",
    }


def test_listings_of_both_tools() -> None:
    resources = f"Resource usage:\n Common:\n  GLOBAL:0\n Function {MANGLED}:\n  REG:40 STACK:0\n"
    assert instances.device_functions(resources) == [MANGLED]
    stub = MANGLED.replace("12merge_kernel", "27__device_stub__merge_kernel")
    symbols = f"0000000000001130 t {MANGLED}\n0000000000001140 t {stub}\n                 U puts\n"
    assert instances.host_symbols(symbols) == [MANGLED]


def test_a_case_says_what_was_launched(planner: smoke_cases.Planner) -> None:
    """Of a loaded extension: what runs is among what is compiled, and not all of it."""
    said: list[dict[str, Any]] = []
    cases = few(planner, "forward")
    assert smoke_worker.run_cases(cases, 0, planner.extension, KERNELS.device, said.append)
    assert [m["start"] for m in said if "start" in m] == [0, 1]
    ran = instances.short_names(said[-1]["ran"])
    library = sys.modules[planner.extension.__name__].__file__
    compiled, _ = instances.compiled([library])
    assert len(ran) >= 4 and ran < compiled
    patterns = {name.split("<")[0] for name in ran}
    assert patterns >= {"team_kernel", "collect_statistics_kernel", "merge_kernel"}


def test_every_operation_has_cases_of_its_own(planner: smoke_cases.Planner) -> None:
    cases = smoke_cases.all_cases("fp64", planner)
    assert len({case.id for case in cases}) == len(cases)
    assert {case.op for case in cases if not case.scope} == set(smoke_cases.OPS)
    assert {case.op for case in cases if case.rounds > 1} == {"forward", "backward"}
    assert {case.op for case in cases if case.form} >= {"eval", "eval_backward", "sync"}
