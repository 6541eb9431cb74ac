"""gpu-check without a GPU: verdicts, what is missing, time limits, parts on the host build."""

from __future__ import annotations

import json
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import row
from toy import wait_for

from batchnorm_cuda import devices, explain
from bench import gpu_check, repeat, sanitize
from bench.rows.results import write_csv, write_json
from bench.visit import parts, plans
from bench.visit.parts import FAIL, HOST, MISSING, NO_GPU, PASS, Outcome, Part, Site
from bench.visit.runner import Verdict, conclusion, exit_status, run_all, run_part

HERE = Site(gpu=True, device="GPU 1", out=Path("unused"), sanitizer=Path("sanitizer"))
NOWHERE = replace(HERE, gpu=False, device="torch (CUDA 13.0) finds none")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def part(code: str, **values: object) -> Part:
    return Part("a part", lambda site: [python(code)], 1, **values)


def test_verdicts_of_a_part() -> None:
    fine, broken = part("print('== 7 passed =='); print()"), part("print('why'); exit(3)")
    assert run_part(fine, HERE, 60) == Outcome(PASS, "7 passed")
    outcome = run_part(broken, HERE, 60)
    assert outcome.status == FAIL
    assert outcome.text.startswith("exit status 3 of `") and outcome.text.endswith("why")
    assert run_part(broken, NOWHERE, 60) == Outcome(
        NO_GPU, "needs a GPU: torch (CUDA 13.0) finds none"
    )
    hosted = replace(fine, host=True)
    assert run_part(hosted, NOWHERE, 60).status == HOST
    assert run_part(hosted, NOWHERE, 60).text.startswith("7 passed [needs a GPU")
    assert run_part(replace(broken, host=True), NOWHERE, 60).status == FAIL
    lacking = replace(fine, tool=lambda site: "no compiler")
    assert run_part(lacking, HERE, 60) == Outcome(MISSING, "no compiler")


def test_commands_after_one_that_fails_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    both = Part("two", lambda site: [python("exit(1)"), ["touch", str(mark)]], 1)
    assert run_part(both, HERE, 60).status == FAIL
    assert not mark.exists()


def test_a_part_out_of_time_is_ended_with_its_children() -> None:
    started = time.monotonic()
    with_child = Part("a part", lambda site: [["sh", "-c", "sleep 600 & echo $!; wait"]], 1)
    outcome = run_part(with_child, HERE, 1)
    assert time.monotonic() - started < 60
    said, child = outcome.text.rsplit(maxsplit=1)
    assert (outcome.status, said) == (FAIL, "out of time after 1 s:")
    wait_for(lambda: not Path(f"/proc/{child}").exists(), 10)


def test_emulation_follows_the_site() -> None:
    shown = part("import os; print(os.environ.get('BATCHNORM_CUDA_EMULATE', 'off'))", host=True)
    assert run_part(shown, HERE, 60).text == "off"
    assert run_part(shown, NOWHERE, 60).text.startswith("1 [")


def test_later_parts_keep_their_reserve() -> None:
    lines: list[str] = []
    slow = Part("slow", lambda site: [["sleep", "600"]], 0.5)
    quick = Part("quick", lambda site: [["echo", "done"]], 2)
    verdicts = run_all([slow, quick], HERE, 3, lambda verdict: lines.append(str(verdict)))
    assert [v.outcome.status for v in verdicts] == [FAIL, PASS]
    assert verdicts[0].outcome.text.startswith("out of time after 1 s")
    assert lines == [str(v) for v in verdicts]


def verdicts(*statuses: str) -> list[Verdict]:
    return [Verdict(f"step {n}", Outcome(s, "text"), 1.0) for n, s in enumerate(statuses)]


@pytest.mark.parametrize(
    "statuses, status, rehearsed",
    [
        ([PASS, PASS], 0, 0),
        ([PASS, MISSING], 2, 0),
        ([HOST, NO_GPU], 2, 0),
        ([PASS, FAIL, NO_GPU], 1, 1),
    ],
)
def test_exit_status(statuses: list[str], status: int, rehearsed: int) -> None:
    assert exit_status(verdicts(*statuses), rehearse=False) == status
    assert exit_status(verdicts(*statuses), rehearse=True) == rehearsed


def test_the_last_line_names_what_is_missing() -> None:
    text = conclusion(verdicts(PASS, NO_GPU, HOST, NO_GPU))
    assert text == "1 of 4 passed on a GPU; NO GPU: step 1, step 3; HOST: step 2"


def test_the_command_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its long steps are left to `make gpu-check-rehearsal`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = [one for one in plans.CHECK if one.name in ("device", "graph", "tests")]
    monkeypatch.setattr(plans, "CHECK", few)
    assert gpu_check.main([f"--out={tmp_path}"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:-1]] == [
        ["NO", "GPU", name] for name in ("device", "graph", "tests")
    ]
    assert "needs a GPU: " in lines[0]
    assert lines[-1] == "0 of 3 passed on a GPU; NO GPU: device, graph, tests"
    assert gpu_check.main([f"--out={tmp_path}", "--rehearse"]) == 0


