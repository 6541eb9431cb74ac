"""`explain`: its numbers against arithmetic done here by hand, on devices that are not here."""

from __future__ import annotations

import dataclasses
import math
import re
from types import ModuleType

import pytest
import torch
from cases import FEW_CASES, Case, channels_last, fill
from conftest import Backend
from strategies import launched

from batchnorm_cuda import devices, explain
from batchnorm_cuda._ops import operators as ops

NAMES = sorted(devices.DEVICES)
SHAPES = [(32, 64, 56, 56), (4, 3, 224, 224), (256, 512, 7, 7), (2, 32, 32, 32, 32), (4096, 1000)]
OPS = ["forward", "backward", "double_backward", "eval", "eval_backward", "eval_double_backward"]
every_device = pytest.mark.parametrize("device", NAMES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _compiled(extension: ModuleType) -> ModuleType:
    return extension


@every_device
@every_shape
@pytest.mark.parametrize("op", OPS)
def test_report_shows_what_the_plan_says(device: str, shape: tuple[int, ...], op: str) -> None:
    e = explain(shape, dtype=torch.float16, device=device, op=op)
    text = str(e)
    assert f"batch norm {op}, float16 {' x '.join(map(str, shape))}" in text
    assert devices.DEVICES[device]["name"] in text and f"{e.sm_count} SMs" in text
    assert e.reason in text and f"{e.bytes_over_compulsory:.2f} x compulsory" in text
    assert len(e.kernels) == e.launches == text.count("_kernel: grid ")
    for kernel in e.kernels:
        x, y = kernel.block
        assert f"{kernel.name}: grid {kernel.grid}, block {x} x {y}" in text
    if e.team is not None:
        assert f"({e.team.scope} scope)" in text and f"rounds: {e.team.rounds}" in text
        assert f"{e.team.on_chip_share:.1%}: {e.team.register_share:.1%} in registers" in text
    assert f"{e.cost.total:.0f} moves, by the planner's constants: launches " in text


def test_the_cost_is_told_by_cause() -> None:
    """Of a team that holds all, of one that streams, and of two passes; one kernel or three."""
    options = {"dtype": torch.float16, "device": "h100"}
    holds = explain((32, 64, 56, 56), strategy="team", **options).cost
    assert holds.rereads == 0 < min(holds.transfers, holds.code)
    streams = explain((32, 64, 256, 256), strategy="team", team_size=1, **options)
    assert streams.cost.rereads > 0 == streams.cost.waits and streams.team.on_chip_share < 1
    # 64 teams of one block on 132 SMs: half of them idle, and 1.32 times the share is what the
    # others can move (csrc/plan/plan_costs.h).
    moved = streams.cost.transfers + streams.cost.rereads
    assert streams.cost.idle == pytest.approx(moved * (132 / 64 / 1.32 - 1))
    passes = explain((32, 64, 56, 56), strategy="two_pass", **options).cost
    assert passes.launches == pytest.approx(3 * 18.7) and passes.code == 0
    assert passes.total == pytest.approx(sum(dataclasses.astuple(passes)))


@every_device
@every_shape
@pytest.mark.parametrize(
    "op, tensors", [("forward", 2), ("backward", 3), ("double_backward", 5), ("eval", 2)]
)
def test_bytes(device: str, shape: tuple[int, ...], op: str, tensors: int) -> None:
    e = explain(shape, dtype=torch.float32, device=device, op=op)
    assert e.compulsory_bytes == tensors * math.prod(shape) * 4
    assert e.compulsory_bytes <= e.predicted_bytes <= e.compulsory_bytes + e.reread_bytes
    if e.strategy == "two pass" and op != "eval":
        outputs = 2 if op == "double_backward" else 1
        assert e.reread_bytes == (tensors - outputs) * math.prod(shape) * 4


def test_a_cluster_by_hand() -> None:
    """Eight blocks of 256 threads share 32 runs of 3136 halves: 392 windows a run, 12544 in all.

    A part is 1568 windows, 6.125 for each thread: 7 loads in flight before the first use.
    """
    options = {"strategy": "team", "scope": "cluster", "team_size": 8}
    e = explain((32, 64, 56, 56), dtype=torch.float16, device="h100", **options)
    assert e.team is not None
    assert (e.team.scope, e.team.size, e.team.groups) == ("cluster", 8, 64)
    assert (e.team.register_share, e.team.shared_share) == (1.0, 0.0)
    (kernel,) = e.kernels
    # Two clusters in each GPC of 16 or 18 SMs, and as many again of second blocks.
    assert e.team.teams == 32 and kernel.grid == 256 and e.team.rounds == 2
    # 64 channels by 8 blocks are 512 tasks: two waves, each of which leaves 8 of 264 places idle.
    assert kernel.waves == 2
    assert kernel.tail_idle == pytest.approx(8 / 264)
    assert kernel.in_flight_bytes == 2 * 256 * 7 * 16
    # 1000 cycles at 1980 MHz are 505 ns, in which 3350 GB/s are 1.69 MB: 12.8 KB for each of 132.
    assert e.latency_bytes == pytest.approx(12_818, abs=1)


def test_shares_of_registers_and_shared_memory() -> None:
    """A block for a channel of 25088 windows of floats, 98 a thread: more than it can hold."""
    options = {"strategy": "team", "team_size": 1}
    e = explain((32, 256, 56, 56), dtype=torch.float32, device="h100", **options)
    assert e.team is not None and e.team.scope == "block"
    in_shared = 98 - 16 - e.reread_bytes / (16 * 256 * 256)
    assert e.reread_bytes > 0 and in_shared >= 26  # 4 KB each of the 113 KB that a block has
    assert e.team.register_share == pytest.approx(16 / 98)
    assert e.team.shared_share == pytest.approx(in_shared / 98)
    assert e.team.on_chip_share < 1
    assert e.reread_bytes == pytest.approx((1 - e.team.on_chip_share) * e.compulsory_bytes / 2)
    # Blocks of one leave for the next: 256 blocks on 264 places are one wave, 8 places idle.
    (kernel,) = e.kernels
    assert (kernel.waves, kernel.grid) == (1, 256)
    assert kernel.tail_idle == pytest.approx(8 / 264)


@pytest.mark.parametrize(
    ("shape", "in_warp"),
    [
        pytest.param((8, 512, 8, 8), True, id="64_windows_of_32_threads"),
        pytest.param((32, 512, 8, 8), False, id="256_windows_of_64_threads"),
        pytest.param((8, 512, 1, 1), False, id="along_c"),
    ],
)
def test_smallest_team_is_within_a_warp(shape: tuple[int, ...], in_warp: bool) -> None:
    e = explain(shape, dtype=torch.float16, device="h100", strategy="team", team_size=1)
    assert e.team is not None and e.team.in_warp is in_warp
    assert ("each channel within a warp" in str(e)) is in_warp


def test_before_asynchronous_copies_only_registers_are_in_flight() -> None:
    options = {"strategy": "team", "team_size": 1, "dtype": torch.float32}
    t4 = explain((32, 256, 56, 56), device="t4", **options)
    a100 = explain((32, 256, 56, 56), device="a100", **options)
    assert t4.team is not None and t4.team.shared_share > 0
    assert t4.kernels[0].in_flight_bytes == 2 * 256 * 16 * 16
    assert a100.kernels[0].in_flight_bytes > 2 * 256 * 16 * 16


def test_odd_sizes_are_copied_asynchronously_too() -> None:
    options = {"strategy": "team", "team_size": 1, "dtype": torch.float32}
    e = explain((32, 256, 57, 57), device="a100", **options)
    assert e.team is not None and e.team.shared_share > 0
    in_registers = explain((32, 256, 57, 57), device="t4", **options).kernels[0].in_flight_bytes
    assert e.kernels[0].in_flight_bytes > in_registers == 2 * 256 * 12 * 16


def test_elementwise_kernels_with_edges_have_fewer_blocks_on_an_sm() -> None:
    """Three on an SM by their launch bounds, or two: csrc/kernels/normalize.cuh."""
    even = explain((32, 64, 56, 56), dtype=torch.float16, device="a100", op="eval")
    odd = explain((32, 64, 57, 57), dtype=torch.float16, device="a100", op="eval")
    for e, blocks in ((even, 3), (odd, 2)):
        (kernel,) = e.kernels
        assert kernel.in_flight_bytes == blocks * math.prod(kernel.block) * 4 * 16


def test_two_passes_are_three_launches() -> None:
    e = explain((32, 64, 56, 56), device="a100", strategy="two_pass", op="backward")
    names = [kernel.name for kernel in e.kernels]
    assert names == ["backward_reduce_kernel", "merge_kernel", "backward_elementwise_kernel"]
    assert e.team is None and e.reason == "two passes are forced"
    tensor = 32 * 64 * 56 * 56 * 4
    assert e.reread_bytes == 2 * tensor
    # The 40 MiB of L2 cache find a third of that in each of dy and x, beside grad_input.
    assert e.predicted_bytes == pytest.approx(5 * tensor - 2 * (40 << 20) / 3, rel=1e-6)
    assert e.workspace_bytes > 0


@pytest.mark.parametrize("mode", ["", "eval_"])
def test_the_double_backward_by_hand(mode: str) -> None:
    """Three inputs, two outputs; a thread loads a triple of windows along C, two along S."""
    shape, tensor = (64, 256, 56, 56), 64 * 256 * 56 * 56 * 2
    e = explain(shape, dtype=torch.float16, device="a100", op=f"{mode}double_backward")
    assert [kernel.name for kernel in e.kernels] == [
        "double_backward_reduce_kernel",
        "merge_kernel",
        "double_backward_elementwise_kernel",
    ]
    assert (e.strategy, e.launches) == ("two pass", 3) and "double backward" in e.reason
    assert e.compulsory_bytes == 5 * tensor
    rereads = 2 if mode else 3  # statistics that are constants: x is not read for the sums
    assert e.predicted_bytes == (5 + rereads) * tensor and e.reread_bytes == rereads * tensor
    last = explain(
        shape,
        dtype=torch.float16,
        device="a100",
        op=f"{mode}double_backward",
        memory_format=torch.channels_last,
    )
    for kernels, windows in ((e.kernels, 6), (last.kernels, 3)):
        for kernel in (kernels[0], kernels[2]):
            threads = math.prod(kernel.block)
            assert kernel.in_flight_bytes == 2 * threads * windows * 16, kernel.name


@pytest.mark.parametrize("training", [True, False])
def test_the_double_backward_that_runs(
    kernels: Backend, extension: ModuleType, training: bool
) -> None:
    """The kernels that are launched for all gradients, by name."""
    x, dy, ddx = torch.randn(3, 4, 6, 5, 3).to(kernels.device).unbind()
    w, b, mean, var = (torch.rand(4, 6) + 0.5).to(kernels.device).unbind()
    arguments = (ddx, w, b, dy, x, w, mean, var, training, True, True, True)
    names = launched(extension, lambda: ops.double_backward(*arguments))
    e = explain(x, op="double_backward" if training else "eval_double_backward")
    assert len(names) == len(e.kernels)
    for kernel, name in zip(e.kernels, names, strict=True):
        assert re.search(rf"\b{kernel.name}\b", name), name


def test_layouts() -> None:
    shape = (8, 64, 16, 16)
    contiguous = explain(shape, device="a100")
    last = explain(shape, device="a100", memory_format=torch.channels_last)
    assert (contiguous.pattern, last.pattern) == ("along S", "along C")
    assert explain((8, 64), device="a100").pattern == "along C"
    meta = torch.empty(shape, dtype=torch.float32, device="meta")
    assert explain(meta, device="a100") == contiguous
    assert explain(meta.contiguous(memory_format=torch.channels_last), device="a100") == last


def test_empty_shapes_launch_nothing() -> None:
    e = explain((0, 3, 4), device="t4")
    assert (e.launches, e.kernels, e.predicted_bytes, e.reread_bytes) == (0, (), 0, 0)
    assert "there is nothing to do" in str(e)


def test_as_dict_holds_everything() -> None:
    e = explain((32, 64, 56, 56), device="h100")
    d = e.as_dict()
    assert {field.name for field in dataclasses.fields(e)} < set(d)
    assert d["kernels"][0]["grid"] == e.kernels[0].grid
    assert d["team"]["on_chip_share"] == e.team.on_chip_share
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.op = "eval"


@pytest.mark.parametrize(
    "case",
    [*FEW_CASES, Case((2, 1, 9, 11), "one channel"), Case((2, 16, 4, 4), "both", channels_last)],
    ids=lambda case: case.id,
)
@pytest.mark.parametrize("op", ["forward", "eval"])
def test_a_tensor_is_explained_on_its_own_device(
    kernels: Backend, extension: ModuleType, case: Case, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As csrc/torch/tensors.cpp does it: [N, C, S] from the strides, the shift from the address."""
    x = fill(case, torch.float32, kernels.device)
    seen = []
    plan = extension.make_plan

    def spy(*args: object) -> dict:
        seen.append((args, plan(*args)))
        return seen[-1][1]

    monkeypatch.setattr(extension, "make_plan", spy)
    e = explain(x, op=op)
    (arguments, shown), *_ = seen
    assert e.device == extension.device_info()["name"]
    assert e.launches == shown["launches"] and e.predicted_bytes == shown["predicted_bytes"]
    _, n, c, s, dtype, _, options = arguments
    along_s = case.layout is not channels_last and len(case.shape) > 2
    assert (n * s, c, dtype) == (x.numel() // case.channels, case.channels, "float32")
    assert (s > 1) == (along_s or c == 1)
    assert options["input_shift"] == x.data_ptr() % 16 // 4


def test_a_copy_of_gaps_is_aligned(kernels: Backend) -> None:
    storage = torch.zeros(2, 8, 8, 9, device=kernels.device)
    assert explain(storage[..., 1:]) == explain(torch.zeros(2, 8, 8, 8, device=kernels.device))


@pytest.mark.parametrize(
    "device, message",
    [
        ("gtx1080", "one of a100, b200, h100, l40s, rtx4090, rtx5090, t4 or a dict .* 'gtx1080'"),
        ({"sms": 3}, "expected the properties of device to be among name, .* got 'sms'"),
    ],
)
def test_unknown_devices(device: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain((2, 3, 4), device=device)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (
            ((2, 3),),
            {"op": "train"},
            ValueError,
            "forward, backward, eval, .*backward, got 'train'",
        ),
        (((2,),), {}, ValueError, r"2 or more dimensions \(N, C, ...\), got \(2,\)"),
        (((2, -3),), {}, ValueError, "expected sizes >= 0"),
        (("x",), {}, TypeError, "expected input_or_shape to be a tensor or a sequence of sizes"),
        (((2, 3),), {"dtype": torch.int8}, TypeError, "expected dtype to be one of .* got torch.i"),
        (((2, 3),), {"strategy": "one_pass"}, ValueError, "expected strategy to be"),
        ((torch.zeros(2, 3),), {"dtype": torch.half}, ValueError, "dtype to be None for a tensor"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        explain(*arguments, device="h100", **options)


def test_no_kernels_to_explain(aten: Backend) -> None:
    for value in (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")):
        with pytest.raises(ValueError, match=r"expected device to be one of a100.*got None"):
            explain(value)


def test_described_devices_add_up() -> None:
    """What the programming guide's table says of each capability, written down a second time."""
    for entry in devices.DEVICES.values():
        capability = (entry["compute_major"], entry["compute_minor"])
        kib = {7: 64, 8: 100, 9: 228, 10: 228, 12: 100}[capability[0]]
        kib = 164 if capability == (8, 0) else kib
        reserved = 0 if capability < (8, 0) else 1
        assert entry["shared_bytes_per_sm"] == kib * 1024
        assert entry["shared_bytes_per_block_optin"] == (kib - reserved) * 1024
        assert (entry["max_cluster"] > 0) == (capability >= (9, 0))
        assert entry["max_threads_per_sm"] == {64: 1024, 100: 1536, 164: 2048, 228: 2048}[kib]


def test_descriptions_are_completed_but_bandwidth_is_not_guessed() -> None:
    half = devices.describe({"sm_count": 66})
    assert half["sm_count"] == 66 and half["shared_bytes_per_sm"] == 228 * 1024
    assert devices.bytes_to_cover_latency(half) is None
    e = explain((32, 64, 56, 56), device={"sm_count": 66})
    assert e.sm_count == 66 and e.latency_bytes is None and "a model" not in str(e)
    assert set(devices.planner_properties(devices.DEVICES["t4"])) == set(half)
