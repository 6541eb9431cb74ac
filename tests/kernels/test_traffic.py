"""Counted memory traffic against the fewest bytes possible and the plan's prediction.

Runs on the host model of CUDA whether there is a GPU or not. Devices are cut to a few SMs with an
L2 cache in proportion, so that small tensors fill them. The strategy is forced, and where it
matters the walk: by cost the planner may take any, and all have to move what is said.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from batchnorm_cuda import devices
from batchnorm_cuda._build.extension import load_emulated
from batchnorm_cuda._explain.explain import explain_forced
from bench import traffic
from bench.models import traffic_model
from bench.models.traffic_model import Case, Traffic, count, scaled_device

ROOT = Path(__file__).resolve().parents[2]
SECTOR = 32
# What a count may exceed the plan by: sectors that two teams read at different times.
MARGIN = 1.02
# Of two passes, and of teams that stream about as much as the L2 cache holds: its sets of 16 ways
# lose some too early.
REREAD_MARGIN = 1.06

A100, H100, T4 = ("a100", 4), ("h100", 4), ("t4", 3)
# Each a few hundred thousand elements: a layer whose batch is cut like the device.
CASES = [
    (A100, Case((8, 32, 56, 56))),
    (A100, Case((8, 64, 28, 28), dtype="fp32")),
    (A100, Case((16, 32, 14, 14), dtype="bf16")),
    (A100, Case((64, 64, 7, 7))),
    (A100, Case((4, 64, 28, 28), "nhwc")),
    (A100, Case((16, 256, 7, 7), "nhwc", "fp32")),
    (A100, Case((1, 32, 16, 16, 16))),
    (A100, Case((2048, 128))),
    (A100, Case((9, 3, 37, 41))),
    (A100, Case((1000, 257), dtype="fp32")),
    (H100, Case((4, 64, 28, 28))),
    (H100, Case((32, 96, 7, 7), dtype="fp64")),
    (H100, Case((4, 96, 28, 28), "nhwc", "fp32")),
    (T4, Case((8, 32, 28, 28))),
    (T4, Case((2, 32, 8, 16, 16), "nhwc", "fp32")),
    (T4, Case((5, 24, 15, 15), shift=1)),
]


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> ModuleType:
    return load_emulated()


def describe(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    if isinstance(value, Case):
        return f"{'x'.join(map(str, value.shape))}-{value.layout}-{value.dtype}"
    return str(value)


def parameter_bound(case: Case) -> int:
    """All per-channel vectors in whole sectors: read, written and completed in every round."""
    wide = 8 if case.dtype == "fp64" else 4
    vector = math.ceil(case.shape[1] * wide / SECTOR) * SECTOR
    return 6 * 3 * vector


every_case = pytest.mark.parametrize("device, case", CASES, ids=describe)
OPS = ["forward", "backward", "eval_backward", "eval"]  # the last has no team
every_op = pytest.mark.parametrize("op", OPS)


# What a case runs as; a team that it cannot have becomes two passes.
WAYS = {"two_pass": {"strategy": "two_pass"}}
WAYS |= {"team": {"strategy": "team"}}
every_way = pytest.mark.parametrize("op, way", [(op, way) for op in OPS for way in WAYS][:-1])


def margin_of(result: Traffic, op: str, device: tuple[str, int]) -> float:
    if op == "eval":
        return MARGIN
    share = result.compulsory_bytes / scaled_device(*device)["l2_bytes"]
    rereads = "part of each channel group" in result.reason and 0.7 <= share <= 1.4
    return REREAD_MARGIN if rereads or result.strategy == "two_pass" else MARGIN


def test_every_way_is_taken() -> None:
    for op, way in itertools.product(OPS[:-1], list(WAYS)[1:]):
        e = explain_forced(CASES[0][1].tensor(), WAYS[way], device=scaled_device(*A100), op=op)
        assert e.team is not None


@every_case
@every_way
def test_bytes_are_what_the_plan_says(
    device: tuple[str, int], case: Case, op: str, way: str
) -> None:
    case = replace(case, op=op)
    result = count(case, scaled_device(*device), **WAYS[way])
    assert result.compulsory_bytes == case.nbytes * (3 if op.endswith("backward") else 2)
    # Never below: the cache is cold. Above the prediction never; below it where L2 holds a part.
    assert result.counted_bytes >= result.compulsory_bytes
    margin = margin_of(result, op, device)
    assert result.counted_bytes <= margin * result.predicted_bytes
    assert result.dram_bytes("parameter") <= parameter_bound(case)
    for buffer in result.buffers:  # each round of a team, or each launch, at most once
        if buffer.kind == "workspace":
            assert buffer.dram_bytes <= 4 * (buffer.bytes + SECTOR)
    parts = sum(result.dram_bytes(kind) for kind in ("activation", "parameter", "workspace"))
    assert result.total_bytes == parts
    assert all(kernel.partition("<")[0].endswith("_kernel") for kernel in result.launches)


ROWS = Case((16, 64, 7, 7))


@pytest.mark.parametrize(
    "device, case",
    [
        (A100, Case((4, 32, 32, 32))),
        (A100, ROWS),
        (A100, Case((1, 64, 16, 16), "nhwc")),
        (H100, Case((4, 64, 28, 28), dtype="fp32")),
        (T4, Case((4, 32, 28, 28))),
    ],
    ids=describe,
)
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_a_team_reads_once(device: tuple[str, int], case: Case, op: str) -> None:
    """One launch, and everything once, where a block has room for a channel group.

    The L2 cache holds next to nothing, so that it cannot hide a second read; nor can it keep the
    sectors that runs of 7 x 7 share, so that these go along a row, which reads each sector once.
    """
    properties = scaled_device(*device) | {"l2_bytes": 128 * 1024}
    pattern = "along_row" if case is ROWS else "auto"
    options = {"strategy": "team", "pattern": pattern}
    result = count(replace(case, op=op), properties, **options)
    assert (result.strategy, len(result.launches)) == ("team", 1)
    assert result.predicted_bytes == result.compulsory_bytes
    assert result.counted_bytes <= MARGIN * result.compulsory_bytes


# Teams that hold a part, in one round and in several, slabs of whole lines and of half ones; of
# twice the batch in the forward pass, which holds one tensor instead of two.
STREAMING = [
    (("a100", 8), Case((8, 64, 56, 56), "nhwc")),
    (("t4", 2), Case((8, 64, 28, 28), "nhwc")),
    (("t4", 2), Case((32, 4, 64, 64))),
    (("h100", 1), Case((24, 2, 64, 64), dtype="fp32")),
]


@pytest.mark.parametrize("device, case", STREAMING, ids=describe)
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_what_streams_is_predicted(device: tuple[str, int], case: Case, op: str) -> None:
    """Within 2 % on both sides: what is read twice, less what is still in the L2 cache."""
    n, *sizes = case.shape
    shape = (2 * n, *sizes) if op == "forward" else case.shape
    result = count(replace(case, shape=shape, op=op), scaled_device(*device), "team")
    assert result.strategy == "team" and result.predicted_bytes > 1.02 * result.compulsory_bytes
    assert result.counted_bytes == pytest.approx(result.predicted_bytes, rel=0.02)


TWO_PASS_CASES = [
    Case((8, 32, 56, 56)),
    Case((8, 64, 28, 28), "nhwc", "fp32"),
    Case((64, 64, 14, 14), dtype="fp32"),
]


@pytest.mark.parametrize("case", TWO_PASS_CASES, ids=describe)
@pytest.mark.parametrize("op, tensors", [("forward", 3), ("backward", 5)])
@pytest.mark.parametrize("l2_share", [0, 0.1, 0.4, 0.6, 1, 4])
def test_two_passes_find_what_l2_holds(case: Case, op: str, tensors: int, l2_share: float) -> None:
    """3T and 5T, less what the second reads, which run backwards, find in the L2 cache.

    Least recently used lines leave in the model's cache as in the prediction, but from sets of 16
    ways: near the size at which everything fits some leave too early.
    """
    size = max(int(l2_share * case.nbytes), 64 * 1024)
    result = count(replace(case, op=op), scaled_device("t4", 1) | {"l2_bytes": size}, "two_pass")
    assert result.strategy == "two_pass"
    found = (tensors - 2 if op == "forward" else 2) * min(case.nbytes, size / (tensors + 1) * 2)
    assert result.predicted_bytes == pytest.approx(tensors * case.nbytes - found, rel=1e-4)
    margin = 0.05 if 0.4 < l2_share < 4 else 0.02
    assert result.counted_bytes == pytest.approx(result.predicted_bytes, rel=margin)


@every_way
@pytest.mark.parametrize(
    "device, case",
    [
        (A100, Case((8, 32, 56, 56))),
        (A100, Case((8, 32, 28, 28), dtype="fp32")),
        (A100, Case((4, 64, 28, 28), "nhwc")),
        (T4, Case((1024, 128), dtype="fp32")),
        (H100, Case((2, 32, 8, 16, 16), dtype="fp64")),
    ],
    ids=describe,
)
def test_sectors_of_whole_windows(device: tuple[str, int], case: Case, op: str, way: str) -> None:
    result = count(replace(case, op=op), scaled_device(*device), **WAYS[way])
    assert result.sector_efficiency >= 0.98


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize(
    "case, pattern",
    [
        (Case((16, 64, 14, 14), dtype="fp32"), "along_row"),
        (Case((64, 64, 3, 4), dtype="fp32"), "along_row"),
        (Case((64, 32, 4, 6)), "along_row"),
        (Case((64, 64, 3, 3)), "along_row"),
        (Case((8, 144, 14, 14), "nhwc"), "along_c"),
    ],
    ids=describe,
)
def test_sectors_of_rows(case: Case, pattern: str, op: str) -> None:
    """Runs or rows of whole windows but no whole sectors, or of neither, together are both.

    A walk along S shares sectors between blocks, which the planner may prefer nevertheless.
    """
    result = count(replace(case, op=op), scaled_device(*A100), "team", pattern=pattern)
    assert result.strategy == "team" and result.sector_efficiency >= 0.98


@pytest.mark.parametrize("op", ["forward", "backward", "eval"])
@pytest.mark.parametrize(
    "case, pattern",
    [
        (Case((64, 64, 7, 7)), "along_row"),
        (Case((32, 16, 7, 7), dtype="fp32"), "along_row"),
        (Case((8, 32, 31, 31)), "along_s"),
        (Case((8, 3, 37, 41)), "along_s"),
        (Case((32, 32, 17, 17)), "along_row"),
        (Case((2, 16, 55, 55)), "along_s"),
        (Case((64, 3, 7, 7)), "along_row"),
        (Case((64, 10, 7, 7)), "along_row"),
        (Case((32, 5, 7, 7), dtype="fp32"), "along_row"),
        (Case((8, 1000, 4, 4), "nhwc"), "along_row"),
        (Case((64, 36, 7, 7)), "along_row"),
        (Case((33, 3, 7, 7), dtype="fp32"), "along_row"),
        (Case((16, 101, 5, 5)), "along_row"),
    ],
    ids=describe,
)
def test_sectors_of_odd_runs(case: Case, pattern: str, op: str) -> None:
    """Of the walk that touches fewest; evaluation has the one of its only kernel."""
    forced = {} if op == "eval" else {"strategy": "team", "pattern": pattern}
    result = count(replace(case, op=op), scaled_device(*A100), **forced)
    assert (result.strategy == "team") == (op != "eval") and result.sector_efficiency >= 0.90


@pytest.mark.parametrize("strategy", ["team", "two_pass"])
def test_counts_do_not_depend_on_the_order_of_threads(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(seed: int) -> Traffic:
        monkeypatch.setenv("BATCHNORM_CUDA_EMULATE_SEED", str(seed))
        return count(Case((4, 24, 14, 14), "nhwc"), scaled_device("a100", 2), strategy)

    assert run(1) == run(2)


@pytest.mark.parametrize("name", sorted(devices.DEVICES))
def test_the_planned_device_is_the_modelled_one(name: str) -> None:
    """Prediction and launches are for one device: its description, and what the model answers."""
    model = load_emulated()
    before = model.device_info()
    device = scaled_device(name, 8)
    seen = []
    counting = model._host_model.stop_traffic

    def observe() -> dict:
        seen.append(model.device_info())
        return counting()

    model._host_model.stop_traffic = observe
    try:
        count(Case((4, 3, 5), op="eval"), device)
    finally:
        model._host_model.stop_traffic = counting
    assert seen == [devices.planner_properties(device)]
    assert model.device_info() == before


def test_a_failure_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no launch")

    model = load_emulated()
    before = model.device_info()
    monkeypatch.setattr(traffic_model, "operation", lambda *_: fail)
    with pytest.raises(RuntimeError, match="no launch"):
        count(Case((4, 3)), scaled_device("t4", 2), "two_pass")
    assert model.device_info() == before
    with pytest.raises(RuntimeError, match="stop_traffic without start_traffic"):
        model._host_model.stop_traffic()


def test_a_scaled_device() -> None:
    full, cut = scaled_device("a100"), scaled_device("a100", 27)
    assert full == devices.DEVICES["a100"] == scaled_device("a100", 108)
    assert cut["sm_count"] == 27 and cut["l2_bytes"] == full["l2_bytes"] // 4
    assert cut["name"] == "A100-SXM4-40GB cut to 27 of 108 SMs"
    changed = {"name", "sm_count", "l2_bytes", "bandwidth_gb_s"}
    assert {key for key in full if full[key] != cut[key]} == changed


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 7), (3, 5, 7, 2), (3, 5, 7, 2, 4)], ids=str)
@pytest.mark.parametrize("dtype", traffic_model.DTYPES)
def test_a_case_as_a_tensor(shape: tuple[int, ...], dtype: str) -> None:
    for layout, innermost in (("nchw", -1), ("nhwc", 1)):
        x = Case(shape, layout, dtype, shift=1).tensor()
        assert x.shape == shape and x.stride(innermost) == 1
        assert x.dtype == traffic_model.DTYPES[dtype] and not x.any()
        assert x.data_ptr() % 16 == x.element_size()
        assert x.untyped_storage().nbytes() >= x.nbytes + x.element_size()


def test_every_buffer_has_a_kind() -> None:
    headers = "".join(path.read_text() for path in (ROOT / "csrc").glob("*params.h"))
    declared = set(re.findall(r'\bf\("(\w+)"', headers))
    known = set().union(*traffic_model._KINDS.values())
    assert declared and declared == known
    with pytest.raises(KeyError, match="does not know the buffer 'scratch'"):
        traffic_model._kind("scratch")


# ------------------------------------------------------------------------------- command line

FIELDS = {
    "compulsory_bytes": int,
    "predicted_bytes": int,
    "counted_bytes": int,
    "two_pass_bytes": int,
    "parameter_bytes": int,
    "workspace_bytes": int,
    "sector_efficiency": float,
    "launches": int,
    "strategy": str,
    "device": str,
    "sm_count": int,
    "l2_bytes": int,
    "shape": list,
    "layout": str,
    "dtype": str,
    "op": str,
    "buffers": list,
    "sites": list,
}
SMALL = ["--shape", "4,16,14,14", "--device", "h100", "--sms", "2"]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--layout", "nhwc", "--dtype", "fp32", "--op", "backward", "--json"]
    assert traffic.main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert {key: type(value) for key, value in record.items()} == FIELDS
    assert record["shape"] == [4, 16, 14, 14] and record["sm_count"] == 2
    assert record["compulsory_bytes"] == 3 * 4 * 16 * 14 * 14 * 4
    assert record["strategy"] in ("team", "two_pass") and record["launches"] in (1, 3)
    moved = sum(b["dram_read"] + b["dram_written"] for b in record["buffers"])
    kinds = ("counted_bytes", "parameter_bytes", "workspace_bytes")
    assert moved == sum(record[kind] for kind in kinds)
    assert {b["name"] for b in record["buffers"]} >= {"grad_output", "input", "grad_input"}
    assert all(0 < site["efficiency"] <= 1 for site in record["sites"])


def test_two_passes_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    records = []
    for strategy in ("team", "two_pass"):
        traffic.main([*SMALL, "--strategy", strategy, "--json"])
        records.append(json.loads(capsys.readouterr().out))
    team, two_pass = records
    assert (team["strategy"], two_pass["strategy"]) == ("team", "two_pass")
    assert team["two_pass_bytes"] == two_pass["two_pass_bytes"] == two_pass["counted_bytes"]


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert traffic.main([*SMALL, "--layout", "nhwc", "--strategy", "two_pass", "--shift", "3"]) == 0
    text = capsys.readouterr().out
    compulsory = 2 * 4 * 16 * 14 * 14 * 2
    assert "batch norm forward, fp16 4 x 16 x 14 x 14, nhwc, 3 elements past a 16-byte" in text
    assert "H100 SXM5 cut to 2 of 132 SMs" in text
    assert "nothing here is measured on a GPU" in text
    assert "two_pass: two passes are forced" in text
    assert re.search(rf"compulsory +{compulsory:,} +1\.000 x", text)
    assert re.search(rf"predicted +{compulsory:,} +1\.000 x", text)  # the L2 cache holds it all
    for name in ("input", "output", "partials", "running_mean"):
        assert re.search(rf"^  {name} +(activation|workspace|parameter) ", text, re.MULTILINE)
    # The misaligned input is read element by element.
    assert re.search(r"0\.\d+ .* read  input at normalize\.cuh:\d+, transform_input_kernel", text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: --shape"),
        (["--shape", "8"], "two or more sizes >= 1, such as 32,64,56,56, got '8'"),
        (["--shape", "8,0"], "got '8,0'"),
        (["--shape", "8,x"], "got '8,x'"),
        (["--shape", "8,4", "--layout", "chwn"], "argument --layout: invalid choice: 'chwn'"),
        (["--shape", "8,4", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--shape", "8,4", "--op", "infer"], "argument --op: invalid choice: 'infer'"),
        (["--shape", "8,4", "--device", "v100"], "argument --device: invalid choice: 'v100'"),
        (["--shape", "8,4", "--sms", "0"], "argument --sms: expected 1 to 108 for a100, got 0"),
        (["--shape", "8,4", "--sms", "41", "--device", "t4"], "expected 1 to 40 for t4, got 41"),
        (["--shape", "8,4", "--shift", "8"], "argument --shift: expected 0 to 7 for fp16, got 8"),
        (["--shape", "1,4"], "more than one value per channel to train, got (1, 4)"),
        (["--shape", "1024,1024,56,56"], "got one of about"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        traffic.main(arguments)
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_large_tensors_are_announced_and_forced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = count(Case((4, 8)), scaled_device("t4", 1))
    monkeypatch.setattr(traffic, "count", lambda *_: counted)
    assert traffic.main(["--shape", "1024,1024,56,56", "--force", "--json"]) == 0
    captured = capsys.readouterr()
    assert "counting takes about" in captured.err
    assert json.loads(captured.out)["shape"] == [1024, 1024, 56, 56]


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "bench.traffic", "--shape", "4,8", "--sms", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["compulsory_bytes"] == 2 * 4 * 8 * torch.float16.itemsize