def test_parts_cover_the_check() -> None:
    names = [one.name for one in plans.CHECK]
    assert names == [
        *("device", "build", "determinism", "graph"),
        *("memcheck", "racecheck", "initcheck", "synccheck", "tests", "bench"),
    ]
    for one in plans.CHECK:
        for site in (HERE, NOWHERE):
            for command in one.commands(site):
                assert all(isinstance(word, str) for word in command)
    sanitized = plans.CHECK[names.index("racecheck")].commands(HERE)[0]
    assert sanitized[-4:] == ["--tool", "racecheck", "--sanitizer", "sanitizer"]
    assert sum(one.reserve for one in plans.CHECK) < 10 * 60
    assert HERE.csv_path.name == "gpu-1.csv"
    bench = plans.CHECK[-1].commands(replace(HERE, peer_tolerance=1e4))[0]
    assert bench[-1] == "--peer-tolerance=10000"


def test_verdicts_go_into_the_report(tmp_path: Path) -> None:
    site = replace(HERE, out=tmp_path)
    assert gpu_check.add_to_report(site, verdicts(PASS)) == []
    write_csv(site.csv_path, [row()])
    write_json(site.csv_path.with_suffix(".json"), {"device": "GPU 1"}, [row()])
    files = gpu_check.add_to_report(site, verdicts(PASS, MISSING))
    assert {file.suffix for file in files} >= {".csv", ".md", ".html"}
    found = json.loads((tmp_path / "gpu-1.json").read_text())["environment"]
    assert found["check, step 1"] == "MISSING, text"
    assert "- check, step 0: PASS, text" in (tmp_path / "gpu-1.md").read_text()


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_where_the_sanitizer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert parts.find_sanitizer(tmp_path / "cuda") is None
    missing = replace(HERE, sanitizer=None)
    memcheck = next(one for one in plans.CHECK if one.name == "memcheck")
    assert "no compute-sanitizer" in memcheck.missing(missing).text
    pypi = executable(tmp_path / "site/nvidia/cu13/bin/compute-sanitizer", "")
    assert parts.find_sanitizer(None) == pypi
    own = executable(tmp_path / "cuda/compute-sanitizer/compute-sanitizer", "")
    assert parts.find_sanitizer(tmp_path / "cuda") == own
    assert parts.find_sanitizer(None) == pypi


@pytest.fixture
def sanitizer(tmp_path: Path) -> Path:
    """Stands in for compute-sanitizer: an error in bfloat16, else runs the program."""
    return executable(
        tmp_path / "compute-sanitizer",
        '#!/bin/sh\n[ "$1 $3" = "--tool --error-exitcode" ] || exit 5\n'
        'case "$*" in *bfloat16*) echo "ERROR SUMMARY: 1 error"; exit "$4";; esac\n'
        'shift 6; exec "$@"\n',
    )


@pytest.mark.parametrize("wrong", [True, False])
def test_errors_of_the_sanitizer_are_seen(
    sanitizer: Path, tmp_path: Path, wrong: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    driver = executable(tmp_path / "driver", "#!/bin/sh\nexit 0\n")
    if not wrong:
        cases = tuple(case for case in sanitize.CASES if "bfloat16" not in case)
        monkeypatch.setattr(sanitize, "CASES", cases)
    arguments = ["sanitize", str(driver), "--tool", "memcheck", "--sanitizer", str(sanitizer)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert sanitize.main() == int(wrong)
    output = capsys.readouterr().out
    assert ("reports errors\nERROR SUMMARY: 1 error" in output) == wrong
    total = len(sanitize.CASES)
    assert f"{total - 2 * wrong} of {total} cases without an error" in output


def test_a_driver_that_fails_is_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    driver = executable(tmp_path / "driver", "#!/bin/sh\necho WRONG; exit 1\n")
    monkeypatch.setattr(sys, "argv", ["sanitize", str(driver)])
    assert sanitize.main() == 1
    assert f"0 of {len(sanitize.CASES)} cases" in capsys.readouterr().out


@pytest.mark.parametrize("device", sorted(devices.DEVICES))
def test_a_forced_team_is_possible_on_every_device(device: str) -> None:
    """The driver ends with an error where it is not."""
    dtypes = {"half": "float16", "bfloat16": "bfloat16", "float": "float32", "double": "float64"}
    for case in sanitize.CASES:
        words = case.split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        if given.get("--strategy") != "team":
            continue
        n, c, s = (int(given[name]) for name in ("--n", "--c", "--s"))
        plan = explain(
            (n, c, s) if s > 1 else (n, c),
            dtype=getattr(torch, dtypes[given["--dtype"]]),
            device=device,
            op=given["--op"],
            strategy="team",
            scope=given.get("--scope", "auto"),
            team_size=int(given.get("--team-size", 0)),
        )
        assert plan.strategy == "team", (case, plan.reason)


def test_runs_are_equal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(repeat, "_SMALL", repeat._SMALL[:1])
    monkeypatch.setattr(repeat, "_LARGE", repeat._SMALL[:1])
    assert repeat.main(["runs", "3"]) == 0
    assert "3 runs of 1 cases equal to the bit" in capsys.readouterr().out
    original, calls = repeat.Step.__call__, []

    def drifting(self: repeat.Step) -> list[torch.Tensor]:
        calls.append(self)
        results = original(self)
        results[-1] = results[-1] + (1e-6 if len(calls) == 3 else 0)
        return results

    monkeypatch.setattr(repeat.Step, "__call__", drifting)
    assert repeat.main(["runs", "5"]) == 1
    assert "run 2 of" in capsys.readouterr().out


def test_graphs_need_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert repeat.main(["graph"]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert repeat.main([]) == 3


@pytest.mark.gpu
def test_graphs_on_the_gpu() -> None:
    assert repeat.main(["graph"]) == 0
