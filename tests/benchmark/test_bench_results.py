"""Rows in files, and the comparison of two runs."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from bench_cases import row

from bench import compare
from bench.rows.results import (
    FAILED,
    INACCURATE,
    MODEL,
    UNSUPPORTED,
    ResultsError,
    append_row,
    read_csv,
    read_environment,
    write_csv,
    write_json,
)

ROWS = [
    row(),
    row(provider="cudnn", status=UNSUPPORTED, ms=None, note='torch: Native, "bf16", is what runs'),
    row(kind=MODEL, op="both", count=7),
]


def test_rows_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, ROWS)
    assert read_csv(path) == ROWS
    write_csv(path, ROWS[:1])
    assert read_csv(path) == ROWS[:1]


def test_every_figure_of_a_model_says_so(tmp_path: Path) -> None:
    """In the name of its column, beside the kind of the row; and there is no time."""
    write_csv(tmp_path / "a.csv", ROWS[2:])
    (record,) = csv.DictReader((tmp_path / "a.csv").open())
    assert record["kind"] == "model"
    known = {"kind", "device", "set", "shape", "layout", "dtype", "op", "count", "provider"}
    known |= {"status", "compulsory_bytes", "backend", "note"}
    figures = {name for name, value in record.items() if value and name not in known}
    assert figures and all(name.startswith("model_") for name in figures)


def test_json_holds_rows_and_environment(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"device": "GPU 1"}, ROWS)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["environment"] == {"device": "GPU 1"}
    assert content["rows"] == [asdict(one) for one in ROWS]
    assert read_environment(tmp_path / "a.csv") == {"device": "GPU 1"}
    assert read_environment(tmp_path / "b.csv") == {}


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(ResultsError, match="No such file"):
        read_csv(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ResultsError, match="expected the columns kind, device"):
        read_csv(path)
    path.unlink()
    append_row(path, ROWS[0])
    text = path.read_text()
    path.write_text(text.replace(",2,", ",two,", 1))
    with pytest.raises(ResultsError, match="line 2: ms cannot be 'two'"):
        read_csv(path)
    path.write_text(text.rstrip("\n").rpartition(",team,")[0] + "\n")  # the disk was full
    with pytest.raises(ResultsError, match="line 2: "):
        read_csv(path)


def timed(low: float, median: float, high: float, **values: object) -> object:
    return row(ms=median, ms_p20=low, ms_p80=high, **values)


@pytest.mark.parametrize(
    "after, verdict",
    [
        (timed(1.9, 2.0, 2.1), compare.TIE),
        (timed(2.05, 2.2, 2.3), compare.TIE),  # 10 %, but the ranges overlap
        (timed(2.15, 2.2, 2.3), compare.SLOWER),
        (timed(1.7, 1.8, 1.85), compare.FASTER),
        (replace(ROWS[0], status=INACCURATE, ms=None, note="3 times"), compare.BROKEN),
        (replace(ROWS[0], status=FAILED, ms=None), compare.BROKEN),
        (None, compare.GONE),
    ],
)
def test_verdicts(after: object, verdict: str) -> None:
    (change,) = compare.compare([timed(1.9, 2.0, 2.1)], [after] if after else [])
    assert change.verdict == verdict
    assert str(change).startswith(verdict)


def test_less_than_clocks_do_is_a_tie() -> None:
    (change,) = compare.compare([timed(2.0, 2.0, 2.0)], [timed(2.01, 2.01, 2.01)])
    assert change.verdict == compare.TIE


def test_what_never_ran_is_no_regression() -> None:
    absent = row(ms=None, status=UNSUPPORTED)
    assert [c.verdict for c in compare.compare([absent], [absent])] == [compare.TIE]
    assert [c.verdict for c in compare.compare([absent], [row()])] == [compare.NEW]
    assert [c.verdict for c in compare.compare([], [row()])] == [compare.NEW]


def test_models_are_compared_by_bytes() -> None:
    before, after = row(kind=MODEL), row(kind=MODEL, model_bytes=1600)
    (change,) = compare.compare([before], [after])
    assert change.verdict == compare.MORE
    assert compare.compare([after], [before])[0].verdict == compare.LESS
    assert "1,500 bytes (model) -> 1,600 bytes (model), x 1.067" in str(change)


def run(tmp_path: Path, before: list, after: list, *arguments: str) -> int:
    write_csv(tmp_path / "a.csv", before)
    write_csv(tmp_path / "b.csv", after)
    return compare.main([str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), *arguments])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    peer = row(provider="native")
    slow = timed(3.9, 4.0, 4.1)
    assert run(tmp_path, [row(), peer], [slow, peer]) == 1
    output = capsys.readouterr().out
    assert (
        "SLOWER  ours          net 2x3x5x5 nchw fp16 forward  2.0000 ms (1.9000-2.1000)" in output
    )
    assert output.endswith("2 compared, 1 regressed\n") and "native" not in output
    assert run(tmp_path, [row(), peer], [slow, peer], "--provider=native", "--all") == 0
    assert "tie     native" in capsys.readouterr().out


@pytest.mark.parametrize("other", [row(device="GPU 2"), row(kind=MODEL)])
def test_no_comparison_across_devices_or_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture, other: object
) -> None:
    assert run(tmp_path, [row()], [other]) == 2
    assert "the runs differ in" in capsys.readouterr().err
