"""`bench.counters`: ncu's answers as they come, and which problem a launch belongs to."""

from __future__ import annotations

import csv
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_cases  # noqa: F401, which finds bench/
import pytest
import torch
from conftest import HAS_GPU, KERNELS

from batchnorm_cuda._build.extension import load_emulated
from bench import counters
from bench.counters import COUNTED, FAILED
from bench.gpu import ncu
from bench.gpu.counters_problems import MARKER, PROBLEMS, run
from bench.gpu.ncu import DURATION, READ, WRITTEN, Launch

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
TEAM = (
    "void batchnorm_cuda::team_kernel<batchnorm_cuda::AlongC<__half, int, true>, batchnorm_cuda::"
    "TeamForward, 16, batchnorm_cuda::Identity<float> >(int, int)"
)
MARK = "void batchnorm_cuda::(anonymous namespace)::sum_ranks_kernel<float>(int)"


def launch(
    i: int, name: str, read: str = "1,000", written: str = "500", unit: str = "byte"
) -> list[str]:
    begin = f'"{i}","77","python3.12","host","{name}","1","7","(256, 1, 1)","(132, 1, 1)","0","9.0"'
    metrics = ((READ, unit, read), (WRITTEN, unit, written), (DURATION, "ns", "2,500"))
    return [f'{begin},"Command line profiler metrics","{m}","{u}","{v}"' for m, u, v in metrics]


def answer(*launches: list[str]) -> str:
    """What ncu writes: its own lines, the table, more of its own."""
    rows = [line for lines in launches for line in lines]
    return "\n".join(["==PROF== Connected to process 77", HEADER, *rows, "==PROF== Disconnected"])


TEXT = answer(
    launch(0, MARK, "64"),
    launch(1, TEAM, "100,000", "90,000"),
    launch(2, MARK, "64"),
    launch(3, "collect_statistics_kernel", "1,000", "10"),
    launch(4, "merge_kernel", "10", "20"),
    launch(5, "transform_input_kernel", "900", "1,000"),
)


def problem(launches: int = 1, predicted: int = 200_000) -> dict[str, Any]:
    known = {"dtype": "fp16", "layout": "nhwc", "op": "forward", "shape": "8x8"}
    return known | {"launches": launches, "predicted_bytes": predicted}


KNOWN = {"kind": "measured", "device": "GPU 1", "l2_bytes": 50}


def test_launches_are_read() -> None:
    launches = ncu.parse(TEXT)
    assert launches[1] == Launch(TEAM, 100_000, 90_000, 2500)
    assert [each.name for each in launches[3:]] == [
        *("collect_statistics_kernel", "merge_kernel", "transform_input_kernel")
    ]


def test_launches_come_in_the_order_of_their_numbers() -> None:
    text = answer(launch(10, "merge_kernel"), launch(9, MARK))
    assert [each.name for each in ncu.parse(text)] == [MARK, "merge_kernel"]


def test_units_are_heeded() -> None:
    assert ncu.parse(answer(launch(0, TEAM, "1.5", unit="Mbyte")))[0].read_bytes == 1.5e6


@pytest.mark.parametrize(
    "lines, said",
    [
        (launch(0, TEAM, "n/a"), "got 'n/a' 'byte'"),
        (launch(0, TEAM, unit="sector"), "got '1,000' 'sector'"),
        (launch(0, TEAM)[:2], "lacks ['gpu__time_duration.sum']"),
    ],
)
def test_no_number_is_an_error(lines: list[str], said: str) -> None:
    with pytest.raises(ValueError) as error:
        ncu.parse(answer(lines))
    assert said in str(error.value)


def test_rows_belong_to_their_problems() -> None:
    rows = counters.rows_of([problem(), problem(3, 3000)], TEXT, KNOWN, "ended with status 0")
    assert [row["status"] for row in rows] == [COUNTED, COUNTED]
    assert (rows[0]["read_bytes"], rows[0]["written_bytes"]) == (100_000, 90_000)
    assert rows[0]["counted_over_predicted"] == "0.9500" and rows[0]["kernels"] == "team_kernel"
    assert (rows[1]["read_bytes"], rows[1]["written_bytes"]) == (1910, 1030)
    assert rows[1]["us"] == "7.50"
    assert rows[1]["kernels"] == "collect_statistics_kernel merge_kernel transform_input_kernel"
    assert set(rows[0]) <= set(counters.COLUMNS)


