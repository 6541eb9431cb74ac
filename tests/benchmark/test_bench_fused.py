"""`python -m bench --model PATH --fuse`: what stands behind batch norms, its bytes and times."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import case, machine
from torch import Tensor, nn

import batchnorm_cuda
from bench import environment, model, options, runner
from bench.__main__ import main
from bench.cases.behind import Behind, FusedCase
from bench.cases.collect import collect, collect_behind
from bench.cases.shapes import Shape
from bench.models import byte_model
from bench.pages import fused as page
from bench.rows import records
from bench.rows.fused import FusedRow
from bench.rows.results import FAILED, MEASURED, MODEL, OK
from bench.timing import fused

KINDS = (Behind(), Behind(True), Behind(False, "relu"), Behind(True, "relu"))
LEAKY, RELU6 = Behind(True, ("leaky_relu", 0.25)), Behind(False, "relu6")


class Net(nn.Module):
    """Each kind once, but for the ReLU, which is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.first, self.second, self.third = (nn.BatchNorm2d(4) for _ in range(3))
        self.branch, self.added, self.last = (nn.BatchNorm2d(4) for _ in range(3))
        self.relu, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.second(self.relu(self.first(self.conv(x)))))
        x = self.leaky(self.third(x) + self.branch(x))
        x = self.added(x) + x
        return nn.functional.silu(self.last(x))


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("user_models")
    module.Net = Net
    monkeypatch.setitem(sys.modules, "user_models", module)
    return "user_models.Net"


# ---------------------------------------------------------------------------------- the model


def test_what_stands_behind_is_collected(net: str) -> None:
    """The branch is what another one adds: nothing is left behind it, nor behind what goes to a
    SiLU, which batch norm does not have.
    """
    shape = Shape("Net", (2, 4, 6, 6), layout="nchw")
    found = dict((behind, count) for (one, behind), count in pairs(net).items() if one == shape)
    assert found == {Behind(False, "relu"): 2, LEAKY: 1, Behind(True): 1, Behind(): 2}
    assert [str(behind) for behind in found] == ["relu", "add, leaky_relu(0.25)", "nothing", "add"]


def pairs(path: str) -> dict[tuple[Shape, Behind], int]:
    found = collect_behind(path, (2, 3, 6, 6))
    return {(Shape(s.name, s.sizes, layout=s.layout), b): s.count for s, b in found}


def test_of_resnet50() -> None:
    pytest.importorskip("torchvision")
    path, sizes = "torchvision.models.resnet50", (32, 3, 224, 224)
    found = collect_behind(path, sizes)
    counts: Counter[str] = Counter()
    shapes: Counter[tuple[int, ...]] = Counter()
    for shape, behind in found:
        counts[str(behind)] += shape.count
        shapes[shape.sizes] += shape.count
    assert counts == {"relu": 33, "add, relu": 16, "nothing": 4}
    assert shapes == {shape.sizes: shape.count for shape in collect(path, sizes)}


# ---------------------------------------------------------------------------------- its bytes


@pytest.mark.parametrize(
    "behind, compulsory, separate",
    [
        (Behind(), (2, 3), (0, 0)),
        (Behind(True), (3, 3), (3, 0)),
        (Behind(False, "relu"), (2, 3), (2, 3)),
        (Behind(True, "relu"), (3, 4), (5, 3)),
    ],
    ids=str,
)
def test_bytes_by_pass(
    behind: Behind, compulsory: tuple[int, int], separate: tuple[int, int]
) -> None:
    """In sizes of x: of one pass that does all, and of what torch's operators add."""
    kinds = behind.add, behind.activation is not None
    for op, at in (("forward", (0,)), ("backward", (1,)), ("both", (0, 1))):
        wanted = sum(compulsory[n] for n in at), sum(separate[n] for n in at)
        assert byte_model.compulsory_bytes(op, 10, *kinds) == 10 * wanted[0]
        assert byte_model.separate_bytes(op, 10, *kinds) == 10 * wanted[1]


