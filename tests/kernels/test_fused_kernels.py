"""The fused kernels, called directly: y = relu(bn(x) + residual), its mask and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from cases import Case, channels_last, contiguous, expanded, odd_offset, permuted, spatial_slice
from fused_problem import Fused, every_case, few_cases, in_memory, unpacked
from parametrisations import both_modes, every_dtype
from strategies import FORCED, expected, launched, walk_of
from test_strategies import LAYOUTS

from batchnorm_cuda import explain
from batchnorm_cuda._explain.explain import explain_forced

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
    options = FORCED[strategy] | walk_of(layout, strategy)
    plan_options(options)
    fused = Fused(extension, Case(shape, layout, place), dtype)
    names = launched(extension, fused.check)
    kinds = {"team" if "team_kernel" in name else "stage" for name in names}
    way = expected(strategy, extension)
    assert kinds == {"stage" if way == "two_pass" else "team"}
    assert all("Fused" in name for name in names if "merge" not in name and "statis" not in name)
    for op in ("forward", "backward"):
        plan = explain_forced(fused.x, options, op=op, residual=True, activation="relu")
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
        assert plan.team is not None
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
    plan_options(FORCED[strategy] | walk_of(layout, strategy))
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
