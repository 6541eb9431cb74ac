"""`python -m bench calibrate`: constants are recovered from files made from a known cost model, and
the planner answers to files that GPUs have made.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from types import ModuleType

import pytest

from batchnorm_cuda import devices
from bench import calibrate
from bench.__main__ import main
from bench.loading import ROOT
from bench.rows import records
from bench.tuning.candidates import geometry, identity, list_plans, thin
from bench.tuning.problems import problems
from bench.tuning.rows import FAILED, MEASURED, OK, OPTIONS, SYNTHETIC, TuneRow

# Factors on the constants of the planner.
TRUTHS = {
    "waits are dear": {
        "grid_wait": 2.5,
        "cluster_wait": 0.4,
        "launch": 0.5,
        "along_s.rate": 1.3,
        "along_c.round.forward": 0.5,
    },
    "launches are dear": {
        "grid_wait": 0.5,
        "cluster_wait": 1.5,
        "launch": 3.0,
        "stage_launch": 0.6,
        "reduce": 1.6,
        "along_s.round.forward": 0.5,
    },
}
# Two passes leave no SM idle, so that a forward takes moves * (reduce + 2 elementwise), a backward
# moves * (2 reduce + 3 elementwise): reduce = 2 backward - 3 forward. Of about twenty plans each,
# known to 2 % of 3.4 and 5.3, that is 0.56 give or take 0.07, or 13 %: three times that.
RELATIVE = {"reduce": 0.40}
RATIOS = ("sm_rate", "slot_rate", "wide")
UNIT_MS = 3.2e-4
MEASURED_FILES = sorted((ROOT / "bench" / "results").glob("*tune*.csv"))


def truth_of(extension: ModuleType, factors: dict[str, float]) -> dict[str, float]:
    start = extension.cost_model()
    return start | {name: start[name] * factor for name, factor in factors.items()}


def write(
    path: Path, extension: ModuleType, truth: dict[str, float], noise: float, seed: int = 1
) -> None:
    """A tune file of an H100 whose plans take what `truth` says, give or take the noise."""
    device = devices.planner_properties(devices.describe("h100"))
    draw = random.Random(seed)
    for case in problems()[:60]:
        sizes = geometry(case)
        plans = list_plans(extension, case.op, case.dtype, sizes, device)
        true = list_plans(extension, case.op, case.dtype, sizes, device, truth)
        cost = {identity(plan): plan["cost"] for plan in true}
        for plan in thin(plans, 16):
            forced = dict(zip(OPTIONS, identity(plan), strict=True))
            row = TuneRow(
                kind=SYNTHETIC,
                device="made up",
                set=case.shape.name,
                shape=case.shape.text,
                layout=case.layout,
                dtype=case.dtype,
                op=case.op,
                count=1,
                **dict(zip(("n", "c", "s"), sizes, strict=True)),
                **forced,
                chosen=int(plan["chosen"]),
                cost=plan["cost"],
                predicted_bytes=plan["predicted_bytes"],
                status=OK,
                ms=cost[identity(plan)] * UNIT_MS * math.exp(draw.gauss(0, noise)),
            )
            records.append(path, row)
    facts = {"planner_device": device, "commit": "0123456789ab"}
    path.with_suffix(".json").write_text(json.dumps(facts))


@pytest.mark.parametrize("factors", TRUTHS.values(), ids=TRUTHS)
def test_recovers_a_known_model(
    extension: ModuleType, tmp_path: Path, factors: dict[str, float]
) -> None:
    path = tmp_path / "made-up-tune.csv"
    truth = truth_of(extension, factors)
    write(path, extension, truth, noise=0.02)
    data = calibrate.load(path)
    start = extension.cost_model()
    fitted = calibrate.fit(extension, data, start)
    # Costs are ratios: a constant is known as far as the unit of all is.
    unit = fitted.unit_ms / UNIT_MS
    assert unit == pytest.approx(1, rel=0.2)
    for name in factors:
        scale = 1 if name in RATIOS else unit
        assert fitted.costs[name] * scale == pytest.approx(
            truth[name], rel=RELATIVE.get(name, 0.15)
        ), name
    assert fitted.error == pytest.approx(0.02, rel=0.2)
    before = calibrate.regrets(data, calibrate.predict_all(extension, data, start))
    after = calibrate.regrets(data, calibrate.predict_all(extension, data, fitted.costs))
    assert statistics.fmean(after) < statistics.fmean(before)
    assert statistics.median(after) <= 1.03


def test_what_is_right_already_stays(extension: ModuleType, tmp_path: Path) -> None:
    """Without noise, from the truth: nothing moves. The chosen plan is mostly the best: there are
    some that the planner does not weigh, such as small teams by way of global memory.
    """
    path = tmp_path / "made-up-tune.csv"
    start = extension.cost_model()
    write(path, extension, start, noise=0.0)
    data = calibrate.load(path)
    fitted = calibrate.fit(extension, data, start)
    for name, value in start.items():
        assert fitted.costs[name] == pytest.approx(value, rel=1e-2), name
    assert fitted.error < 1e-4
    found = calibrate.predict_all(extension, data, start)
    assert statistics.median(calibrate.regrets(data, found)) == pytest.approx(1, abs=1e-4)


def test_report(extension: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "made-up-tune.csv"
    truth = truth_of(extension, TRUTHS["waits are dear"])
    write(path, extension, truth, noise=0.02)
    assert main(["calibrate", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "synthetic: no time below is a GPU's"
    text = "\n".join(lines)
    assert "resnet50/128 128x256x56x56 nhwc bf16 forward" in text
    for column in ("before", "after"):
        assert f"regret, {column}: median 1." in text
    data = "synthetic (made up, made-up-tune.csv, 0123456789ab)"
    assert f"for csrc/plan/plan_costs.h, {data}:" in text
    for name in extension.cost_model():
        assert f"\n  {name} " in text


def test_rows_without_a_time_are_left_out(extension: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "made-up-tune.csv"
    write(path, extension, extension.cost_model(), noise=0.0)
    plans = sum(len(problem.ms) for problem in calibrate.load(path).problems)
    text = path.read_text().replace(f",{OK},", f",{FAILED},", 3)
    path.write_text(text)
    assert sum(len(problem.ms) for problem in calibrate.load(path).problems) == plans - 3


@pytest.mark.parametrize(
    "text, beside, message",
    [
        (None, None, "No such file"),
        ("a,b\n1,2\n", "{}", "expected the columns kind, device"),
        ("", None, "expected the columns kind, device"),
    ],
)
def test_wrong_files(
    tmp_path: Path,
    text: str | None,
    beside: str | None,
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / "tune.csv"
    if text is not None:
        path.write_text(text)
    if beside is not None:
        path.with_suffix(".json").write_text(beside)
    assert main(["calibrate", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_without_the_planners_device(
    extension: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "tune.csv"
    write(path, extension, extension.cost_model(), noise=0.0)
    path.with_suffix(".json").unlink()
    assert main(["calibrate", str(path)]) == 2
    assert "expected the planner's device" in capsys.readouterr().err


# Against all that was measured, a deep kernel included that is no longer there (docs/perf-log.md,
# 66), and was faster in this problem.
KNOWN_REGRET = {"resnet50/128 128x1024x14x14 nhwc bf16 backward": 1.12}


def measured_regrets(extension: ModuleType, path: Path) -> dict[str, float]:
    data = calibrate.load(path)
    assert data.kind == MEASURED
    found = calibrate.predict_all(extension, data, extension.cost_model())
    titles = [problem.title for problem in data.problems]
    return dict(zip(titles, calibrate.regrets(data, found), strict=True))


def test_planner_answers_to_measurements(extension: ModuleType) -> None:
    if not MEASURED_FILES:
        pytest.skip("no GPU has timed the plans yet: there is no bench/results/*tune*.csv")
    for path in MEASURED_FILES:
        found = measured_regrets(extension, path)
        assert statistics.median(found.values()) <= 1.03, path.name
        above = {
            title: round(regret, 3)
            for title, regret in found.items()
            if regret > KNOWN_REGRET.get(title, 1.10)
        }
        assert not above, path.name


def test_plans_that_are_looked_at_no_more(extension: ModuleType, tmp_path: Path) -> None:
    """Two passes in other numbers of parts than now still have a cost; other plans are refused."""
    path = tmp_path / "made-up-tune.csv"
    write(path, extension, extension.cost_model(), noise=0.0)
    data = calibrate.load(path)
    problem = data.problems[0]
    splits = ("two_pass", "", "", 0, 0, 7)
    problem.ms[splits] = 1.0
    assert calibrate.predict(extension, data, problem, {}).costs[-1] > 0
    problem.ms[("team", "along_c", "grid", 5000, 8, 0)] = 1.0
    with pytest.raises(records.RecordsError, match="the planner has no plan"):
        calibrate.predict(extension, data, problem, {})
