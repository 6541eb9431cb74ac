"""The extension's fused functions: what they return of what is wanted, over ranks, and what they
refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import harness
import pytest
import torch
from cases import EMPTY_SHAPES, Case
from conftest import KERNELS
from fused_problem import FEW_CASES, Fused, few_cases, in_memory, mask_bytes, unpacked
from harness import EPS, MOMENTUM
from parametrisations import both_modes, every_dtype
from strategies import FORCED
from tolerances import assert_within
from torch import Tensor

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
