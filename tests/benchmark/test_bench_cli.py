"""`python -m bench` from its arguments to its files, on the models and on a clock that is set."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench_cases import machine
from torch import nn

from bench import environment, model, options, runner
from bench.__main__ import COMMANDS, main
from bench.rows.results import INACCURATE, MEASURED, MODEL, Row, read_csv
from bench.timing import measure

TINY = ["--shape=2,3,5,5", "--shape=8,4", "--count=0"]
NAMES = [name for name in runner.NAMES if name not in model.NO_MODEL]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the models and about a machine of their own, on a GPU as well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("BATCHNORM_CUDA_EMULATE", "1")


def test_help_fits_a_screen(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    parser_options = {name for name in vars(options.parse([])) if name not in ("measure", "sets")}
    for name in parser_options - {"shapes", "layouts", "dtypes", "ops", "providers"}:
        assert f"--{name.replace('_', '-')}" in text
    assert all(f"python -m bench {command}" in text for command in COMMANDS)
    assert all(name in text for name in (*options.SETS, *options.NAMES, *options.devices.DEVICES))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set=resnet"], "argument --set: invalid choice: 'resnet'"),
        (["--shape=3"], "argument --shape: expected two or more sizes"),
        (["--seconds=0"], "argument --seconds: expected a number above 0, got '0'"),
        (["--count=-1"], "argument --count: expected an integer of 0 or more, got '-1'"),
        (["--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device=h999"], "argument --device: invalid choice: 'h999'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults() -> None:
    parsed = options.parse([])
    assert (parsed.sets, parsed.ops) == (["short"], ["forward", "backward", "both"])
    assert (parsed.dtypes, parsed.layouts, parsed.device) == (["fp16"], ["nchw"], "h100")
    assert parsed.peer_tolerance == 1.0
    assert options.parse(["--shape=2,3"]).sets == []


def run(tmp_path: Path, *arguments: str) -> int:
    return main([*arguments, f"--out={tmp_path}"])


def test_without_a_gpu_everything_is_a_models(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(tmp_path, *TINY, "--device=a100", "--dtype=fp16", "--dtype=bf16") == 0
    captured = capsys.readouterr()
    assert "model: no figure below is measured" in captured.err
    assert captured.out.startswith("# Batch norm on a described A100-SXM4-40GB (model)")
    rows = read_csv(tmp_path / "model.csv")
    assert {row.kind for row in rows} == {MODEL}
    assert [row.provider for row in rows] == NAMES * (2 * 2 * 3)
    content = json.loads((tmp_path / "model.json").read_text())
    assert content["environment"]["kind"] == "model" and content["environment"]["complete"]
    assert len(content["rows"]) == len(rows)
    assert content["environment"]["torch"] == torch.__version__
    assert "(model)" in (tmp_path / "model.html").read_text()
    assert (tmp_path / "model-bytes.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = types.ModuleType("user_models")
    module.net = lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    monkeypatch.setitem(sys.modules, "user_models", module)
    arguments = ["--model=user_models.net", "--input=2,3,6,6", "--op=both", "--count=0"]
    assert run(tmp_path, *arguments, "--provider=ours", "--provider=native") == 0
    assert "## Sum of a training step (model)" in capsys.readouterr().out
    rows = read_csv(tmp_path / "model.csv")
    assert [(row.provider, row.count, row.shape) for row in rows] == [
        ("ours", 2, "2x3x6x6"),
        ("native", 2, "2x3x6x6"),
    ]
    assert run(tmp_path, "--model=user_models.absent") == 2
    assert "user_models has no 'absent'" in capsys.readouterr().err


def test_an_interrupted_run_leaves_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ctrl-C in the second case, after the first of its rows."""
    original = model.rows

    def rows(case: object, names: list[str], settings: object) -> Iterator[Row]:
        for at, row in enumerate(original(case, names, settings)):
            if row.op == "backward" and at == 1:
                raise KeyboardInterrupt
            yield row
            # On the disk before the next one is begun.
            assert read_csv(tmp_path / "model.csv")[-1] == row

    monkeypatch.setattr(model, "rows", rows)
    assert run(tmp_path, *TINY) == 130
    left = read_csv(tmp_path / "model.csv")
    assert [row.op for row in left] == ["forward"] * len(NAMES) + ["backward"]
    assert f"interrupted: {len(left)} rows are in" in capsys.readouterr().err
    content = json.loads((tmp_path / "model.json").read_text())
    assert not content["environment"]["complete"] and len(content["rows"]) == len(left)
    assert (tmp_path / "model.html").exists()
    monkeypatch.setattr(model, "rows", original)
    assert run(tmp_path, "--shape=8,4", "--count=0", "--op=forward") == 0
    assert len(read_csv(tmp_path / "model.csv")) == len(NAMES)  # a new run, a new file


def test_an_interrupted_report_leaves_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner.report, "write", interrupt)
        assert run(tmp_path, "--shape=8,4", "--count=0", "--op=forward") == 130
    assert len(read_csv(tmp_path / "model.csv")) == len(NAMES)
    assert main(["report", str(tmp_path / "model.csv")]) == 0
    assert (tmp_path / "model.html").exists()


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock says 1 ms, in place of a GPU."""
    monkeypatch.setattr(runner, "gpu", machine)
    original = options.parse

    def parse(arguments: list[str]) -> object:
        parsed = original(arguments)
        parsed.measure = True
        return parsed

    monkeypatch.setattr(options, "parse", parse)
    monkeypatch.setattr(environment, "collect", lambda device: {"device": "GPU 1"})


@pytest.mark.usefixtures("measuring")
def test_measured_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path, "--shape=2,3,5,5", "--seconds=0.001") == 0
    assert "model" not in capsys.readouterr().out
    rows = read_csv(tmp_path / "gpu-1.csv")
    assert {row.kind for row in rows} == {MEASURED}
    # apex and InPlace-ABN are not installed: left out, unless they are asked for.
    assert [row.provider for row in rows[:7]] == [
        *("ours", "ours:two_pass", "ours:team", "cudnn", "native", "compile", "copy")
    ]
    assert {row.ms for row in rows if row.status == "ok"} == {1.0}
    assert {row.op for row in rows} == {"forward", "backward", "both"}


@pytest.mark.usefixtures("measuring")
def test_what_is_ours_and_wrong_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(measure, "error", lambda results, expected: 2.0)
    arguments = ["--shape=2,3,5,5", "--op=forward", "--provider=ours", "--provider=native"]
    assert run(tmp_path, *arguments, "--seconds=0.001") == 1
    assert "ours given 2x3x5x5 nchw fp16 forward: inaccurate" in capsys.readouterr().err
    assert {row.status for row in read_csv(tmp_path / "gpu-1.csv")} == {INACCURATE}


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "bench.pages.html")
    monkeypatch.delitem(sys.modules, "bench.report")
    monkeypatch.delattr("bench.report")
    monkeypatch.delattr("bench.pages.html")
    assert main(["report", "run.csv"]) == 2
    assert "`pip install '.[bench]'` brings it" in capsys.readouterr().err


def test_environment_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_output", lambda *command: "")
    assert set(environment.query_driver(0).values()) == {"unknown"}
    assert environment.commit() == "unknown"
    answer = "600.1, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W, 41, 0x0000000000000000"
    monkeypatch.setattr(environment, "_output", lambda *command: answer)
    assert environment.query_driver(0)["clock_sm_mhz"] == "1980 MHz"
    assert environment.file_stem("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
