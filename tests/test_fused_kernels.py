"""The fused kernels, called directly: y = relu(bn(x) + residual), its mask and its gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType

import harness
import pytest
import reference
import torch
from cases import (
    DTYPE_IDS,
    DTYPES,
    EMPTY_SHAPES,
    Case,
    channels_last,
    channels_last_odd_offset,
    contiguous,
    expanded,
    fill,
    fill_gradient,
    fill_parameters,
    odd_offset,
    permuted,
    spatial_slice,
)
from conftest import KERNELS
from harness import EPS, MOMENTUM
from strategies import FORCED, expected, launched
from test_strategies import LAYOUTS
from tolerances import assert_within
from torch import Tensor

from batchnorm_cuda import devices, explain
from bench.traffic_model import Case as TrafficCase
from bench.traffic_model import count, scaled_device

CASES = [
    Case((4, 10, 8, 8), "whole windows along S"),
    Case((2, 32, 49), "odd runs: two threads share a byte of the mask"),
    Case((1, 8, 11, 11), "one sample"),
    Case((1, 2, 131, 77), "a long odd run: several blocks a channel"),
    Case((2, 3, 56, 56), "channels shared by several blocks, whole windows"),
    Case((16, 3, 7, 7), "samples that are whole windows only together"),
    Case((19, 11, 7, 7), "samples of whole windows in no number that a block is wide"),
    Case((300, 1), "one channel: all samples are one run"),
    Case((40, 32), "along C, whole windows"),
    Case((33, 10), "along C, no multiple of a window, odd N"),
    Case((6, 3), "fewer channels than lanes of a window"),
    Case((2, 32, 7, 7), "channels last, whole windows", channels_last),
    Case((4, 10, 6, 6), "channels last, no multiple of a window", channels_last),
    Case((1, 257, 3, 5), "more channels than a block is wide", channels_last),
    Case((2, 3, 7, 7), "unaligned start", odd_offset),
    Case((3, 10, 8, 8), "whole windows, none on its boundary", odd_offset),
    Case((2, 32, 5, 5), "the same along C", channels_last_odd_offset),
    Case((3, 10, 4, 5), "dimensions in the reverse order", permuted),
    Case((2, 3, 6, 5), "elements apart in memory", spatial_slice),
]
FEW_CASES = [
    case
    for case in CASES
    if case.shape in {(4, 10, 8, 8), (2, 32, 49), (33, 10), (2, 32, 7, 7), (3, 10, 4, 5)}
]
NEEDS = ("grad_input", "grad_weight", "grad_bias", "grad_residual")

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def lanes_of(x: Tensor) -> int:
    return 16 // x.element_size()


def mask_bytes(x: Tensor) -> int:
    """A byte for each 16 bytes."""
    return -(-x.numel() // lanes_of(x))


def in_memory(dense: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of their addresses."""
    return dense.as_strided((dense.numel(),), (1,))


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """The bits of a mask, one for each element of `like` in memory order."""
    places = torch.arange(lanes_of(like), device=mask.device)
    bits = (mask.int().unsqueeze(1) >> places) & 1
    return bits.flatten()[: like.numel()].bool()


