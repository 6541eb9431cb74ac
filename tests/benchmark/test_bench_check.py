"""Correctness before speed: what is wrong is not timed, and every provider's error is told."""

from __future__ import annotations

import importlib.machinery
import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from bench_cases import case, machine
from torch import Tensor

from bench.cases.case import BenchCase
from bench.rows.results import FAILED, INACCURATE, OK, UNSUPPORTED, Row
from bench.timing import check, measure, providers
from bench.timing.check import draw_channels, error, expect
from bench.timing.providers import Provider, Run
from bench.timing.steps import copy_of, make_call, make_tensors, run_once

OPS = ["forward", "backward", "both"]
RESULTS = {
    "forward": {"output", "running_mean", "running_var"},
    "backward": {"grad_input", "grad_weight", "grad_bias"},
}
RESULTS["both"] = RESULTS["forward"] | RESULTS["backward"]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are on the CPU, on a machine with a GPU as well."""
    monkeypatch.setenv("BATCHNORM_CUDA_EMULATE", "1")


def torchs(op: str) -> tuple[BenchCase, Provider, Run]:
    provider = providers.make("native", "cpu")
    return case(op), provider, provider.call(case(op))


@pytest.mark.parametrize("op", OPS)
def test_every_result_is_checked(op: str) -> None:
    tensors = make_tensors(case(op), "cpu", seed=0)
    expected = expect(tensors)
    results = run_once(*torchs(op), tensors)
    assert set(results) == RESULTS[op]
    assert error(results, expected) <= 1
    for name, value in results.items():
        # By less than 1 %, in one element: the tolerance is one rounding of float16 or float32.
        wrong = value.clone()
        wrong.view(-1)[-1] += 0.01 * value.abs().max()
        assert error(results | {name: wrong}, expected) > 1, name
        assert error(results | {name: value * math.nan}, expected) == math.inf
        assert error(results | {name: value[:1]}, expected) == math.inf


def test_channels_are_drawn_evenly() -> None:
    assert draw_channels(5, 10, most=100).tolist() == [0, 1, 2, 3, 4]
    assert draw_channels(100, 10, most=50).tolist() == [0, 25, 50, 74, 99]
    assert draw_channels(64, 2**25).tolist() == [0, 63]  # two at least
    assert draw_channels(1, 2**31).tolist() == [0]


def test_the_last_channel_of_a_large_tensor_is_checked() -> None:
    tensors = make_tensors(case("forward", (2, 40, 5, 5)), "cpu", seed=0)
    expected = expect(tensors, most=100)
    assert expected.note == "checked on 2 of 40 channels"
    results = run_once(*torchs("forward"), tensors)
    assert error(results, expected) <= 1
    for channel, seen in ((39, True), (20, False)):
        output = results["output"].clone()
        output[0, channel, 0, 0] += 1
        assert (error(results | {"output": output}, expected) > 1) == seen


def test_inputs_are_left_as_they_were() -> None:
    """A provider that works in place, or updates statistics, changes nothing for the next."""
    tensors = make_tensors(case(), "cpu", seed=0)
    before = copy_of(tensors)
    run_once(*torchs("both"), tensors)
    assert all(map(torch.equal, vars(tensors).values(), vars(before).values()))


def test_a_call_computes_the_operation_and_no_more() -> None:
    tensors = make_tensors(case(), "cpu", seed=0)
    assert set(make_call(*torchs("forward"), tensors)()) == {"output"}
    assert set(make_call(*torchs("backward"), tensors)()) == RESULTS["backward"]
    tensors = make_tensors(case(layout="nhwc"), "cpu", seed=0)
    assert tensors.x.is_contiguous(memory_format=torch.channels_last)
    assert tensors.x.stride(1) == 1


def run(names: list[str], op: str = "both", **values: object) -> dict[str, Row]:
    settings = {"seconds": 0.001, "peer_tolerance": 1.0, "cache": measure.CheckCache()}
    where = values.pop("machine", machine())
    rows = measure.rows(case(op), names, where, **{**settings, **values})
    return {row.provider: row for row in rows}


@pytest.mark.parametrize("op", OPS)
def test_rows_of_a_case(op: str) -> None:
    """Ours takes 1 ms, torch 2, the copy 4: so set by the turn of the call."""
    names = ["ours", "native", "copy"]
    rows = run(names, op, machine=machine(lambda start: (1.0, 2.0, 4.0)[start % 3]))
    assert list(rows) == names
    assert [rows[name].ms for name in names] == [1.0, 2.0, 4.0]
    assert [rows[name].copy_percent for name in names] == [400, 200, 100]
    assert rows["ours"].gb_s == pytest.approx(case(op).compulsory_bytes / 1e6)
    assert rows["ours"].backend.startswith("emulated, team")
    assert rows["native"].backend == "torch: Native"
    assert rows["ours"].error <= 1 and rows["native"].error <= 1
    assert {row.status for row in rows.values()} == {OK}
    assert rows["ours"].method == "events" and rows["ours"].peak_bytes == 123


def test_who_cannot_take_part_says_why() -> None:
    rows = run(["cudnn", "compile", "apex", "inplace_abn"])
    assert {row.status for row in rows.values()} == {UNSUPPORTED}
    assert rows["cudnn"].note == "torch: Native is what runs"
    assert rows["apex"].note == "apex is not installed"
    assert all(row.ms is None for row in rows.values())


@pytest.fixture
def wrong_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable], None]:
    """Puts a function in the place of a provider's."""

    def put(name: str, function: Callable) -> None:
        original = providers.make

        def make(wanted: str, device: str) -> Provider:
            provider = original(wanted, device)
            if wanted == name:
                monkeypatch.setattr(provider, "function", lambda case: function)
            return provider

        monkeypatch.setattr(measure, "make", make)

    return put


