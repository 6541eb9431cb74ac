"""`python -m bench tune`: every plan of a problem is forced, checked and timed, on a set clock."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bench_cases import case, machine

from bench import tune
from bench.__main__ import main
from bench.rows import records
from bench.tuning import measure
from bench.tuning.candidates import geometry, list_plans
from bench.tuning.measure import Limits, measure_plans
from bench.tuning.problems import problems
from bench.tuning.rows import COPY, FAILED, HOST, INACCURATE, OK, UNSUPPORTED, TuneRow

LIMITS = Limits(seconds=0.001, rounds=(3, 3))
TINY = case(sizes=(4, 16, 6, 6), layout="nhwc")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("BATCHNORM_CUDA_EMULATE", "1")


def plans_of(extension: ModuleType, which: Any = TINY) -> list[dict[str, Any]]:
    return list_plans(extension, which.op, which.dtype, geometry(which), extension.device_info())


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("BATCHNORM_CUDA_EMULATE")
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "tune: no GPU\n"


def test_a_file_on_the_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", f"--out={tmp_path}", "--problems=3", "--candidates=6"]) == 0
    (path,) = tmp_path.glob("*-tune.csv")
    rows = records.read(path, TuneRow)
    assert {row.kind for row in rows} == {HOST}
    by_problem: dict[Any, list[TuneRow]] = {}
    for row in rows:
        by_problem.setdefault(row.problem, []).append(row)
    assert len(by_problem) == 3
    for of_one in by_problem.values():
        assert [row.strategy for row in of_one].count(COPY) == 1
        assert sum(row.chosen for row in of_one) == 1
        assert {row.status for row in of_one} == {OK}
        assert all(row.ms is not None and row.ms_p20 <= row.ms <= row.ms_p80 for row in of_one)
        assert all(row.cost > 0 for row in of_one if row.strategy != COPY)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["planner_device"]["sm_count"] > 0 and facts["done"] == 3
    out = capsys.readouterr()
    assert "no time below is a GPU's" in out.err
    assert "host ms" in out.out


@pytest.mark.parametrize(("seconds", "done"), [(0.5, 0), (3.5, 1), (9.5, 3)])
def test_stops_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, done: int
) -> None:
    """A problem that may not be done in time is not begun; those that were done stay."""
    readings = itertools.count(0.0, 1.0)  # each look at the clock takes a second
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(readings)))
    monkeypatch.setattr(tune, "problem_rows", lambda *_: [])
    monkeypatch.setattr(tune, "_line", lambda *_: "")
    assert main(["tune", f"--out={tmp_path}", f"--seconds={seconds}", "--problems=3"]) == 0
    (path,) = tmp_path.glob("*-tune.json")
    assert json.loads(path.read_text())["done"] == done


def test_each_plan_runs_as_it_is_forced(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes launch three kernels, a team one; and nothing stays forced."""
    launches: list[tuple[str, int]] = []
    plans = plans_of(extension)
    run = measure._forced

    def forced(module: ModuleType, options: dict[str, Any], step: Any) -> Any:
        call = run(module, options, step)

        def counted() -> Any:
            module._host_model.start_traffic()
            result = call()
            count = len(module._host_model.stop_traffic()["launches"])
            launches.append((options["strategy"], count))
            return result

        return counted

    monkeypatch.setattr(measure, "_forced", forced)
    outcomes = measure_plans(TINY, plans, extension, machine(), LIMITS)
    assert {each["status"] for each in outcomes.plans} == {OK}
    assert set(launches) == {("two_pass", 3), ("team", 1)}
    assert {each["samples"] for each in outcomes.plans} == {3}
    extension._host_model.start_traffic()
    x = torch.randn(4, 16, 6, 6)
    extension.forward(x, *(None,) * 5, True, 0.1, 1e-5)
    assert len(extension._host_model.stop_traffic()["launches"]) == 1


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_slow_plans_are_not_timed_again(extension: ModuleType, op: str) -> None:
    which = case(op, sizes=(64, 32))
    plans = plans_of(extension, which)
    last = len(plans) - 1
    assert not plans[last]["chosen"]

    def took(start: int) -> float:
        """Calls go in turns: the plans, then the copy."""
        return 50.0 if start % (len(plans) + 1) == last and start < 3 * (len(plans) + 1) else 1.0

    outcomes = measure_plans(which, plans, extension, machine(took), LIMITS)
    assert outcomes.plans[last]["samples"] == 2 and outcomes.plans[last]["ms"] == 50.0
    assert outcomes.plans[0]["samples"] == 3
    assert outcomes.copy["samples"] == 3