@pytest.mark.parametrize("behind", [*KINDS, LEAKY, RELU6], ids=str)
def test_rows_of_the_models(behind: Behind) -> None:
    bench = case("both", (8, 64, 56, 56))
    found = FusedCase(bench, behind)
    rows = {row.provider: row for row in model.fused_rows(found, model.ModelSettings("h100"))}
    assert tuple(rows) == fused.PROVIDERS
    for row in rows.values():
        assert (row.kind, row.device, row.status) == (MODEL, "H100 SXM5", OK)
        assert row.behind == str(behind)
        assert row.ms is None and row.compulsory_bytes == found.compulsory_bytes
    kinds = behind.add, behind.activation is not None
    separate = byte_model.separate_bytes("both", bench.nbytes, *kinds)
    (plain,) = model.rows(bench, ["ours"], model.ModelSettings("h100", 0))
    (native,) = model.rows(bench, ["native"], model.ModelSettings("h100", 0))
    assert rows["ours"].model_bytes == plain.model_bytes + separate
    assert rows["torch"].model_bytes == native.model_bytes + separate
    moved = rows["ours:fused"].model_bytes
    # In its passes, what stands behind costs the residual, its gradient and the mask.
    extra = found.compulsory_bytes - bench.compulsory_bytes + kinds[1] * 2 * bench.nbytes // 16
    assert moved == pytest.approx(plain.model_bytes + extra, rel=0.001)
    assert moved < rows["ours"].model_bytes or not any(kinds)


# ---------------------------------------------------------------------------------- its times


