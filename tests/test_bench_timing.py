"""Times without a clock: statistics, turns, rotation of inputs."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
from bench_cases import MIB, FakeClock

from bench.samples import percentile, spread
from bench.timing import interleave, measure, rotation, rounds_for


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
    """Three of each load kernels and warm up; here two take a second, and say nothing of the rest."""
    clock = FakeClock(lambda start: 1000.0 if start < 2 else 1.0)
    result = measure({"a": [lambda: None]}, clock, 0.05)["a"]
    assert (result.median, result.high, result.samples) == (1.0, 1.0, 50)