def test_a_plan_that_fails_stops_no_other(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plans_of(extension)
    run = measure._forced

    def forced(module: ModuleType, options: dict[str, Any], step: Any) -> Any:
        call = run(module, options, step)

        def fails() -> Any:
            raise RuntimeError("out of luck\nand more")

        def wrong() -> Any:
            return [tensor + 1 for tensor in call()]

        return (
            fails
            if options == plans[0]["options"]
            else (wrong if options == plans[1]["options"] else call)
        )

    monkeypatch.setattr(measure, "_forced", forced)
    outcomes = measure_plans(TINY, plans, extension, machine(), LIMITS)
    assert outcomes.plans[0] == {"status": FAILED, "note": "RuntimeError: out of luck"}
    assert outcomes.plans[1]["status"] == INACCURATE
    assert "ms" not in outcomes.plans[1]
    assert {each["status"] for each in outcomes.plans[2:]} == {OK}


def test_a_plan_that_the_device_refuses_has_no_time(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor have the problem's others behind it, which may have been refused as well."""
    plans = plans_of(extension)
    info = extension.device_info()
    asked: list[int] = []

    def device_info(index: int = 0) -> dict[str, Any]:
        asked.append(index)
        return info if len(asked) <= 3 else info | {"cooperative": False}

    monkeypatch.setattr(extension, "device_info", device_info)
    outcomes = measure_plans(TINY, plans, extension, machine(), LIMITS)
    assert [each["status"] for each in outcomes.plans[:3]] == [OK, OK, UNSUPPORTED]
    assert {each["status"] for each in outcomes.plans[2:]} == {UNSUPPORTED}
    assert all("refused" in each["note"] and "ms" not in each for each in outcomes.plans[2:])


def test_graphs_where_they_can_be_captured(extension: ModuleType) -> None:
    """A plan that cannot is timed launch by launch."""
    captured: list[Any] = []

    def capture(call: Any) -> tuple[Any, Any]:
        if len(captured) == 2:  # one set of inputs of the second plan
            captured.append(None)
            raise RuntimeError("operation not permitted when stream is capturing")
        captured.append(call)
        return call, call()

    plans = plans_of(extension)
    outcomes = measure_plans(TINY, plans, extension, machine(capture=capture), LIMITS)
    methods = [each["method"] for each in outcomes.plans]
    assert methods == ["graph", "events"] + ["graph"] * (len(plans) - 2)
    assert outcomes.copy["method"] == "graph"


def test_a_problem_that_fails_has_rows(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(measure, "make_tensors", no_memory)
    assert tune.main([f"--out={tmp_path}", "--problems=1"]) == 1
    (path,) = tmp_path.glob("*-tune.csv")
    rows = records.read(path, TuneRow)
    assert {row.status for row in rows} == {FAILED}
    assert all("out of memory" in row.note and row.ms is None for row in rows)


def test_problems_are_of_every_kind_early() -> None:
    """What a limit leaves is of both layouts and operations, and each problem is there once."""
    found = problems()
    assert len(found) == len(set(found)) >= 60
    for first in (found[:16], found[:60]):
        assert {each.op for each in first} == {"forward", "backward"}
        assert {each.layout for each in first} == {"nchw", "nhwc"}
        assert {"fp16", "bf16"} <= {each.dtype for each in first}
    assert {each.dtype for each in found[:60]} == {"fp16", "bf16", "fp32"}
    assert any(each.shape.sizes[1] == 3 for each in found[:60])
    assert any(len(each.shape.sizes) == 2 for each in found[:60])