def off(x: Tensor, *args: object) -> Tensor:
    return torch.nn.functional.batch_norm(x, *args) * 1.01


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["ours", "native"])
def test_what_is_wrong_is_not_timed(wrong_by: Callable, op: str, name: str) -> None:
    wrong_by(name, off)
    rows = run(["ours", "native", "copy"], op)
    assert rows[name].status == INACCURATE
    assert rows[name].error > 1
    assert rows[name].ms is rows[name].gb_s is rows[name].copy_percent is None
    assert "not timed" in rows[name].note
    other = "native" if name == "ours" else "ours"
    assert rows[other].status == OK


def test_a_peer_may_be_allowed_more_but_never_ours(wrong_by: Callable) -> None:
    wrong_by("native", off)
    row = run(["native"], peer_tolerance=1e6)["native"]
    assert (row.status, row.note) == (OK, "beyond the tolerance")
    assert row.error > 1 and row.ms is not None
    wrong_by("ours", off)
    assert run(["ours"], peer_tolerance=1e6)["ours"].status == INACCURATE


@pytest.mark.parametrize("l2_bytes, copies", [(64, 1), (10**5, 16)])
def test_a_large_copy_needs_no_rotation(
    monkeypatch: pytest.MonkeyPatch, l2_bytes: int, copies: int
) -> None:
    made = []
    original = measure.make_copy
    monkeypatch.setattr(measure, "make_copy", lambda *args: made.append(1) or original(*args))
    assert run(["copy"], machine=machine(l2_bytes=l2_bytes))["copy"].ms == 1.0
    assert len(made) == copies


def test_an_error_is_a_row(wrong_by: Callable) -> None:
    def fail(*args: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate more")

    wrong_by("native", fail)
    rows = run(["ours", "native"])
    assert rows["native"].status == FAILED
    assert rows["native"].note == "OutOfMemoryError: CUDA out of memory."
    assert rows["ours"].status == OK


def test_what_does_not_fit_together_runs_one_by_one() -> None:
    small = machine(memory_bytes=16 * case().nbytes)
    rows = run(["ours", "native", "copy"], machine=small)
    assert sorted(rows) == ["copy", "native", "ours"]
    assert all(row.ms is not None for row in rows.values())
    rows = list(
        measure.rows(
            case(), ["ours", "native", "copy"], small, seconds=0.001, peer_tolerance=1,
            cache=measure.CheckCache(),
        )
    )  # fmt: skip
    assert len(rows) == 3  # the copy is timed with each, and has one row


def test_inplace_abn_has_inputs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not here, by its interface: it overwrites its input and returns it."""
    for name in ("inplace_abn", "inplace_abn.functions"):
        package = types.ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)

    def inplace_abn(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *rest):
        assert rest == (True, 0.1, 1e-5, "identity")
        return x.copy_(torch.nn.functional.batch_norm(x, mean, var, weight, bias, *rest[:3]))

    package.inplace_abn = inplace_abn
    called = machine(peak_bytes=lambda call: len(call()))
    rows = run(["inplace_abn", "native"], "forward", machine=called)
    assert [row.status for row in rows.values()] == [OK, OK]  # native's inputs are as they were
    assert run(["inplace_abn"], "both")["inplace_abn"].status == UNSUPPORTED


def test_apex_takes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its interface, too: a module on (N, H, W, C), whose parameters are ours."""

    class BatchNorm2d_NHWC(torch.nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            assert x.is_contiguous() and x.dtype == torch.float16
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)

    for name in ("apex", "apex.contrib", "apex.contrib.groupbn"):
        package = types.ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)
    package.BatchNorm2d_NHWC = BatchNorm2d_NHWC
    settings = {"seconds": 0.001, "peer_tolerance": 1.0, "cache": measure.CheckCache()}
    for layout, channels, status in (
        ("nhwc", 4, OK),
        ("nhwc", 3, UNSUPPORTED),
        ("nchw", 4, UNSUPPORTED),
    ):
        for op in OPS:
            problem = case(op, (2, channels, 5, 5), layout=layout)
            (row,) = measure.rows(problem, ["apex"], machine(), **settings)
            assert row.status == status, row.note


def test_a_provider_compiles_once_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = providers.Torch.function
    monkeypatch.setattr(
        providers.Torch, "function", lambda self, case: made.append(1) or original(self, case)
    )
    many_sets = machine(l2_bytes=10**5)
    assert run(["native"], machine=many_sets)["native"].status == OK
    assert len(made) == 1


def test_no_provider_changes_what_the_next_starts_from() -> None:
    """Running statistics are updated by every call, also by those before the timing."""
    found = run(["native", "ours"], machine=machine(peak_bytes=lambda call: len(call())))
    assert [row.status for row in found.values() if row.provider != "copy"] == [OK, OK]


@pytest.mark.parametrize("honest", [True, False])
def test_a_graph_is_used_if_it_computes_the_same(honest: bool) -> None:
    def capture(call: Callable) -> tuple[Callable, object]:
        results = {name: torch.zeros_like(value) for name, value in call().items()}

        def replay() -> None:
            for name, value in call().items():
                results[name].copy_(value if honest else value + 1)

        return replay, results

    row = run(["native"], machine=machine(capture=capture))["native"]
    assert row.method == ("graph" if honest else "events")

    def refuse(call: Callable) -> tuple[Callable, object]:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert run(["native"], machine=machine(capture=refuse))["native"].method == "events"


def test_the_tolerance_has_one_home() -> None:
    import tolerances

    assert check.tolerances.UNITS == tolerances.UNITS
    assert check.tolerances.__file__ == tolerances.__file__
