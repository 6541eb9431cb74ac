"""The written byte model, and the bytes of the models that stand in for a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from bench_cases import MIB, case

from bench import model
from bench.models import byte_model
from bench.models.traffic_model import Case
from bench.rows.results import MODEL, OK, UNSUPPORTED

BIG, NO_CACHE = 100 * MIB, 0


def test_compulsory_bytes() -> None:
    found = {op: byte_model.compulsory_bytes(op, 10) for op in byte_model.OPS}
    assert found == {"forward": 20, "backward": 30, "both": 50}
    assert case("both").compulsory_bytes == 5 * 2 * 150
    assert byte_model.gb_per_s(2 * 10**9, 1000.0) == pytest.approx(2.0)


def test_peers_without_a_cache() -> None:
    def tensors(peer: str, op: str) -> float:
        return byte_model.peer_bytes(peer, op, BIG, NO_CACHE) / BIG

    assert [tensors("native", op) for op in byte_model.OPS] == [3, 5, 8]
    assert [tensors("inplace_abn", op) for op in byte_model.OPS] == [3, 7, 10]


@pytest.mark.parametrize(
    "op, size, moved",
    [
        # A cache of 12: half of it for x, half for what is written, or all of x is evicted in time.
        ("forward", 6, 2 * 6),
        ("forward", 8, 3 * 8 - 4),
        ("forward", 12, 3 * 12),
        ("backward", 4, 3 * 4),
        ("backward", 5, 5 * 5 - 2 * 2),
        ("backward", 6, 5 * 6),
    ],
)
def test_peers_find_what_the_cache_holds(op: str, size: int, moved: int) -> None:
    assert byte_model.peer_bytes("native", op, size, 12) == moved


def test_peers_find_what_a_cache_really_holds() -> None:
    """The rule against a cache of 64 lines, least recently used first out, one line at a time."""
    lines = 64
    for size in (8, 32, 40, 50, 64, 80):
        cache: dict[tuple[str, int], None] = {}
        moved = 0

        def touch(name: str, at: int, cache: dict = cache) -> int:
            missed = (name, at) not in cache
            cache.pop((name, at), None)
            cache[name, at] = None
            if len(cache) > lines:
                del cache[next(iter(cache))]
            return int(missed)

        for at in range(size):
            moved += touch("x", at)
        for at in range(size):
            moved += touch("x", at)
            touch("y", at)
            moved += 1  # every line of y goes to DRAM, sooner or later
        assert moved == pytest.approx(
            byte_model.peer_bytes("native", "forward", size, lines), abs=2
        )


def test_rows_of_the_models() -> None:
    settings = model.ModelSettings("a100", count_elements=144)
    names = ["ours", "ours:two_pass", "ours:team", "native", "cudnn", "compile", "copy"]
    rows = {row.provider: row for row in model.rows(case("both", (8, 4, 6, 6)), names, settings)}
    assert list(rows) == names
    for row in rows.values():
        assert (row.kind, row.device) == (MODEL, "A100-SXM4-40GB")
        assert row.ms is None and row.gb_s is None and row.copy_percent is None
    assert rows["copy"].model_ratio == 1
    assert rows["cudnn"].status == rows["compile"].status == UNSUPPORTED
    assert "not published" in rows["cudnn"].note
    ours = rows["ours"]
    assert ours.status == OK and ours.backend in ("team", "two_pass")
    assert ours.model_counted_ratio >= 1
    assert (ours.model_counted_shape, ours.model_counted_sms) == ("1x4x6x6", 14)
    assert rows["ours:two_pass"].backend == "two_pass"
    assert rows["ours:two_pass"].model_counted_ratio is None


def test_counted_bytes_are_over_compulsory_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both parts of a step together; each part is counted once."""
    counted = []

    def count(cut: Case, device: dict, strategy: str) -> SimpleNamespace:
        counted.append((cut.op, strategy, device["sm_count"]))
        compulsory = 200 if cut.op == "forward" else 300
        return SimpleNamespace(counted_bytes=compulsory + 100, compulsory_bytes=compulsory)

    monkeypatch.setattr(model, "count", count)
    model._count_once.cache_clear()
    settings = model.ModelSettings("t4", count_elements=1)
    ratios = {}
    for op in byte_model.OPS:
        (row,) = model.rows(case(op, (80, 4, 6, 6)), ["ours"], settings)
        ratios[op] = row.model_counted_ratio
    model._count_once.cache_clear()
    assert ratios == {"forward": 300 / 200, "backward": 400 / 300, "both": 700 / 500}
    assert counted == [("forward", "auto", 4), ("backward", "auto", 4)]


def test_a_team_that_is_impossible_says_why() -> None:
    huge = case("forward", (2, 8, 2**28), dtype="fp32")
    (row,) = model.rows(huge, ["ours:team"], model.ModelSettings("t4", 0))
    assert row.status == UNSUPPORTED
    assert row.note.startswith("no team: ")
    assert row.model_bytes is None
