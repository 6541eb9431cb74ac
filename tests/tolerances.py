"""How far a result may be from the float64 reference.

The bound of an element is

    |got - expected| <= ROUNDOFF[dtype of the result] * |expected|
                        + UNITS[output] * ROUNDOFF[accumulation dtype] * scale

The first term is the one rounding to the dtype of the result. In the second, the scale is the size
of the terms that were added, which the reference computes per channel (reference.py: for sums it
grows with sqrt(count)), and UNITS counts the roundings on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Half the distance from 1 to the next number.
ROUNDOFF = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
# Below this a result of the dtype is subnormal and rounds by an absolute amount.
SMALLEST_STEP = {
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
    torch.float32: 2.0**-150,
    torch.float64: 0.0,
}

# Sums are taken by threads and merged as trees: a mean is off by about 2 roundoffs of its largest
# term, a variance or a sum by about 4 of its scale; each further operation adds 1.
UNITS = {
    "save_mean": 4,  # sum, division, spare 1
    "save_invstd": 6,  # half of the variance's 4, sum with eps, square root, division, spare 1
    "running_mean": 6,  # save_mean, two products, their sum
    "running_var": 8,  # variance, count/(count - 1), two products, their sum
    "output": 10,  # save_invstd, x - mean (2 + 1), scale, multiply-add
    "grad_bias": 4,
    "grad_weight": 10,  # xhat (x - mean and save_invstd) 5, product, sum
    "grad_input": 14,  # the two sums 8 (both in the scale), xhat 3, scale, two multiply-adds
    # Up to 16, 26 and 16 roundings on the way, which mostly cancel: over all cases, dtypes and
    # three seeds at most 1.8, 1.0 and 3.0 units were seen.
    "grad_grad_output": 6,
    "double_grad_input": 6,
    "double_grad_weight": 8,
}


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def bound(
    name: str,
    expected: Tensor,
    scale: Tensor,
    got: torch.dtype,
    input: torch.dtype,
    units: int | None = None,
) -> Tensor:
    """The bound of every element of one output, or with other than the output's own UNITS."""
    unit = ROUNDOFF[accumulation(input)]
    units = UNITS[name] if units is None else units
    rounding = (ROUNDOFF[got] * expected.abs()).clamp_min(SMALLEST_STEP[got])
    # The float64 reference rounds as well.
    noise = units * (unit + 2 * ROUNDOFF[torch.float64]) * scale
    return rounding * (1 + unit) + noise * (1 + ROUNDOFF[got])


def assert_within(
    name: str, got: Tensor, expected: Tensor, scale: Tensor, input_dtype: torch.dtype
) -> None:
    """Every element of `got` is within its bound of the reference."""
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    value = got.detach().cpu().double()
    limit = bound(name, expected, scale, got.dtype, input_dtype)
    error = (value - expected).abs()
    outside = ~(error <= limit)  # a NaN is outside
    if outside.any():
        at = tuple(torch.nonzero(outside)[0].tolist())
        raise AssertionError(
            f"{name}: {int(outside.sum())} of {outside.numel()} elements are off; at {at} got "
            f"{value[at].item()}, expected {expected[at].item()} within {limit[at].item():.3g}"
        )


def assert_unbiased(
    name: str, got: Tensor, expected: Tensor, scale: Tensor, input_dtype: torch.dtype
) -> None:
    """The errors of `got` are those of rounding to nearest: small in L2 and without a trend.

    A value rounded to nearest is off by at most ROUNDOFF relative, uniformly: in the root mean
    square by ROUNDOFF/sqrt(3). The mean of n such errors is within 5/sqrt(n) of that, 5 standard
    deviations, where values cut towards zero would show half a roundoff. Equal values round alike:
    only the distinct ones count, and over the few powers of two that matter at most 2/ROUNDOFF.
    """
    error = got.detach().cpu().double() - expected
    n = min(expected.unique().numel(), 2 / ROUNDOFF[got.dtype])
    rounding = ROUNDOFF[got.dtype] / 3**0.5 * expected.pow(2).mean().sqrt()
    rounding = rounding.clamp_min(SMALLEST_STEP[got.dtype])
    noise = UNITS[name] * (ROUNDOFF[accumulation(input_dtype)] + 2.0**-52) * scale.mean()
    rms = error.pow(2).mean().sqrt()
    assert rms <= rounding * (1 + 5 / n**0.5) + noise, f"{name}: root mean square error {rms:.3g}"
    for trend in (error.mean(), (error * expected.sign()).mean()):
        assert trend.abs() <= 5 * rounding / n**0.5 + noise, f"{name}: errors lean by {trend:.3g}"


def assert_no_worse_than_torch(
    name: str, ours: Tensor, torchs: Tensor, expected: Tensor, scale: Tensor, input: torch.dtype
) -> None:
    """err(ours) <= 2 * err(torch) + what one rounding of the largest value decides.

    Two results that are both as good as they can be round a value near a tie to either side, and
    torch on the CPU accumulates float32 in float64: it may be lucky by one rounding of the result
    and by two of the accumulation.
    """

    def error(value: Tensor) -> Tensor:
        return (value.detach().cpu().double() - expected).abs().amax()

    slack = ROUNDOFF[ours.dtype] * expected.abs().amax()
    slack = slack + 2 * ROUNDOFF[accumulation(input)] * scale.amax()
    slack = slack.clamp_min(SMALLEST_STEP[ours.dtype])
    limit = 2 * error(torchs) + slack
    assert error(ours) <= limit, f"{name}: error {error(ours):.3g}, torch's {error(torchs):.3g}"