class Fused:
    """One problem: its tensors, and calls of the extension's functions on them."""

    def __init__(
        self,
        extension: ModuleType,
        case: Case,
        dtype: torch.dtype,
        *,
        training: bool = True,
        residual: bool = True,
        relu: bool = True,
        affine: bool = True,
        residual_layout: Callable[[Tensor], Tensor] | None = None,
        gradient_layout: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.extension, self.training, self.relu = extension, training, relu
        self.x = fill(case, dtype, KERNELS.device)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.p = fill_parameters(case.channels, exact, KERNELS.device, weight=affine, bias=affine)
        self.before = self.p.clone()
        other = Case(case.shape, case.reason, residual_layout or case.layout)
        self.residual = fill(other, dtype, KERNELS.device) if residual else None
        dy = fill_gradient(self.x, dtype)
        self.dy = gradient_layout(dy) if gradient_layout else dy

    def forward(self, *, need_mask: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        p = self.p
        return self.extension.fused_forward(
            *(self.x, p.weight, p.bias, p.running_mean, p.running_var, None),
            *(self.residual, self.relu, need_mask, self.training, MOMENTUM, EPS),
        )

    def backward(
        self, saved: tuple[Tensor, Tensor], mask: Tensor, needed: tuple[bool, ...] | None = None
    ) -> dict[str, Tensor]:
        affine = self.p.weight is not None
        needed = needed or (True, affine, affine, True)
        gradients = self.extension.fused_backward(
            *(self.dy, self.x, self.p.weight, self.p.bias, *saved, mask, self.training), *needed
        )
        return dict(zip(NEEDS, gradients, strict=True))

    def expected(self) -> reference.Forward:
        """As of batch norm, with what is fused to its output."""
        result = harness.reference_forward(self.x, self.before, self.training)
        if self.residual is not None:
            added = self.residual.detach().cpu().double()
            result.output = result.output + added
            result.scales["output"] = result.scales["output"] + added.abs()
        if self.relu:
            result.output = result.output.relu()
        return result

    def filtered(self, output: Tensor) -> Tensor:
        """The gradient that the ReLU lets through, in the memory order of the output."""
        return torch.empty_like(output).copy_(torch.where(output <= 0, 0.0, self.dy))

    def check(self) -> None:
        """A forward and a backward pass against the reference."""
        output, mean, invstd, mask = self.forward()
        results = {"output": output, "save_mean": mean, "save_invstd": invstd}
        if self.training:
            results |= {"running_mean": self.p.running_mean, "running_var": self.p.running_var}
        want = self.expected()
        for name, got in results.items():
            assert_within(name, got, getattr(want, name), want.scales[name], self.x.dtype)
        assert output.stride() == torch.empty_like(self.x).stride()
        if not self.relu:
            assert mask is None
            return
        assert mask.dtype == torch.uint8 and mask.shape == (mask_bytes(self.x),)
        assert torch.equal(unpacked(mask, output), in_memory(~(output <= 0)))
        g = self.filtered(output)
        gradients = self.backward((mean, invstd), mask)
        assert torch.equal(gradients.pop("grad_residual"), g)
        assert gradients["grad_input"].stride() == output.stride()
        wanted = {name: got for name, got in gradients.items() if got is not None}
        assert len(wanted) == (1 if self.p.weight is None else 3)
        harness.assert_matches(
            wanted, harness.reference_backward(g, self.x, self.before, self.training), self.x
        )


# ------------------------------------------------------------------------------- results


@every_case
@every_dtype
@both_modes
def test_against_the_reference(
    extension: ModuleType, case: Case, dtype: torch.dtype, training: bool
) -> None:
    Fused(extension, case, dtype, training=training).check()


@few_cases
@pytest.mark.parametrize("residual, relu", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@both_modes
def test_parts(
    extension: ModuleType, case: Case, residual: bool, relu: bool, affine: bool, training: bool
) -> None:
    options = {"residual": residual, "relu": relu, "affine": affine, "training": training}
    Fused(extension, case, torch.float16, **options).check()


@few_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [odd_offset, permuted, expanded, spatial_slice, contiguous])
@pytest.mark.parametrize("which", ["residual", "gradient"])
def test_other_layouts(
    extension: ModuleType, case: Case, dtype: torch.dtype, layout: Callable, which: str
) -> None:
    """Misaligned, in another memory order, or with elements that share memory."""
    Fused(extension, case, dtype, **{f"{which}_layout": layout}).check()


@few_cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@both_modes
def test_64_bit_indices(
    extension: ModuleType, plan_options: Callable, case: Case, dtype: torch.dtype, training: bool
) -> None:
    """Masked kernels stand in for exact ones, of which there are none."""
    plan_options({"index_bits": 64})
    names = launched(extension, Fused(extension, case, dtype, training=training).check)
    fused = [name for name in names if "Fused" in name]
    assert fused and all(", false>" in name for name in fused)


@pytest.mark.parametrize("strategy", FORCED)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
def test_strategies(
    extension: ModuleType, plan_options: Callable, layout: str, strategy: str, dtype: torch.dtype
) -> None:
    shape, place = LAYOUTS[layout]
    plan_options(FORCED[strategy])
    fused = Fused(extension, Case(shape, layout, place), dtype)
    names = launched(extension, fused.check)
    kinds = {"team" if "team_kernel" in name else "stage" for name in names}
    way = expected(strategy, extension)
    assert kinds == {"stage" if way == "two_pass" else "team"}
    assert all("Fused" in name for name in names if "merge" not in name and "statis" not in name)
    for op in ("forward", "backward"):
        plan = explain(fused.x, op=op, residual=True, activation="relu", **FORCED[strategy])
        assert (plan.team.scope if plan.team else "two_pass") == way


@pytest.fixture
def small(extension: ModuleType) -> Iterator[None]:
    """A device that holds little on chip."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has the properties that it has")
    model = extension._host_model
    model.set_device(extension.device_info() | {"sm_count": 1, "shared_bytes_per_sm": 49152})
    yield
    model.set_device({})


@pytest.mark.parametrize(
    "case",
    [
        Case((24, 2, 64, 64), "along S"),
        Case((23, 2, 63, 65), "along S, masked"),
        Case((4, 64, 36, 36), "along C", channels_last),
    ],
    ids=lambda case: case.reason,
)
@every_dtype
def test_what_streams(
    extension: ModuleType, plan_options: Callable, small: None, case: Case, dtype: torch.dtype
) -> None:
    """Windows that are not held: filtered in both reads, with their residual in the second."""
    options = {"strategy": "team", "team_size": 1}
    fused = Fused(extension, case, dtype)
    for op in ("forward", "backward"):
        plan = explain(fused.x, op=op, residual=True, activation="relu", **options)
        assert plan.team is not None and plan.team.depth == "stream"
        assert 0 < plan.team.shared_share < plan.team.on_chip_share < 1
    plan_options(options)
    fused.check()


@pytest.mark.parametrize("strategy", FORCED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_repeat(
    extension: ModuleType,
    plan_options: Callable,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    strategy: str,
) -> None:
    """Between two runs, whose orders of blocks and threads the emulation draws from the seed."""
    shape, place = LAYOUTS[layout]
    plan_options(FORCED[strategy])
    runs = []
    for seed in ("1", "20260"):
        monkeypatch.setenv("BATCHNORM_CUDA_EMULATE_SEED", seed)
        torch.manual_seed(5)
        fused = Fused(extension, Case(shape, layout, place), torch.bfloat16)
        output, mean, invstd, mask = fused.forward()
        gradients = fused.backward((mean, invstd), mask)
        runs.append([output, mean, invstd, unpacked(mask, output), *gradients.values()])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------- the ReLU's edges


@few_cases
@pytest.mark.parametrize("strategy", ["two_pass", "block"])
def test_nan_propagates(
    extension: ModuleType, plan_options: Callable, case: Case, strategy: str
) -> None:
    """As by torch.relu, in whose backward the gradient passes where the output is NaN."""
    plan_options(FORCED[strategy])
    fused = Fused(extension, case, torch.float16)
    with torch.no_grad():
        place = (0, 1) + (0,) * (fused.residual.dim() - 2)
        fused.residual[place] = float("nan")
    output, mean, invstd, mask = fused.forward()
    assert output.isnan().sum() == 1 and output[place].isnan()
    assert torch.equal(unpacked(mask, output), in_memory(~(output <= 0)))
    gradients = fused.backward((mean, invstd), mask)
    assert gradients["grad_residual"][place] == fused.dy[place]


@few_cases
@every_dtype
def test_a_filtered_gradient_is_zero(extension: ModuleType, case: Case, dtype: torch.dtype) -> None:
    """Also where it is no number: it is left out, not multiplied by zero."""
    fused = Fused(extension, case, dtype)
    output, mean, invstd, mask = fused.forward()
    kept = fused.backward((mean, invstd), mask)
    fused.dy = torch.where(output > 0, fused.dy, float("nan"))
    for name, got in fused.backward((mean, invstd), mask).items():
        assert torch.equal(got, kept[name]), name


@pytest.mark.parametrize(
    "dtype, tiny",
    [(torch.float16, 2.0**-25), (torch.bfloat16, 2.0**-134), (torch.float32, 2.0**-149)],
    ids=["half", "bfloat16", "float"],
)
@few_cases
def test_the_mask_is_of_the_rounded_output(
    extension: ModuleType, case: Case, dtype: torch.dtype, tiny: float
) -> None:
    """Values about half the smallest number: some are rounded to zero, some up to it."""
    fused = Fused(extension, case, dtype, residual=False)
    fused.p.weight.fill_(tiny)
    fused.p.bias.zero_()
    output, _, _, mask = fused.forward()
    positive = output > 0
    assert positive.any() and (output == 0)[fused.x > fused.x.mean()].any()
    assert torch.equal(unpacked(mask, output), in_memory(positive))


# ------------------------------------------------------------------------------- what is wanted


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=4)), ids=str)
@pytest.mark.parametrize("strategy", ["two_pass", "block"])
@both_modes
def test_only_what_is_needed(
    extension: ModuleType,
    plan_options: Callable,
    needed: tuple[bool, ...],
    strategy: str,
    training: bool,
) -> None:
    plan_options(FORCED[strategy])
    fused = Fused(extension, FEW_CASES[0], torch.float32, training=training)
    output, mean, invstd, mask = fused.forward()
    g = fused.filtered(output)
    want = harness.reference_backward(g, fused.x, fused.before, training)
    got = fused.backward((mean, invstd), mask, needed)
    assert [value is not None for value in got.values()] == list(needed)
    residual = got.pop("grad_residual")
    assert residual is None or torch.equal(residual, g)
    rest = {name: value for name, value in got.items() if value is not None}
    harness.assert_matches(rest, want, fused.x)


@both_modes
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("need_mask", [True, False])
def test_a_mask_only_where_it_is_needed(
    extension: ModuleType, training: bool, relu: bool, need_mask: bool
) -> None:
    fused = Fused(extension, FEW_CASES[0], torch.float16, training=training, relu=relu)
    output, _, _, mask = fused.forward(need_mask=need_mask)
    assert (mask is not None) == (relu and need_mask)
    want = fused.expected()
    assert_within("output", output, want.output, want.scales["output"], output.dtype)


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty(extension: ModuleType, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=KERNELS.device)
    w, b, mean, var = (torch.ones(3, device=KERNELS.device) for _ in range(4))
    output, save_mean, save_invstd, mask = extension.fused_forward(
        x, w, b, mean, var, None, x.clone(), True, True, True, MOMENTUM, EPS
    )
    assert output.shape == shape and mask.shape == (0,)
    gradients = extension.fused_backward(
        *(x, x, w, b, save_mean, save_invstd, mask, True), *(True,) * 4
    )
    assert gradients[0].shape == gradients[3].shape == shape
    assert not gradients[1].any() and not gradients[2].any()


# ------------------------------------------------------------------------------- several ranks


def parts_of(fused: Fused, sizes: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    tensors = (fused.x.split(sizes), fused.residual.split(sizes), fused.dy.split(sizes))
    return list(zip(*tensors, strict=True))


@few_cases
@every_dtype
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_ranks_are_as_one(
    extension: ModuleType, case: Case, dtype: torch.dtype, needed: tuple[bool, bool]
) -> None:
    """The batch in two uneven parts and an empty one, against the reference for all of it."""
    fused = Fused(extension, case, dtype)
    p, n = fused.p, case.shape[0]
    parts = parts_of(fused, [1, n - 1, 0])
    rows = torch.stack([extension.sync_statistics(x) for x, _, _ in parts])
    ranks = []
    for x, residual, _ in parts:
        running = p.running_mean.clone(), p.running_var.clone()
        ranks.append(
            extension.sync_fused_forward(
                *(x, p.weight, p.bias, *running, None, rows, residual, True, True, MOMENTUM, EPS)
            )
        )
    output = torch.cat([rank[0] for rank in ranks])
    want = fused.expected()
    assert_within("output", output, want.output, want.scales["output"], dtype)
    for (part, _, _, _, mask), (x, _, _) in zip(ranks, parts, strict=True):
        assert mask.shape == (mask_bytes(x),)
        assert torch.equal(unpacked(mask, part), in_memory(~(part <= 0)))
    _, mean, invstd, total, _ = ranks[0]
    gathered, grad_weight, grad_bias = [], 0.0, 0.0
    for (x, _, dy), rank in zip(parts, ranks, strict=True):
        sums, one, other = extension.sync_fused_backward_reduce(
            *(dy, x, p.weight, p.bias, mean, invstd, rank[4], True, True)
        )
        gathered.append(sums)
        grad_weight, grad_bias = grad_weight + one, grad_bias + other
    sums = extension.sync_sum(torch.stack(gathered))
    gradients = [
        extension.sync_fused_backward_elementwise(
            *(dy, x, p.weight, mean, invstd, sums, total, rank[4]), *needed
        )
        for (x, _, dy), rank in zip(parts, ranks, strict=True)
    ]
    g = torch.where(output <= 0, 0.0, fused.dy)
    results = {"grad_weight": grad_weight, "grad_bias": grad_bias}
    for place, name in enumerate(("grad_input", "grad_residual")):
        values = [of_rank[place] for of_rank in gradients]
        assert all((value is not None) == needed[place] for value in values)
        if needed[place]:
            results[name] = torch.cat(values)
    if "grad_residual" in results:
        assert torch.equal(results.pop("grad_residual"), g)
    harness.assert_matches(results, harness.reference_backward(g, fused.x, fused.before, True), g)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "residual, error, message",
    [
        (torch.zeros(2, 5, 3), ValueError, r"residual to have shape \[2, 5, 4\], got \[2, 5, 3\]"),
        (torch.zeros(5, 4), ValueError, r"residual to have shape \[2, 5, 4\], got \[5, 4\]"),
        (
            torch.zeros(2, 5, 4).half(),
            TypeError,
            "residual to have dtype torch.float32, .*16",
        ),
        (torch.zeros(2, 5, 4).to_sparse(), TypeError, "residual to be a strided tensor, got torch"),
        (torch.zeros(2, 5, 4, device="meta"), RuntimeError, "residual to be on .*, got meta"),
    ],
)
def test_a_wrong_residual(
    extension: ModuleType, residual: Tensor, error: type, message: str
) -> None:
    """Nothing is written before it is refused."""
    if residual.device.type != "meta":
        residual = residual.to(KERNELS.device)
    x = torch.randn(2, 5, 4, device=KERNELS.device)
    mean, counter = x.new_zeros(5), torch.zeros((), dtype=torch.int64, device=x.device)
    with pytest.raises(error, match="batch_norm: expected " + message):
        extension.fused_forward(
            *(x, None, None, mean, x.new_ones(5), counter, residual), *(True,) * 3, 0.1, EPS
        )
    assert not mean.any() and counter == 0


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.zeros(10).byte()[:9], ValueError, r"mask to have shape \[10\], got \[9\]"),
        (torch.zeros(16).byte(), ValueError, r"mask to have shape \[10\], got \[16\]"),
        (torch.zeros(2, 5).byte(), ValueError, r"mask to have shape \[10\], got \[2, 5\]"),
        (torch.zeros(10).bool(), TypeError, "mask to have dtype torch.uint8, got torch.bool"),
        (torch.zeros(10, device="meta").byte(), RuntimeError, "mask to be on .*, got meta"),
    ],
)
def test_a_wrong_mask(extension: ModuleType, mask: Tensor, error: type, message: str) -> None:
    if mask.device.type != "meta":
        mask = mask.to(KERNELS.device)
    x = torch.randn(2, 5, 4, device=KERNELS.device)  # 10 windows
    saved = x, None, None, x.new_zeros(5), x.new_ones(5)
    message = "batch_norm: expected " + message
    with pytest.raises(error, match=message):
        extension.fused_backward(x, *saved, mask, True, True, False, False, True)
    with pytest.raises(error, match=message):
        extension.sync_fused_backward_reduce(x, *saved, mask, False, False)
    with pytest.raises(error, match=message):
        extension.sync_fused_backward_elementwise(
            *(x, x, None, *saved[3:], x.new_zeros(2, 5), torch.ones(1).long().to(x.device), mask),
            *(True, True),
        )


# ------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("s", [64, 1])
def test_a_misaligned_residual_is_masked(extension: ModuleType, s: int) -> None:
    for shift, exact in ((-1, True), (0, True), (1, False)):
        options = {"fused": True, "residual_shift": shift}
        plan = extension.make_plan("forward_eval", 64, 32, s, "float16", {}, options)
        assert plan["elementwise"]["exact"] is exact
        plan = extension.make_plan("forward_training", 64, 32, s, "float16", {}, options)
        walk = plan["team"]["traversal"] if "team" in plan else plan["elementwise"]
        assert walk["exact"] is exact


@pytest.mark.parametrize("s", [64, 1])
@pytest.mark.parametrize("op", ["forward_training", "backward_training"])
def test_64_bit_indices_only_in_masked_kernels(extension: ModuleType, op: str, s: int) -> None:
    """The plan must not ask for an exact one: none is compiled."""
    shape = (2**31 // 64 // s, 64, s)
    for fused in (False, True):
        options = {"fused": fused, "strategy": "two_pass"}
        plan = extension.make_plan(op, *shape, "float16", {}, options)
        for stage in ("reduce", "elementwise"):
            assert plan[stage]["index_bits"] == 64 and plan[stage]["exact"] is not fused


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_no_deep_kernel(op: str, memory_format: torch.memory_format) -> None:
    seen = set()
    for device, n in itertools.product(devices.DEVICES, (8, 64, 128, 256, 512)):
        options = {"dtype": torch.float16, "memory_format": memory_format, "device": device}
        shape = (n, 64, 56, 56)
        plain = explain(shape, op=op, **options).team
        seen.add(plain.depth if plain else None)
        fused = explain(shape, op=op, activation="relu", residual=True, strategy="team", **options)
        assert fused.team is not None and fused.team.depth != "deep"
    assert "deep" in seen  # or this would show nothing


# ------------------------------------------------------------------------------- bytes

EXACT = [
    TrafficCase((8, 32, 32, 32)),
    TrafficCase((8, 32, 28, 28), dtype="fp32"),
    TrafficCase((4, 64, 28, 28), "nhwc", "bf16"),
    TrafficCase((8, 32, 16, 16), dtype="fp64"),
]


@pytest.mark.parametrize("case", EXACT, ids=lambda c: f"{c.layout}-{c.dtype}")
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("op", ["forward", "backward", "eval", "eval_backward"])
def test_bytes(case: TrafficCase, residual: bool, relu: bool, op: str) -> None:
    """Every tensor once, and a byte of the mask for each 16 bytes of one tensor."""
    values = vars(case) | {"residual": residual, "relu": relu, "op": op}
    result = count(TrafficCase(**values), scaled_device("a100", 4))
    mask = case.nbytes // 16 if relu and op != "eval" else 0
    tensors = 3 + (residual and relu) if op.endswith("backward") else 2 + residual
    assert result.compulsory_bytes == tensors * case.nbytes + mask
    assert result.strategy == ("two_pass" if op == "eval" else "team")
    assert result.predicted_bytes == result.compulsory_bytes
    assert result.counted_bytes == pytest.approx(result.compulsory_bytes, rel=0.02)


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("l2_share", [0.1, 0.4, 8])
def test_bytes_of_two_passes(op: str, l2_share: float) -> None:
    """The mask is read by both backward kernels, the residual by the second of the forward."""
    case = TrafficCase((8, 32, 32, 32), op=op, residual=True, relu=True)
    size = int(max(l2_share * case.nbytes, 65536))
    result = count(case, scaled_device("t4", 1) | {"l2_bytes": size}, "two_pass")
    assert result.strategy == "two_pass"
    mask = case.nbytes // 16
    assert result.compulsory_bytes == (4 if op == "backward" else 3) * case.nbytes + mask
    reread = 2 * case.nbytes + mask if op == "backward" else case.nbytes
    assert result.predicted_bytes <= result.compulsory_bytes + reread
    assert (result.predicted_bytes == result.compulsory_bytes) == (l2_share == 8)
    assert result.counted_bytes == pytest.approx(result.predicted_bytes, rel=0.03)
