"""Outputs, statistics and running statistics of the forward pass against the reference."""

from __future__ import annotations

import harness
import pytest
import torch
from cases import CHANNELLESS_SHAPES, EMPTY_SHAPES, FEW_CASES, Case, fill, fill_parameters
from conftest import Backend
from parametrisations import both_modes, every_case, every_dtype, few_cases

from batchnorm_cuda import batch_norm


@every_dtype
@both_modes
@every_case
def test_matches_reference(
    backend: Backend, case: Case, training: bool, dtype: torch.dtype
) -> None:
    x = fill(case, dtype, backend.device)
    parameters = fill_parameters(case.channels, dtype, backend.device)
    ours, torchs = parameters.clone(), parameters.clone()

    results = harness.forward(backend, x, ours, training)

    assert results["output"].dtype == dtype
    expected = harness.reference_forward(x, parameters, training)
    harness.assert_matches(results, expected, x, harness.torch_forward(x, torchs, training))
    if not training:
        assert torch.equal(ours.running_mean, parameters.running_mean)
        assert torch.equal(ours.running_var, parameters.running_var)


@pytest.mark.parametrize(
    "given",
    [
        {"weight": False},
        {"bias": False},
        {"weight": False, "bias": False},
        {"running": False},
    ],
    ids=["no weight", "no bias", "no affine", "no running statistics"],
)
@both_modes
@few_cases
def test_absent_parameters(
    backend: Backend, case: Case, training: bool, given: dict[str, bool]
) -> None:
    x = fill(case, torch.float32, backend.device)
    given = given if training else {**given, "running": True}
    parameters = fill_parameters(case.channels, torch.float32, backend.device, **given)
    expected = harness.reference_forward(x, parameters, training)

    harness.assert_matches(harness.forward(backend, x, parameters, training), expected, x)


@pytest.mark.parametrize("single", ["weight", "bias", "running_mean", "running_var", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@both_modes
def test_float32_parameters(
    backend: Backend, dtype: torch.dtype, single: str, training: bool
) -> None:
    """Each parameter may be float32 by itself, and keeps its dtype."""
    x = fill(Case((4, 10, 9), "mixed dtypes"), dtype, backend.device)
    parameters = fill_parameters(10, dtype, backend.device)
    for name, value in vars(parameters).items():
        if single in (name, "all"):
            setattr(parameters, name, value.float())
    before = parameters.clone()

    results = harness.forward(backend, x, parameters, training)

    assert results["output"].dtype == dtype
    harness.assert_matches(results, harness.reference_forward(x, before, training), x)


@both_modes
def test_strided_parameters(backend: Backend, training: bool) -> None:
    """Parameters may be columns of a larger tensor; its other columns stay untouched."""
    x = fill(FEW_CASES[0], torch.float32, backend.device)
    parameters = fill_parameters(x.shape[1], torch.float32, backend.device)
    table = torch.full((x.shape[1], 8), 7.0, device=backend.device)
    strided = parameters.clone()
    for column, name in enumerate(vars(parameters)):
        view = table[:, 2 * column + 1].copy_(getattr(parameters, name))
        setattr(strided, name, view)

    results = harness.forward(backend, x, strided, training)

    harness.assert_matches(results, harness.reference_forward(x, parameters, training), x)
    assert bool((table[:, ::2] == 7).all())


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@both_modes
def test_empty_batch(backend: Backend, shape: tuple[int, ...], training: bool) -> None:
    """Nothing to normalise: an empty output, and running statistics as they were, as in torch."""
    x = torch.empty(shape, device=backend.device)
    parameters = fill_parameters(3, torch.float32, backend.device)
    used = parameters.clone()
    output = harness.call(batch_norm, x, used, training)
    assert output.shape == x.shape
    assert torch.equal(used.running_mean, parameters.running_mean)
    assert torch.equal(used.running_var, parameters.running_var)


@pytest.mark.parametrize("shape", CHANNELLESS_SHAPES, ids=str)
@both_modes
def test_no_channels(backend: Backend, shape: tuple[int, ...], training: bool) -> None:
    """C == 0 is an empty output, too; torch agrees, except that it trips over an empty weight."""
    x = torch.empty(shape, device=backend.device)
    output = harness.call(batch_norm, x, fill_parameters(0, x.dtype, backend.device), training)
    assert output.shape == x.shape


def test_momentum_zero_and_one(backend: Backend) -> None:
    """The ends of the moving average: nothing taken over, and nothing kept."""
    x = fill(FEW_CASES[1], torch.float32, backend.device)
    parameters = fill_parameters(x.shape[1], torch.float32, backend.device)
    kept, taken = parameters.clone(), parameters.clone()
    batch_norm(x, kept.running_mean, kept.running_var, training=True, momentum=0.0)
    batch_norm(x, taken.running_mean, taken.running_var, training=True, momentum=1.0)
    assert torch.equal(kept.running_mean, parameters.running_mean)
    assert torch.equal(kept.running_var, parameters.running_var)
    values = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(taken.running_mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(taken.running_var.double(), values.var(1), rtol=2e-6, atol=0)
