"""`python -m bench exchange`: slopes over rounds of teams that are forced, on a set clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_cases import machine

from batchnorm_cuda import devices
from batchnorm_cuda._build.extension import load_emulated
from bench import exchange
from bench.__main__ import main
from bench.exchange import Effort, ExchangeRow, Forced
from bench.rows import records
from bench.tune import HOST_LIMITS, Setting
from bench.tuning.rows import HOST, OK, UNSUPPORTED

EFFORT = Effort(calls=2, rounds=(1, 3), samples=1)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("BATCHNORM_CUDA_EMULATE", "1")


def setting(device: str | None = None, **values: object) -> Setting:
    extension = load_emulated()
    info = extension.device_info()
    if device is not None:
        info = devices.planner_properties(devices.describe(device))
    return Setting(HOST, machine(**values), extension, info, HOST_LIMITS)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("BATCHNORM_CUDA_EMULATE")
    assert main(["exchange"]) == 2
    assert capsys.readouterr().err == "exchange: no GPU\n"


def test_an_h100_has_all_teams_in_as_many_rounds_as_asked_for() -> None:
    h100 = setting("h100")
    for team in exchange.teams_of(("along_s", "along_c")):
        most = exchange.planned(h100, team, team.sizes(1024))
        assert most is not None, team
        if team.scope == "block":
            continue
        for rounds in exchange.GPU_EFFORT.rounds:
            found = exchange.planned(h100, team, team.sizes(most["teams"] * rounds))
            assert found is not None and found["rounds"] == rounds, team
            assert found["register_windows"] >= 4 and found["shared_windows"] == 0
    assert not exchange.planned(h100, Forced("along_s", "cluster", 16), (16, 4, 8192))


def test_the_slope_over_rounds() -> None:
    """Calls of a row: the fewer rounds, then the more, in turns; the first turn does not count."""
    took = [9.0, 9.0, 4.0, 10.0]  # milliseconds of two calls each
    row = exchange.exchange_row(
        setting(took=lambda start: took[start]), EFFORT, Forced("along_s", "block", 1), None
    )
    assert (row.status, row.us_exchange) == (OK, None)
    assert row.us == pytest.approx((10.0 - 4.0) * 1000 / 2 / (3 - 1))
    row = exchange.exchange_row(
        setting(took=lambda start: took[start]),
        EFFORT,
        Forced("along_s", "grid", 2),
        block_us=1000.0,
    )
    assert row.us_exchange == pytest.approx(1500.0 - 1000.0)


def test_launches_in_a_graph_and_one_by_one() -> None:
    """In turns; the graph's take half as long."""
    found = setting(took=lambda start: 4.0 - 2.0 * (start % 2), capture=lambda call: (call, None))
    rows = list(exchange.launch_rows(found, EFFORT))
    assert [(row.scope, row.method) for row in rows] == [
        (scope, method) for scope in ("block", "cluster", "grid") for method in ("host", "graph")
    ]
    assert [row.us for row in rows] == [2000.0, 1000.0] * 3


def test_what_fails_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("too many resources requested")

    found = setting()
    monkeypatch.setattr(exchange, "make_call", refuse)
    rows = list(exchange.rows(found, EFFORT))
    assert [row.what for row in rows].count("launch") == 3
    assert {row.status for row in rows} == {"failed", UNSUPPORTED}
    assert any("too many resources" in row.note for row in rows)


def test_a_file_on_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_CLUSTERS", (2,))
    monkeypatch.setattr(exchange, "_GRIDS", (2, 132))
    assert main(["exchange", f"--out={tmp_path}"]) == 0
    rows = records.read(tmp_path / "exchange.csv", ExchangeRow)
    assert {row.kind for row in rows} == {HOST}
    launches = [row for row in rows if row.what == "launch"]
    assert [(row.scope, row.team_size) for row in launches] == [
        ("block", 1),
        ("cluster", 2),
        ("grid", 2),
    ]
    assert all(row.us is not None and row.us > 0 for row in launches)
    for row in rows:
        small = row.team_size <= 2
        assert row.status == (OK if small else UNSUPPORTED)
        if row.what == "exchange" and small:
            assert (row.us_exchange is None) == (row.scope == "block")
