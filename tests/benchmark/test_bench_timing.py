"""Times without a clock: statistics, turns, rotation of inputs."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bench_cases import MIB, FakeClock

from bench.__main__ import main
from bench.rows import records
from bench.rows.fused import FusedRow
from bench.rows.results import read_csv
from bench.timing.clock import CudaClock, interleave, measure, rotation, rounds_for
from bench.timing.samples import percentile, spread


def test_percentiles() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0, 0.2, 0.5, 0.8, 1)] == [1, 1.8, 3, 4.2, 5]
    result = spread([*values, 1000.0])
    assert result.median == statistics.median([*values, 1000.0])
    assert (result.low, result.high, result.samples) == (2.0, 5.0, 6)
    assert spread([7.0]).high == 7.0
    with pytest.raises(ValueError, match="expected values"):
        percentile([], 0.5)


def test_rotation_leaves_three_caches_between_two_uses() -> None:
    for nbytes in (1, 1000, MIB, 3 * MIB, 100 * MIB):
        sets, fill = rotation(nbytes, MIB)
        assert 2 <= sets <= 16
        assert fill or (sets - 1) * nbytes >= 3 * MIB
        assert not fill or nbytes < MIB


def test_providers_take_turns_on_fresh_inputs() -> None:
    """A B, A B: and no two calls in a row on the same set."""
    used: list[tuple[str, int]] = []

    def calls(name: str) -> list:
        return [lambda at=at: used.append((name, at)) for at in range(3)]

    clock = FakeClock(lambda start: float(start))
    samples = interleave({"a": calls("a"), "b": calls("b")}, clock, rounds=6)
    assert [name for name, _ in used] == ["a", "b"] * 6
    assert all(one[1] != other[1] for one, other in pairwise(used))
    assert {at for name, at in used if name == "a"} == {0, 1, 2}
    assert samples == {"a": [0, 2, 4, 6, 8, 10], "b": [1, 3, 5, 7, 9, 11]}
    # Nothing waits between the providers of a round: they are all enqueued first.
    assert clock.log == ["start", "start", "wait"] * 6


def test_measure_lasts_as_long_as_it_is_told() -> None:
    def samples(seconds: float, ms: float) -> int:
        calls = {"a": [lambda: None], "b": [lambda: None]}
        return measure(calls, FakeClock(lambda start: ms), seconds)["a"].samples

    assert samples(0.5, 5.0) == 50
    assert samples(0.001, 5.0) == 10  # never fewer
    assert samples(100.0, 0.001) == 200  # never more
    assert rounds_for(1.0, 0.0) == 200
    assert measure({}, FakeClock(lambda start: 1.0), 1.0) == {}


def test_first_calls_are_not_counted() -> None:
    """Three of each load kernels and warm up; here two take a second, unlike those that follow."""
    clock = FakeClock(lambda start: 1000.0 if start < 2 else 1.0)
    result = measure({"a": [lambda: None]}, clock, 0.05)["a"]
    assert (result.median, result.high, result.samples) == (1.0, 1.0, 50)


def test_what_lies_between_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call alone: not the read that fills the cache, nor the spin that hides the host."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 1.5

    class Filler:
        def max(self) -> None:
            log.append("fill")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("spin"))
    monkeypatch.setattr(torch, "zeros", lambda size, device: Filler())
    for fill in (True, False):
        log.clear()
        clock = CudaClock(MIB, fill)
        first = clock.start(lambda: log.append("call"))
        assert log == ["fill"] * fill + ["spin", "event", "call", "event"]
        assert clock.milliseconds(first) == 1.5
        assert set(clock.start(lambda: None)) == set(first)  # events are used again


@pytest.mark.gpu
def test_a_gpu(tmp_path: Path) -> None:
    """The whole path on the real clock: graphs, events, and all providers that are there."""
    arguments = ["--shape=32,64,56,56", "--shape=4096,256", "--seconds=0.05", f"--out={tmp_path}"]
    assert main(arguments) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = read_csv(path)
    ours = [row for row in rows if row.provider in ("ours", "ours:two_pass")]
    assert len(ours) == 2 * 3 * 2
    for row in ours:
        assert (row.status, row.method) == ("ok", "graph"), row
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
        assert row.copy_percent < 130  # faster than a copy of as many bytes it cannot be
    assert all(row.ms for row in rows if row.provider == "copy")


@pytest.mark.gpu
def test_a_network_fused_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    arguments = ["--fuse", "--model=torchvision.models.resnet18", "--input=8,3,64,64"]
    assert main([*arguments, "--seconds=0.02", f"--out={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*-fused.csv")
    for row in records.read(path, FusedRow):
        assert (row.status, row.method) == ("ok", "graph"), row
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