@pytest.mark.parametrize("behind", [*KINDS, LEAKY, RELU6], ids=str)
def test_providers_agree_and_are_timed(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_CUDA_EMULATE", "1")
    bench = case("both", (2, 3, 5, 5), dtype="fp32")
    rows = list(fused.rows(FusedCase(bench, behind), machine(lambda start: 2.0), seconds=0.001))
    assert [(row.provider, row.status, row.ms) for row in rows] == [
        (name, OK, 2.0) for name in fused.PROVIDERS
    ]
    for row in rows:
        assert (row.kind, row.method, row.behind) == (MEASURED, "events", str(behind))
        assert row.gb_s == pytest.approx(row.compulsory_bytes / 2e-3 / 1e9)
    assert [row.backend for row in rows] == ["torch: Native", "emulated", "emulated"]


def test_one_call_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, the kernels get the residual and keep a mask; with separate operators, neither."""
    seen: list[dict[str, Any]] = []
    original = batchnorm_cuda.batch_norm

    def batch_norm(*arguments: Any, **fusion: Any) -> Tensor:
        seen.append(fusion)
        return original(*arguments, **fusion)

    monkeypatch.setattr(batchnorm_cuda, "batch_norm", batch_norm)
    found = FusedCase(case("both"), LEAKY)
    t, residual = fused.inputs(found, "cpu")
    separately = fused.make_call(found, fused.make_run("ours", LEAKY), t, residual)()
    assert seen == [{}]
    together = fused.make_call(found, fused.make_run("ours:fused", LEAKY), t, residual)()
    assert seen[1] == {"residual": seen[1]["residual"], "activation": ("leaky_relu", 0.25)}
    assert torch.equal(seen[1]["residual"], residual)
    assert set(together) == {"output", *(f"grad {n}" for n in range(4))}
    for name, got in together.items():
        torch.testing.assert_close(got, separately[name], rtol=2e-2, atol=2e-2)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(behind: Behind) -> fused.Run:
        return lambda t, residual: fused.separate(behind)(t, residual) + 0.1

    monkeypatch.setattr(fused, "fused", wrong)
    found = FusedCase(case("both"), Behind(False, "relu"))
    *others, row = fused.rows(found, machine(), seconds=0.001)
    assert (row.provider, row.status, row.ms) == ("ours:fused", FAILED, None)
    assert "an output is off by 0." in row.note
    assert {other.status for other in others} == {OK}


def test_without_memory_every_row_says_so() -> None:
    def full(fill: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = list(fused.rows(FusedCase(case("both"), Behind()), machine(clock=full), seconds=0.001))
    assert [row.provider for row in rows] == list(fused.PROVIDERS)
    assert {row.status for row in rows} == {FAILED}
    assert all("out of memory" in row.note for row in rows)


# ---------------------------------------------------------------------------------- its page


def row(provider: str, **values: Any) -> FusedRow:
    facts = case("both").facts(provider, "GPU 1") | {"behind": "relu", "compulsory_bytes": 10**6}
    timed = {"ms": 2.0, "ms_p20": 1.9, "ms_p80": 2.1, "samples": 9, "gb_s": 0.5}
    return FusedRow(**{**facts, **timed, **values})


def test_the_page_of_measured_rows() -> None:
    rows = [
        row(name, behind=behind, count=count, ms=ms * count)
        for behind, count in (("relu", 3), ("add, relu", 1))
        for name, ms in (("torch", 4.0), ("ours", 3.0), ("ours:fused", 1.0))
    ]
    table, sums = page.tables(rows)
    assert table.title == "tiny nchw fp16"
    ratio = table.columns.index("time / torch")
    assert [line[ratio] for line in table.rows] == ["1.00", "0.75", "0.25"] * 2
    assert sums.title == "Sum of a training step"
    name = "tiny nchw fp16"
    assert [line[:4] for line in sums.rows] == [
        (name, "torch", "4", "40.000"),
        (name, "ours", "4", "30.000"),
        (name, "ours:fused", "4", "10.000"),
    ]
    text = page.document({"device": "GPU 1"}, rows)
    assert "(model)" not in text and "Median" in text and "| add, relu |" in text


def test_a_sum_of_fewer_layers_is_none() -> None:
    failed = row("ours:fused", behind="add", ms=None, ms_p20=None, status=FAILED, note="no memory")
    *_, sums = page.tables([row("ours:fused"), failed])
    assert sums.rows == (("tiny nchw fp16", "ours:fused", "1 of 2", "", ""),)


# ---------------------------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(tmp_path: Path, *arguments: str) -> int:
    return main(["--fuse", *arguments, f"--out={tmp_path}"])


def test_without_a_gpu_it_is_a_models(
    tmp_path: Path, net: str, capsys: pytest.CaptureFixture
) -> None:
    two = ["--dtype=fp16", "--dtype=bf16", "--layout=nchw", "--layout=nhwc"]
    assert run(tmp_path, f"--model={net}", "--input=2,3,6,6", *two) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "# Batch norm and what stands behind it on a described H100 SXM5 (model)"
    )
    assert "## Sum of a training step (model)" in text
    assert (tmp_path / "model-fused.md").read_text() in text
    rows = records.read(tmp_path / "model-fused.csv", FusedRow)
    assert len(rows) == 4 * 4 * len(fused.PROVIDERS)
    assert {(row.kind, row.op, row.ms) for row in rows} == {(MODEL, "both", None)}
    assert sum(row.count for row in rows) == 4 * 6 * len(fused.PROVIDERS)
    content = json.loads((tmp_path / "model-fused.json").read_text())
    assert content["environment"]["complete"] and len(content["rows"]) == len(rows)


def test_on_a_gpu_it_is_measured(
    tmp_path: Path, net: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By a machine whose clock says 1 ms; and what is ours and fails, fails the run."""
    parse: Callable = options.parse

    def measuring(arguments: list[str]) -> object:
        parsed = parse(arguments)
        parsed.measure = True
        return parsed

    monkeypatch.setattr(options, "parse", measuring)
    monkeypatch.setattr(runner, "gpu", machine)
    monkeypatch.setattr(environment, "collect", lambda device: {"device": "GPU 1"})
    arguments = [f"--model={net}", "--input=2,3,6,6", "--seconds=0.001"]
    assert run(tmp_path, *arguments) == 0
    rows = records.read(tmp_path / "gpu-1-fused.csv", FusedRow)
    assert [(row.kind, row.ms) for row in rows] == [(MEASURED, 1.0)] * 4 * len(fused.PROVIDERS)
    assert "model" not in capsys.readouterr().out
    monkeypatch.setattr(fused, "problem", lambda *arguments: "all of it is wrong")
    assert run(tmp_path, *arguments) == 1
    assert "nothing: failed, all of it is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "argument --fuse: expected --model PATH with it, got none"),
        (["--model=a.b", "--op=both"], "argument --fuse: expected no --op with it, got ['both']"),
        (["--model=a.b", "--set=unet"], "argument --fuse: expected no --set with it, got ['unet']"),
        (["--model=a.b", "--shape=2,3"], "expected no --shape with it, got [(2, 3)]"),
        (["--model=a.b", "--provider=ours"], "expected no --provider with it, got ['ours']"),
    ],
)
def test_what_does_not_go_with_it(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