def test_another_number_of_launches_is_no_count() -> None:
    rows = counters.rows_of([problem(2), problem(3)], TEXT, KNOWN, "")
    assert [row["status"] for row in rows] == [FAILED, COUNTED]
    assert rows[0]["note"] == "ncu saw 1 launches of 2"


def test_problems_that_ncu_did_not_reach_are_rows() -> None:
    rows = counters.rows_of([problem(), problem(3), problem()], TEXT, KNOWN, "killed")
    assert [row["status"] for row in rows] == [COUNTED, COUNTED, FAILED]
    assert "killed" in rows[2]["note"]


def test_no_permission_is_said() -> None:
    text = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\n==PROF== Disconnected"
    rows = counters.rows_of([problem()], text, KNOWN, "ended with status 1")
    assert rows[0]["status"] == FAILED and "ERR_NVGPUCTRPERM" in rows[0]["note"]
    nothing = counters.rows_of([], "", KNOWN, "ended with status 1: no compiler")
    assert nothing[0]["status"] == FAILED and "no compiler" in nothing[0]["note"]


def test_the_summary_names_the_farthest() -> None:
    near = counters.counted(KNOWN | problem(), [Launch(TEAM, 100_000, 96_000, 1)])
    far = counters.counted(KNOWN | problem() | {"op": "backward"}, [Launch(TEAM, 2e5, 60_000, 1)])
    text = counters.summary([near, far])
    assert text.startswith(f"counters: FAIL on GPU 1: 2 of {len(PROBLEMS)} problems counted")
    assert "0.980 to 1.300 of the prediction, farthest fp16 nhwc backward 8x8" in text
    assert counters.summary([near] * len(PROBLEMS)).startswith("counters: PASS on GPU 1: 12 of 12")


def test_problems_are_beyond_the_cache_and_of_every_kind() -> None:
    assert len(PROBLEMS) == 12
    assert min(p.case.nbytes for p in PROBLEMS) >= 2 * 60 * 2**20
    assert {p.case.op for p in PROBLEMS} == {"forward", "backward"}
    assert {p.case.dtype for p in PROBLEMS} == {"fp16", "fp32"}
    assert {p.strategy for p in PROBLEMS} == {"auto", "two_pass"}


@pytest.mark.skipif(HAS_GPU, reason="counts launches of the host model")
def test_markers_part_the_launches() -> None:
    """On the host model, the problems cut: as many launches behind each marker as planned."""
    extension = load_emulated()
    said: list[dict[str, Any]] = []
    extension._host_model.start_traffic()
    ways = {0: "team", 6: "two_pass", 11: "team"}  # cut, all would be chosen to run in two passes
    cut = [replace(PROBLEMS[i].cut(1), strategy=way) for i, way in ways.items()]
    run(cut, extension, KERNELS.device, said.append)
    names = extension._host_model.stop_traffic()["launches"]
    groups = counters.grouped([Launch(name, 0, 0, 0) for name in names])
    assert [len(group) for group in groups] == [m["problem"]["launches"] for m in said]
    assert [len(group) for group in groups] == [1, 3, 1]


def fake_ncu(tmp_path: Path, text: str) -> Path:
    """A program that says two problems, and leaves `text` where ncu would."""
    said = [KNOWN, {"problem": problem()}, {"problem": problem(3, 3000)}]
    script = tmp_path / "ncu"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"assert '--clock-control' in sys.argv and '{MARKER}' in str(sys.argv)\n"
        f"for message in {said!r}: print('@' + json.dumps(message))\n"
        f"open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write({text!r})\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_a_run_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", f"{fake_ncu(tmp_path, TEXT).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert counters.main(["--out", str(tmp_path), "--seconds", "60"]) == 1  # 4 of 12
    with (tmp_path / "counters.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == [COUNTED] * 4
    assert rows[0]["device"] == "GPU 1" and rows[1]["read_bytes"] == "1910"
    assert capsys.readouterr().out.splitlines()[-1].startswith("counters: FAIL on GPU 1")


@pytest.mark.parametrize("gpu, said", [(False, "no GPU"), (True, "no ncu")])
def test_without_a_gpu_or_ncu_there_is_nothing_to_count_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    gpu: bool,
    said: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(ncu, "find_ncu", lambda: None)
    assert counters.main(["--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().out
